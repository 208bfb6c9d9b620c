"""Scores of two methods on the same rows, brought to one difference a row."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Scores = Mapping[str, npt.ArrayLike]
"""Task -> its scores in [0, 1], (seeds, rows) or (rows,)."""
Rows = npt.NDArray[np.float64]
"""One number a row, (rows,)."""

# Averages over seeds that are equal on paper differ in their last bits.
DIGITS = 12


def mean_over_seeds(scores: npt.ArrayLike) -> Rows:
    """Each row's score, averaged over seeds: the same row answered again is no new row.

    Args:
        scores: in [0, 1], (seeds, rows) or (rows,).

    Raises:
        ValueError: there are no rows, the seeds differ in theirs, or a score is out of range.
    """
    runs = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if runs.ndim != 2 or runs.size == 0:
        raise ValueError(f"expected scores of shape (seeds, rows); got {runs.shape}")
    if not ((runs >= 0) & (runs <= 1)).all():
        raise ValueError("expected scores from 0 to 1")
    return np.asarray(runs.mean(axis=0))


def mean_scores(scores: Scores) -> dict[str, Rows]:
    """Task -> each row's score averaged over seeds; the tasks by name, whatever their order was.

    Raises:
        ValueError: as `mean_over_seeds`, or there are no tasks.
    """
    if not scores:
        raise ValueError("expected scores on a task at least")
    return {task: mean_over_seeds(scores[task]) for task in sorted(scores)}


def row_differences(ours: Mapping[str, Rows], baseline: Mapping[str, Rows]) -> list[Rows]:
    """Ours minus the baseline's, row by row, task by task: each (rows,) in [-1, 1].

    Args:
        ours: as `mean_scores` returns them.
        baseline: the same for the baseline.

    Raises:
        ValueError: the two differ in their tasks, or in the number of rows of one.
    """
    if list(ours) != list(baseline):
        raise ValueError(f"tasks {', '.join(ours)} cannot be paired with {', '.join(baseline)}")
    for task, rows in ours.items():
        if rows.size != baseline[task].size:
            raise ValueError(f"{rows.size} rows cannot be paired with {baseline[task].size}")
    # Adding zero turns -0.0 into 0.0.
    return [np.round(ours[task] - baseline[task], DIGITS) + 0.0 for task in ours]


def is_right_or_wrong(rows: Rows) -> bool:
    """Whether every score is 0 or 1, as it is when all seeds agree or there is just one."""
    return bool(((rows == 0) | (rows == 1)).all())


def mean_of_means(tasks: list[Rows]) -> float:
    """The mean over tasks of the mean over their rows: tasks count alike, however many rows."""
    return round(float(np.mean([rows.mean() for rows in tasks])), DIGITS)
