"""A disk that is full before the result is whole; a limit on the size of files stands for it."""

import os
import resource
import subprocess
from pathlib import Path

import pytest
from support.command import RECYCLE, Done, assert_refused


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        pytest.param(500, "", id="in the configuration"),
        pytest.param(8_000, "", id="in the weights"),
        pytest.param(100_000, "--into-base BASE", id="in the model"),
    ],
)
def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    pool: Path, pico_folder: Path, tmp_path: Path, limit: int, words: str
) -> None:
    adapters = [str(pool / name) for name in ("lab/plain", "lab/rslora")]
    more = [str(pico_folder) if word == "BASE" else word for word in words.split()]
    done = subprocess.run(
        [*RECYCLE, "merge", *adapters, "--base-model", str(pico_folder), *more, "--out", "merged"],
        cwd=tmp_path,
        env={**os.environ, "RECYCLE_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
        # Python ignores SIGXFSZ, so that writing on fails with EFBIG.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}
    refused = Done(done.returncode, done.stdout, done.stderr)
    assert_refused(refused, 1, "merged cannot be written: ", "free some space")
