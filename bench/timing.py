"""Timing two ways of doing the same thing in turns, so that a noisy machine treats both alike."""

import ctypes
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


@dataclass(frozen=True)
class Comparison:
    """Seconds and extra bytes of each turn, of ours and of what it is compared with, if any."""

    what: str
    ours: list["Measured"]
    against: str = "-"
    theirs: tuple["Measured", ...] = ()

    def row(self) -> str:
        """A row of the table: medians, ranges, the ratio of the medians, and peak memory."""
        cells = [self.what, _span(self.ours), _peak(self.ours), self.against]
        if self.theirs:
            ratio = _median(self.theirs) / _median(self.ours)
            cells += [_span(self.theirs), _peak(self.theirs), f"{ratio:,.1f}"]
        else:
            cells += ["-", "-", "-"]
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Measured:
    """One run: its seconds, and the bytes that the process held at most beyond those before."""

    seconds: float
    extra_bytes: int


def compare(
    what: str,
    ours: Callable[[], object],
    against: str,
    theirs: Callable[[], object],
    turns: int = 5,
    warm_up: int = 1,
) -> Comparison:
    """Runs both in turn; the first turns, in which kernels are compiled, do not count."""
    kept: tuple[list[Measured], list[Measured]] = ([], [])
    for turn in range(warm_up + turns):
        for run, measured in zip((ours, theirs), kept, strict=True):
            one = measure(run)
            if turn >= warm_up:
                measured.append(one)
    return Comparison(what, kept[0], against, tuple(kept[1]))


def machine() -> str:
    """The processor, its cores, and the versions that the figures depend on."""
    from recycle_cli.workflows.provenance import versions

    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores; {found}"


def measure(run: Callable[[], object]) -> Measured:
    """One run. Memory is that of this process alone."""
    gc.collect()
    # What earlier work gave back but the allocator kept would hide what this run takes.
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text(RESET_PEAK)
    before = _status("VmRSS")
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return Measured(seconds, max(0, _status("VmHWM") - before))


def _status(field: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _median(runs: "list[Measured] | tuple[Measured, ...]") -> float:
    return statistics.median(run.seconds for run in runs)


def _span(runs: "list[Measured] | tuple[Measured, ...]") -> str:
    times = [run.seconds for run in runs]
    if len(times) == 1:
        return f"{times[0]:.3g} s"
    return f"{statistics.median(times):.3g} s ({min(times):.3g} to {max(times):.3g})"


def _peak(runs: "list[Measured] | tuple[Measured, ...]") -> str:
    return f"{max(run.extra_bytes for run in runs) / 1e6:,.0f} MB"
