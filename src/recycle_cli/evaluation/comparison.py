"""Two methods on the same rows of one or more tasks, with one or more seeds: which is better, by
how much, and how sure that is.

What a claim is about depends on how much was tried. With fewer than 6 tasks it is about *these
adapters on rows like these*: what other seeds or other tasks would give was hardly looked at. From
6 tasks on it is about *tasks like these*, trained anew: each task's mean difference, with the
chance of its training in it, counts as one observation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from recycle_cli.evaluation.bootstrap import (
    MANY_TASKS,
    RESAMPLES,
    percentile_interval,
    resampled_means_of_tasks,
    tail_p_value,
)
from recycle_cli.evaluation.differences import (
    Rows,
    Scores,
    is_right_or_wrong,
    mean_of_means,
    mean_scores,
    row_differences,
)
from recycle_cli.evaluation.power import moments, rows_needed, rows_needed_to_match
from recycle_cli.evaluation.sign_flips import EXACT_TASKS, row_sign_flips, task_sign_flips
from recycle_cli.evaluation.statistics import (
    CONFIDENCE,
    Estimate,
    difference_masses,
    differing_share_bound,
    holm,
    mean_estimate,
    paired_test,
)
from recycle_cli.records import PairedTest

__all__ = [
    "MARGIN",
    "Equivalence",
    "compare",
    "equivalence",
    "mean_over_tasks",
    "moments",
    "rows_needed",
    "rows_needed_to_match",
    "with_holm",
]

MARGIN = 0.01
# With so few differing rows a bootstrap knows too little of the others that might have differed.
FEW_DIFFERING = 10

OVER_ROWS = "sign-flip test over rows, two-sided"
OVER_TASKS = "sign-flip test over tasks, two-sided"
ROW_INTERVAL = "percentile interval of the paired bootstrap"
TASK_INTERVAL = "percentile interval of the hierarchical bootstrap over tasks and their rows"
ALL_AGREE_INTERVAL = "no row differs, so the interval is the binomial bound"


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests that a difference lies within a margin of zero.

    Args:
        p_value: the larger of the two.
        interval: at 90 %; it lies within the margin where the p-value is below 5 %.
        margin: to either side.
    """

    p_value: float
    interval: tuple[float, float]
    margin: float


def compare(
    ours: Scores,
    baseline: Scores,
    *,
    baseline_name: str,
    metric: str,
    seed: int = 0,
    draws: int = RESAMPLES,
) -> PairedTest:
    """Compares two methods on the same rows of the same tasks.

    Scores are averaged over seeds row by row first, so that a row counts once. The difference is
    the mean over tasks of the mean over their rows. The p-value, two-sided, is that of

    - one task, every row right or wrong: the exact McNemar test (McNemar 1947);
    - fewer than 6 tasks: the sign-flip permutation test over rows. Like McNemar's, it speaks of
      these adapters on rows like these, not of other seeds or other tasks;
    - 6 tasks or more: the sign-flip permutation test over the tasks' mean differences, exact up to
      16 tasks. It speaks of tasks like these and of adapters trained anew for each, since the
      tasks' differences vary with both.

    The interval at 95 % is that of the paired bootstrap over rows; with two tasks or more that of
    the hierarchical bootstrap over tasks and their rows, so it may be wider than the p-value has it
    where this speaks of rows. Claims rest on the p-value.

    Args:
        ours: task -> scores in [0, 1], (seeds, rows) or (rows,).
        baseline: the same for the baseline, on the same rows in the same order. The numbers of
            seeds may differ.
        baseline_name: how the record names the baseline.
        metric: how the record names the metric.
        seed: of the resamples and flips that are drawn.
        draws: how many; of resamples of several tasks no more than 1,999.

    Raises:
        ValueError: the two differ in tasks or rows, there are none, or scores are out of range.
    """
    left, right = mean_scores(ours), mean_scores(baseline)
    differences = row_differences(left, right)
    if len(differences) == 1 and _right_or_wrong(*left.values(), *right.values()):
        (one,), (other,) = left.values(), right.values()
        return paired_test(one == 1, other == 1, baseline_name, metric)
    p_value, test = _permutation_test(differences, seed, draws)
    interval, how = _interval(differences, seed, draws)
    return PairedTest(
        baseline=baseline_name,
        metric=metric,
        difference=mean_of_means(differences),
        interval=interval,
        p_value=p_value,
        test=f"{test}; {how}",
        rows=sum(rows.size for rows in differences),
        tasks=len(differences),
    )


def _right_or_wrong(*scores: Rows) -> bool:
    return all(is_right_or_wrong(rows) for rows in scores)


def _permutation_test(differences: list[Rows], seed: int, draws: int) -> tuple[float, str]:
    if len(differences) >= MANY_TASKS:
        (p_value,), _ = task_sign_flips([rows.mean() for rows in differences], seed, draws)
        exact = len(differences) <= EXACT_TASKS
    else:
        p_value, exact = row_sign_flips(differences, seed, draws)
    flips = OVER_TASKS if len(differences) >= MANY_TASKS else OVER_ROWS
    return p_value, f"exact {flips}" if exact else flips


