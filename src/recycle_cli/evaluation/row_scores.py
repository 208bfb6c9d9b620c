"""A metric's value with its uncertainty, and whether two models differ in it, whatever the metric.

Scores from 0 to 1 go the way of right and wrong answers. Others have no bounds that a formula could
lean on: their intervals are bootstrapped, and their p-values come from swapping the two models row
by row, which asks nothing of how scores are spread.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from recycle_cli.evaluation.bootstrap import RESAMPLES, percentile_interval
from recycle_cli.evaluation.comparison import ROW_INTERVAL, compare
from recycle_cli.evaluation.differences import DIGITS, Rows, is_right_or_wrong
from recycle_cli.evaluation.sign_flips import row_sign_flips
from recycle_cli.evaluation.statistics import CONFIDENCE, Estimate, mean_estimate
from recycle_cli.records import PairedTest

TAIL = (1 - CONFIDENCE) / 2
CHUNK = 1 << 22


@dataclass(frozen=True)
class RowScores:
    """One model's scores on the rows of a task.

    Args:
        values: a score for each row, (rows,); for perplexity its negative log-likelihood in nats.
        tokens: for perplexity, how many tokens each answer is, (rows,); None for a mean over rows.
    """

    values: Rows
    tokens: Rows | None = None

    @property
    def bounded(self) -> bool:
        """Whether every score is a number from 0 to 1."""
        return self.tokens is None and bool(((self.values >= 0) & (self.values <= 1)).all())

    def mean(self) -> float:
        """The mean score, or the perplexity: exp of the mean negative log-likelihood a token."""
        return float(self.resampled(np.ones((1, self.values.size)))[0])

    def resampled(self, counts: Rows) -> Rows:
        """The same of resamples.

        Args:
            counts: how often each row is in each of them, (resamples, rows).
        """
        if self.tokens is None:
            return np.asarray(counts @ self.values / counts.sum(axis=1))
        return np.asarray(np.exp(counts @ self.values / (counts @ self.tokens)))


def estimate(scores: RowScores, seed: int = 0) -> Estimate:
    """The metric's value, standard error and 95 % interval.

    Right and wrong answers, and scores from 0 to 1 that are all the same, have intervals by
    formula; all else is bootstrapped over rows. Where a score without bounds is the same in every
    row, as in a single one, the interval has no width: there is nothing to tell it from.

    Args:
        scores: at least one row.
        seed: of the resamples.
    """
    alike = bool((scores.values == scores.values[0]).all())
    if scores.bounded and (alike or is_right_or_wrong(scores.values)):
        return mean_estimate(scores.values)
    rows = scores.values.size
    resamples = _bootstrap(scores.resampled, rows, seed)
    interval = percentile_interval(resamples, TAIL, tasks=1)
    return Estimate(scores.mean(), float(resamples.std(ddof=1)), interval, rows)


def compare_rows(
    ours: RowScores, baseline: RowScores, *, baseline_name: str, metric: str, seed: int = 0
) -> PairedTest:
    """Compares two models on the same rows of one task.

    Scores from 0 to 1 go to `comparison.compare`. Others: a sign-flip permutation test over rows,
    for perplexity of the rows' log-likelihoods, and the percentile interval of the paired
    bootstrap, in the metric's own unit.

    Args:
        ours: one row or more.
        baseline: of the same rows.
        baseline_name: how the record names the baseline.
        metric: how the record names the metric.
        seed: of what is drawn.
    """
    if ours.bounded and baseline.bounded:
        return compare(
            {"": ours.values},
            {"": baseline.values},
            baseline_name=baseline_name,
            metric=metric,
            seed=seed,
        )
    rows = ours.values.size
    differences = np.round(ours.values - baseline.values, DIGITS) + 0.0
    p_value, exact = row_sign_flips([differences], seed) if differences.any() else (1.0, True)
    resamples = _bootstrap(
        lambda counts: ours.resampled(counts) - baseline.resampled(counts), rows, seed
    )
    test = "sign-flip test over rows, two-sided"
    if ours.tokens is not None:
        test = f"{test}, of log-likelihoods"
    return PairedTest(
        baseline=baseline_name,
        metric=metric,
        difference=round(ours.mean() - baseline.mean(), DIGITS),
        interval=percentile_interval(resamples, TAIL, tasks=1),
        p_value=p_value,
        test=f"{'exact ' if exact else ''}{test}; {ROW_INTERVAL}",
        rows=rows,
    )


def _bootstrap(statistic: Callable[[Rows], Rows], rows: int, seed: int) -> Rows:
    """The statistic of resamples of the rows, (resamples,)."""
    rng = np.random.default_rng(seed)
    size = max(1, CHUNK // rows)
    chances = np.full(rows, 1 / rows)
    return np.concatenate(
        [
            statistic(
                rng.multinomial(rows, chances, size=min(size, RESAMPLES - start)).astype(float)
            )
            for start in range(0, RESAMPLES, size)
        ]
    )
