"""Permutation tests for paired differences: had the two methods swapped places, every sign would
be the other one, and under the null hypothesis either is as likely (Fisher 1935)."""

from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
from scipy import stats

from recycle_cli.evaluation.bootstrap import RESAMPLES
from recycle_cli.evaluation.differences import Rows

EXACT_TASKS = 16
EXACT_SUMS = 1 << 16
# What differs by less is taken for equal: sums of the same terms in another order.
TOLERANCE = 1e-9

Matrix = npt.NDArray[np.float64]


def row_sign_flips(tasks: Sequence[Rows], seed: int, draws: int = RESAMPLES) -> tuple[float, bool]:
    """The two-sided p-value of the mean of the tasks' means when rows may swap, and whether it is
    exact.

    Rows of a task that differ by as much are alike to the sum, so all that is drawn, or gone
    through, is how many of them are positive: a binomial number. With one task whose rows are right
    or wrong this is McNemar's exact test.

    Args:
        tasks: the rows' differences, task by task, each (rows,).
        seed: of the draws, where there are too many sums to go through.
        draws: how many; the observed signs are counted as one more, which keeps the test valid
            however few there are (Phipson and Smyth 2010).
    """
    largest = max(rows.size for rows in tasks)
    weighted = np.concatenate([rows[rows != 0] * (largest / rows.size) for rows in tasks])
    observed = abs(float(weighted.sum())) - TOLERANCE * largest
    sizes, counts = np.unique(np.round(np.abs(weighted), 9), return_counts=True)
    known = _all_sums(sizes, counts)
    if known is not None:
        sums, chances = known
        return min(1.0, float(chances[np.abs(sums) >= observed].sum())), True
    rng = np.random.default_rng(seed)
    drawn = np.zeros(draws)
    for size, count in zip(sizes, counts, strict=True):
        drawn += size * (2 * rng.binomial(count, 0.5, draws) - count)
    return float((1 + np.sum(np.abs(drawn) >= observed)) / (1 + draws)), False


def _all_sums(sizes: Rows, counts: npt.NDArray[np.intp]) -> tuple[Rows, Rows] | None:
    """Every sum that the signs can make, and its chance; None where there are too many."""
    sums: Rows = np.zeros(1)
    chances: Rows = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        if sums.size * (count + 1) > EXACT_SUMS:
            return None
        reached = np.add.outer(sums, size * np.arange(-count, count + 1, 2)).ravel()
        weights = np.multiply.outer(chances, _fair_coins(int(count))).ravel()
        sums, place = np.unique(np.round(reached, 9), return_inverse=True)
        chances = np.asarray(np.bincount(place, weights), dtype=np.float64)
    return sums, chances


@lru_cache(maxsize=1024)
def _fair_coins(count: int) -> Rows:
    """The chance of each number of heads, (count + 1,)."""
    return np.asarray(stats.binom.pmf(np.arange(count + 1), count, 0.5))


def task_sign_flips(
    differences: npt.ArrayLike, seed: int, draws: int = RESAMPLES
) -> tuple[list[float], list[float]]:
    """Two-sided p-values of the mean over tasks when tasks may swap, as they are and adjusted for
    being several.

    All methods' signs are flipped together, so the adjusted values know how alike the methods are:
    the step-down minP procedure of Westfall and Young (1993) in the form of Ge, Dudoit and Speed
    (2003). Holm's correction would ask more than few tasks can give: among 8 tasks no p-value is
    below 1/128, which is no evidence any more after a multiplication by 10 methods.

    Args:
        differences: the mean difference of every method on every task, (methods, tasks).
        seed: of the draws, with more than 16 tasks; else all flips are gone through.
        draws: how many.
    """
    by_method = np.atleast_2d(np.asarray(differences, dtype=np.float64))
    means = np.abs(_signs(by_method.shape[1], seed, draws) @ by_method.T)
    # Of each flip the p-value that it would have: the share of flips that go as far.
    flipped = stats.rankdata(-np.round(means, 9), method="max", axis=0) / means.shape[0]
    p_values = flipped[0]
    adjusted = np.empty_like(p_values)
    smallest = np.ones(means.shape[0])
    worst_first = np.argsort(-p_values, kind="stable")
    for method in worst_first:
        smallest = np.minimum(smallest, flipped[:, method])
        adjusted[method] = np.mean(smallest <= p_values[method] + TOLERANCE)
    best_first = worst_first[::-1]
    adjusted[best_first] = np.maximum.accumulate(adjusted[best_first])
    return p_values.tolist(), adjusted.tolist()


def _signs(tasks: int, seed: int, draws: int) -> Matrix:
    """Flips, (flips, tasks), the first of them none."""
    if tasks <= EXACT_TASKS:
        return _all_signs(tasks)
    drawn = np.random.default_rng(seed).choice([-1.0, 1.0], size=(draws, tasks))
    return np.vstack([np.ones(tasks), drawn])


@cache
def _all_signs(tasks: int) -> Matrix:
    """All flips that leave the first task as it is: the others are their mirror images, and as far
    from zero."""
    numbers = np.arange(1 << (tasks - 1))[:, None]
    bits = (numbers >> np.arange(tasks - 1)) & 1
    return np.hstack([np.ones((numbers.size, 1)), 1.0 - 2.0 * bits])