def _interval(differences: list[Rows], seed: int, draws: int) -> tuple[tuple[float, float], str]:
    if not any(rows.any() for rows in differences):
        bound = differing_share_bound(0, _even_rows(differences))
        return (-bound, bound), ALL_AGREE_INTERVAL
    resamples = resampled_means_of_tasks(differences, draws, np.random.default_rng(seed))
    interval = percentile_interval(resamples, (1 - CONFIDENCE) / 2, len(differences))
    return interval, ROW_INTERVAL if len(differences) == 1 else TASK_INTERVAL


def _even_rows(differences: list[Rows]) -> int:
    """All rows; where tasks have more and fewer, as if all had the fewest: those weigh the most."""
    return len(differences) * min(rows.size for rows in differences)


def equivalence(
    ours: Scores,
    baseline: Scores,
    margin: float = MARGIN,
    seed: int = 0,
    draws: int = RESAMPLES,
) -> Equivalence:
    """Are the two methods the same but for a margin? Two one-sided tests (Schuirmann 1987).

    The tests are those of the bootstrap that `compare` takes its interval from. Where fewer than
    10 rows differ it says too little, and the difference is bounded by the share of rows that
    differ, which is binomial.

    Args:
        ours: as for `compare`.
        baseline: as for `compare`.
        margin: the largest difference that does not matter, in (0, 1).
        seed: of the resamples that are drawn.
        draws: how many.

    Raises:
        ValueError: as `compare`, or the margin is out of range.
    """
    if not 0 < margin < 1:
        raise ValueError(f"the margin {margin} is not between 0 and 1")
    left, right = mean_scores(ours), mean_scores(baseline)
    differences = row_differences(left, right)
    differing = sum(int(np.count_nonzero(rows)) for rows in differences)
    if differing < FEW_DIFFERING:
        return _few_differing(differing, _even_rows(differences), margin)
    if len(differences) == 1 and _right_or_wrong(*left.values(), *right.values()):
        return _exact_equivalence(differences[0], margin)
    tasks = len(differences)
    resamples = resampled_means_of_tasks(differences, draws, np.random.default_rng(seed))
    p_value = max(tail_p_value(sign * resamples, margin, tasks) for sign in (1, -1))
    return Equivalence(p_value, percentile_interval(resamples, 1 - CONFIDENCE, tasks), margin)


def _few_differing(differing: int, rows: int, margin: float) -> Equivalence:
    bound = differing_share_bound(min(differing, rows), rows)
    return Equivalence(float(stats.binom.cdf(differing, rows, margin)), (-bound, bound), margin)


def _exact_equivalence(differences: Rows, margin: float) -> Equivalence:
    """By the whole distribution of the bootstrap of right and wrong answers."""
    rows, tail = differences.size, 1 - CONFIDENCE
    masses = difference_masses(int((differences > 0).sum()), int((differences < 0).sum()), rows)
    reached = np.arange(-rows, rows + 1) / rows
    beyond = (
        float(masses[reached >= margin - 1e-12].sum()),
        float(masses[reached <= -margin + 1e-12].sum()),
    )
    low = reached[np.argmax(np.cumsum(masses) >= tail)]
    high = -reached[np.argmax(np.cumsum(masses[::-1]) >= tail)]
    return Equivalence(min(1.0, max(beyond)), (float(low), float(high)), margin)


def mean_over_tasks(scores: Scores, seed: int = 0, draws: int = RESAMPLES) -> Estimate:
    """One method's mean over tasks of the mean over rows, with its uncertainty.

    With one task that of its rows; else that of the hierarchical bootstrap over tasks and rows.

    Args:
        scores: task -> scores in [0, 1], (seeds, rows) or (rows,).
        seed: of the resamples.
        draws: how many.

    Raises:
        ValueError: there are no scores, or some are out of range.
    """
    tasks = list(mean_scores(scores).values())
    if len(tasks) == 1:
        return mean_estimate(tasks[0])
    resamples = resampled_means_of_tasks(tasks, draws, np.random.default_rng(seed))
    low, high = percentile_interval(resamples, (1 - CONFIDENCE) / 2, len(tasks))
    rows = sum(task.size for task in tasks)
    return Estimate(mean_of_means(tasks), float(resamples.std(ddof=1)), (low, high), rows)


def with_holm(tests: Sequence[PairedTest]) -> list[PairedTest]:
    """The tests with p-values adjusted for being a family (Holm 1979), in their order."""
    adjusted = holm([test.p_value for test in tests])
    return [
        test.model_copy(update={"adjusted_p_value": p_value})
        for test, p_value in zip(tests, adjusted, strict=True)
    ]
