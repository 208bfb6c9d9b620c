"""Timing two ways of doing the same thing in turns, so that a noisy machine treats both alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Seconds of each turn, of ours and of what it is compared with."""

    what: str
    ours: list[float]
    theirs: list[float]
    against: str

    def row(self) -> str:
        """A row of the table: medians, ranges, and the ratio of the medians."""
        ratio = statistics.median(self.theirs) / statistics.median(self.ours)
        cells = [self.what, _span(self.ours), self.against, _span(self.theirs), f"{ratio:.1f}"]
        return f"| {' | '.join(cells)} |"


def compare(
    what: str,
    ours: Callable[[], object],
    against: str,
    theirs: Callable[[], object],
    turns: int = 5,
    warm_up: int = 1,
) -> Comparison:
    """Runs both in turn; the first turns, in which kernels are compiled, do not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(warm_up + turns):
        for run, kept in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            run()
            if turn >= warm_up:
                kept.append(time.perf_counter() - start)
    return Comparison(what, *times, against)


def _span(seconds: list[float]) -> str:
    middle = statistics.median(seconds)
    return f"{middle:.3g} s ({min(seconds):.3g} to {max(seconds):.3g})"
