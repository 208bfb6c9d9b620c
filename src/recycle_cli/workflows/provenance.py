"""What a run used and cost: the fields that every result carries."""

import importlib.metadata
import platform
import resource
import sys
import time
from pathlib import Path
from typing import TypedDict

from recycle_cli import __version__

LIBRARIES = ("torch", "transformers", "peft", "safetensors")


class RunFields(TypedDict):
    """The fields of `records.Run`."""

    seed: int
    versions: dict[str, str]
    command: list[str]
    elapsed_s: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None


class Clock:
    """Started when a run begins; gives its fields when it ends."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return round(time.monotonic() - self._start, 3)

    def fields(self, seed: int, command: list[str]) -> RunFields:
        """The run's fields; `command` is the command line that does the same again."""
        return {
            "seed": seed,
            "versions": versions(),
            "command": command,
            "elapsed_s": self.elapsed_s,
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_device_memory_bytes": peak_device_memory_bytes(),
        }


def shown(path: Path | str) -> str:
    """A path as the user would write it here: relative where it lies below this folder."""
    absolute, here = Path(path).absolute(), Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else path)


def versions() -> dict[str, str]:
    """The versions of what the figures depend on."""
    found = {"recycle-cli": __version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in LIBRARIES}


def peak_memory_bytes() -> int:
    """The most memory this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory_bytes() -> int | None:
    """The most memory that tensors have held at once on the accelerator; None where there is none,
    or where nothing was put on it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())
