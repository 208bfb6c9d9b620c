"""Putting scored adapters in order and taking the first k."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """A score of one adapter.

    Args:
        sha256: which adapter.
        value: the method's score; higher is better.
        tie_breaker: decides between equal values; higher is better.
    """

    sha256: str
    value: float
    tie_breaker: float = 0.0


@dataclass(frozen=True)
class Ranking:
    """The first k, the others, each best first, and how many others have the score of the last one
    taken."""

    taken: list[Score]
    below: list[Score]
    tied_at_cut: int


def _place(score: Score) -> tuple[float, float, str]:
    """What to sort by. A number that is none comes last; sorting would leave it where it stood."""
    value, tie_breaker = (
        math.inf if math.isnan(number) else -number for number in (score.value, score.tie_breaker)
    )
    return value, tie_breaker, score.sha256


def rank(scores: Sequence[Score], k: int) -> Ranking:
    """Sorts by value, then tie-breaker, then sha256, so that the order of the pool never decides.

    Args:
        scores: of different adapters.
        k: how many to take, at least 1; fewer come back where there are fewer.
    """
    ordered = sorted(scores, key=_place)
    taken, below = ordered[:k], ordered[k:]
    tied = sum(score.value == taken[-1].value for score in below) if taken else 0
    return Ranking(taken, below, tied)
