"""What scoring a pool came to."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from recycle_cli.records import LeftOut
from recycle_cli.selection.ranking import Score


@dataclass(frozen=True)
class Outcome:
    """The scores of a pool.

    Args:
        scores: of those that could be scored.
        left_out: the others, and why.
        passes: runs of the model over rows, each with one adapter on it or with none.
        rows_scored: rows that these runs had, all together.
        rows_of_full: what scoring every adapter on every row takes, where less was done.
        agreement: the share of the first k that the full ranking has too, where that is known.
    """

    scores: Sequence[Score]
    left_out: Sequence[LeftOut] = field(default_factory=list)
    passes: int = 0
    rows_scored: int = 0
    rows_of_full: int | None = None
    agreement: float | None = None
