"""How long `--help` takes, beside the import of what it cannot do without."""

import subprocess
import sys
from collections.abc import Callable, Iterator

from bench.timing import Comparison, compare


def comparisons() -> Iterator[Comparison]:
    """Help of the whole and of the command with most options."""
    for line in ("", "tune"):
        yield compare(
            f"`recycle {line} --help`".replace("  ", " "),
            _python("-m", "recycle_cli", *line.split(), "--help"),
            "`python -c 'import typer, rich'`",
            _python("-c", "import typer, rich"),
            turns=7,
        )


def _python(*words: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *words], check=True, capture_output=True)
