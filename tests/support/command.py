"""The command as a user meets it: words in, exit code and text out."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.pico import ATTENTION, MLP

RECYCLE = [sys.executable, "-m", "recycle_cli"]
POOL: dict[str, dict[str, Any]] = {
    "lab/plain": {},
    "lab/rslora": {"use_rslora": True, "r": 8, "target_modules": list(ATTENTION)},
    "shop/patterned": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "shop/mlp": {"r": 2, "target_modules": list(MLP)},
}


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def documents(self) -> list[dict[str, Any]]:
        """The JSON Lines on stdout."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    @property
    def document(self) -> dict[str, Any]:
        """The only line on stdout."""
        (document,) = self.documents
        return document


Recycle = Callable[..., Done]
Shell = Callable[[str], Done]


def assert_refused(done: Done, code: int, *said: str) -> None:
    """The command ended with this code and two lines that hold these words, and no result."""
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: "), done.stderr
    assert hint.startswith("hint: "), done.stderr
    assert "Traceback" not in done.stderr
    for text in said:
        assert text in f"{error}\n{hint}", done.stderr
    assert done.exit_code == code
    assert done.stdout == ""


def kill_once_kept(words: Sequence[str], place: Path, kept: Path) -> None:
    """Runs the command in a folder, with the home there, and kills it once it has kept a file."""
    environment = {**os.environ, "RECYCLE_HOME": str(place / "home")}
    with subprocess.Popen(
        [*RECYCLE, *words], cwd=place, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 120
        while not kept.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
