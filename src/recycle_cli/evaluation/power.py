"""How many test rows, or tasks, a claim would take."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from recycle_cli.evaluation.bootstrap import MANY_TASKS
from recycle_cli.evaluation.differences import Rows, mean_of_means

ALPHA = 0.05
POWER = 0.8


def rows_needed(difference: float, spread: float, power: float = POWER) -> int | None:
    """How many rows show a difference of this size, two-sided at 5 %, with a chance of `power`.

    For right and wrong answers this is Connor's formula (1987) for McNemar's test; for other scores
    the same one, since both ask for the differences' second moment with and without the difference.

    Args:
        difference: the mean difference, in [-1, 1].
        spread: the mean squared difference of a row; for right and wrong answers that is the share
            of rows that differ.
        power: in (0, 1).

    Returns:
        The number of rows; None where there is no difference to show.
    """
    if difference == 0:
        return None
    null, alternative = math.sqrt(spread), math.sqrt(max(0.0, spread - difference**2))
    z = stats.norm.ppf(1 - ALPHA / 2) * null + stats.norm.ppf(power) * alternative
    return math.ceil((z / difference) ** 2)


def rows_needed_to_match(spread: float, margin: float, power: float = POWER) -> int:
    """How many rows show that a difference is within the margin, if there is none, by two
    one-sided tests at 5 %, with a chance of `power` (Julious 2004).

    Args:
        spread: as for `rows_needed`.
        margin: more than 0.
        power: in (0, 1).
    """
    # Where hardly a row differs, so many are needed to bound the share of those that do.
    fewest = math.ceil(math.log(ALPHA) / math.log1p(-margin))
    return max(fewest, tasks_needed_to_match(spread, margin, power))


def tasks_needed_to_match(spread: float, margin: float, power: float = POWER) -> int:
    """The same where what is counted is tasks, by the mean squared difference of a task."""
    z = stats.norm.ppf(1 - ALPHA) + stats.norm.ppf((1 + power) / 2)
    return max(2, math.ceil(spread * (z / margin) ** 2))


def moments(tasks: Sequence[Rows]) -> tuple[float, float]:
    """The mean difference and its spread, as `rows_needed` takes them, from differences of rows.

    From `MANY_TASKS` tasks on tests are over tasks, so the moments are those of the tasks' means,
    and what is needed is counted in tasks. Below, tasks count alike though their rows may not be
    as many, so the spread is that of one row of an even mixture that is as uncertain.

    Args:
        tasks: the rows' differences, task by task, each (rows,).
    """
    difference = mean_of_means(list(tasks))
    if len(tasks) >= MANY_TASKS:
        return difference, float(np.mean([rows.mean() ** 2 for rows in tasks]))
    rows = sum(task.size for task in tasks)
    return difference, rows / len(tasks) ** 2 * sum(float((t**2).mean()) / t.size for t in tasks)
