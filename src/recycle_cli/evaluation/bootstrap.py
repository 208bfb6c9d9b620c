"""Bootstrap distributions of a mean over rows, or over tasks and their rows."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from recycle_cli.evaluation.differences import DIGITS, Rows

RESAMPLES = 9_999
# Of several tasks a resample costs as many times more, and a study compares dozens of arms. With so
# many, the ends of an interval are off by some 4 % of its half width.
TASK_RESAMPLES = 1_999
# From so many tasks on, how the tasks vary is measured well enough to speak of tasks like these.
MANY_TASKS = 6
CHUNK = 1 << 21


def resampled_means(rows: Rows, size: int, rng: np.random.Generator) -> Rows:
    """Means of resamples of the rows, (size,).

    A mean does not ask which rows were drawn, only how often each value was, so the counts are
    drawn in place of the rows: few where scores are right or wrong, or averages over some seeds.
    """
    values, counts = np.unique(rows, return_counts=True)
    chunk = max(1, CHUNK // values.size)
    means = [
        rng.multinomial(rows.size, counts / rows.size, size=min(chunk, size - start)) @ values
        for start in range(0, size, chunk)
    ]
    return np.concatenate(means) / rows.size if means else np.empty(0)


def resampled_means_of_tasks(tasks: Sequence[Rows], size: int, rng: np.random.Generator) -> Rows:
    """Means over tasks of the hierarchical bootstrap: tasks are drawn with replacement, then the
    rows of each task drawn. With several tasks there are no more than `TASK_RESAMPLES`.

    The rows' chance is in the tasks' means already and is drawn once more, so the distribution is
    too wide rather than too narrow (Davison and Hinkley 1997, section 3.8), most so where tasks
    hardly differ.
    """
    if len(tasks) == 1:
        return resampled_means(tasks[0], size, rng)
    size = min(size, TASK_RESAMPLES)
    drawn = rng.integers(len(tasks), size=(size, len(tasks)))
    means = np.empty(drawn.shape)
    for number, rows in enumerate(tasks):
        chosen = drawn == number
        means[chosen] = resampled_means(rows, int(chosen.sum()), rng)
    return np.asarray(means.mean(axis=1))


def percentile_interval(resamples: Rows, tail: float, tasks: int) -> tuple[float, float]:
    """The interval between two percentiles.

    With `MANY_TASKS` or more the percentiles are expanded (Hesterberg 2015): a bootstrap of n
    tasks is too narrow by sqrt((n - 1) / n), and has normal tails where they should be Student's.
    Below, it is the plain percentile interval: it holds for these tasks, not for others.

    Args:
        resamples: the bootstrap distribution.
        tail: the chance to either side of the interval, in (0, 0.5).
        tasks: how many tasks were resampled.
    """
    if tasks >= MANY_TASKS:
        tail = float(stats.norm.cdf(np.sqrt(tasks / (tasks - 1)) * stats.t.ppf(tail, tasks - 1)))
    low, high = np.quantile(resamples, [tail, 1 - tail])
    return round(float(low), DIGITS), round(float(high), DIGITS)


def tail_p_value(resamples: Rows, bound: float, tasks: int) -> float:
    """The one-sided p-value of "the mean is no less than the bound": the tail at which the end of
    `percentile_interval` meets it.

    Args:
        resamples: the bootstrap distribution.
        bound: the largest mean that is still to be told apart.
        tasks: how many tasks were resampled.
    """
    beyond = float((1 + np.sum(resamples >= bound - 1e-12)) / (1 + resamples.size))
    if tasks < MANY_TASKS:
        return beyond
    z = stats.norm.ppf(beyond) * np.sqrt((tasks - 1) / tasks)
    return float(stats.t.cdf(z, tasks - 1))
