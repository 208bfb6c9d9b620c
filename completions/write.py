"""Writes the shell completions beside this file, as the command itself prints them."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FILES = {"bash": "recycle.bash", "zsh": "_recycle", "fish": "recycle.fish"}


def script(shell: str) -> str:
    """What `recycle --show-completion SHELL` prints."""
    command = [str(Path(sys.executable).with_name("recycle")), "--show-completion", shell]
    # Without it, typer takes no name of a shell and looks at the running one.
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    for name, file in FILES.items():
        (HERE / file).write_text(script(name), encoding="utf-8")
