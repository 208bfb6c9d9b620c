"""The completions that the wheel ships are those of the command, and they complete."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECYCLE = str(Path(sys.executable).with_name("recycle"))


def run(*words: str, **environment: str) -> str:
    done = subprocess.run(
        [RECYCLE, *words], env={**os.environ, **environment}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize(
    ("shell", "file"), [("bash", "recycle.bash"), ("zsh", "_recycle"), ("fish", "recycle.fish")]
)
def test_the_shipped_files_are_fresh(shell: str, file: str) -> None:
    printed = run("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert (ROOT / "completions" / file).read_text(encoding="utf-8") == printed, (
        "run: make completions"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("recycle tu", {"tune"}),
        ("recycle index s", {"show", "stats"}),
        ("recycle merge --ra", {"--rank"}),
    ],
)
def test_words_are_completed(line: str, expected: set[str]) -> None:
    words = run(
        _RECYCLE_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(line.split()) - 1)
    )
    assert set(words.split()) == expected
