"""Estimates, and paired tests for right and wrong answers on the same rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from recycle_cli.evaluation.differences import Rows, is_right_or_wrong
from recycle_cli.records import PairedTest

CONFIDENCE = 0.95
MIN_ROWS = 20

TEST = "exact McNemar, two-sided; percentile interval of the paired bootstrap"
TEST_ALL_AGREE = "exact McNemar, two-sided; no row differs, so the interval is the binomial bound"

Correct = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Estimate:
    """A share of right answers, or a mean of scores.

    Args:
        value: in [0, 1].
        stderr: its standard error.
        interval: the interval at 95 %, in [0, 1].
        rows: how many rows it is over.
    """

    value: float
    stderr: float
    interval: tuple[float, float]
    rows: int


def proportion(correct: npt.ArrayLike) -> Estimate:
    """The share of right answers with its uncertainty.

    The standard error is lm-eval's for a mean: the sample standard deviation (n - 1 in the
    denominator) over sqrt(n). For a single row, where that is not defined, it is 0.5, the largest
    standard deviation that a yes or no can have.

    Args:
        correct: whether each row was answered rightly, (rows,) booleans.

    Raises:
        ValueError: there are no rows, or they are not booleans in one dimension.
    """
    flags = as_flags(correct)
    rows = flags.size
    right = int(flags.sum())
    interval = stats.binomtest(right, rows).proportion_ci(CONFIDENCE, method="wilson")
    stderr = float(np.std(flags.astype(np.float64), ddof=1) / np.sqrt(rows)) if rows > 1 else 0.5
    return Estimate(right / rows, stderr, (float(interval.low), float(interval.high)), rows)


def mean_estimate(scores: npt.ArrayLike) -> Estimate:
    """The mean score of a task's rows with its uncertainty.

    Right and wrong answers are a `proportion`. The interval of other scores is Student's, cut to
    [0, 1]; where all are the same and it would have no width, it is that of a share of that size.

    Args:
        scores: one for each row, in [0, 1], (rows,).

    Raises:
        ValueError: there are no rows, or they are not scores in one dimension.
    """
    rows: Rows = np.asarray(scores, dtype=np.float64)
    if rows.ndim != 1 or rows.size == 0 or not ((rows >= 0) & (rows <= 1)).all():
        raise ValueError(f"expected a row of scores from 0 to 1; got the shape {rows.shape}")
    if is_right_or_wrong(rows):
        return proportion(rows == 1)
    mean = float(rows.mean())
    spread = float(np.std(rows, ddof=1)) if rows.size > 1 else 0.0
    if spread == 0:
        return Estimate(mean, 0.0 if rows.size > 1 else 0.5, _wilson(mean, rows.size), rows.size)
    stderr = spread / float(np.sqrt(rows.size))
    half = stderr * float(stats.t.ppf((1 + CONFIDENCE) / 2, rows.size - 1))
    return Estimate(mean, stderr, (max(0.0, mean - half), min(1.0, mean + half)), rows.size)


def _wilson(share: float, rows: int) -> tuple[float, float]:
    """Wilson's interval (1927) of a share that need not be a whole number of rows."""
    z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))
    scale = 1 + z**2 / rows
    centre = (share + z**2 / (2 * rows)) / scale
    half = z / scale * float(np.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2)))
    return centre - half, centre + half


def paired_test(
    ours: npt.ArrayLike, baseline: npt.ArrayLike, baseline_name: str, metric: str
) -> PairedTest:
    """Compares two methods on the same rows.

    The p-value is that of the exact McNemar test (McNemar 1947): of the rows that just one of the
    two answered rightly, is either's share far from one half? It is 1 where there is no such row.
    The interval is that of the bootstrap over rows and may disagree with the p-value in small
    samples; claims rest on the p-value.

    Args:
        ours: whether each row was answered rightly, (rows,) booleans.
        baseline: the same for the baseline, (rows,) booleans.
        baseline_name: how the record names the baseline.
        metric: how the record names the metric.

    Raises:
        ValueError: the two differ in length, or are not booleans in one dimension.
    """
    wins, losses, rows = count_disagreements(ours, baseline)
    differing = wins + losses
    return PairedTest(
        baseline=baseline_name,
        metric=metric,
        difference=(wins - losses) / rows,
        interval=difference_interval(wins, losses, rows),
        p_value=float(stats.binomtest(wins, differing).pvalue) if differing else 1.0,
        test=TEST if differing else TEST_ALL_AGREE,
        rows=rows,
    )


def count_disagreements(ours: npt.ArrayLike, baseline: npt.ArrayLike) -> tuple[int, int, int]:
    """How many rows only ours has right, how many only the baseline, and how many there are.

    Raises:
        ValueError: the two differ in length, or are not booleans in one dimension.
    """
    left, right = as_flags(ours), as_flags(baseline)
    if left.size != right.size:
        raise ValueError(f"{left.size} rows cannot be paired with {right.size}")
    return int((left & ~right).sum()), int((right & ~left).sum()), left.size


def difference_interval(wins: int, losses: int, rows: int) -> tuple[float, float]:
    """The 95 % percentile interval of the paired bootstrap for (wins - losses) / rows.

    Where no row differs, the bootstrap knows of no uncertainty and would give (0, 0). The
    difference is then bounded by the share of rows that differ, and that share by the exact
    binomial bound (about 3 / rows), to either side.

    Args:
        wins: rows that only ours has right.
        losses: rows that only the baseline has right.
        rows: all rows, at least 1 and at least wins + losses.
    """
    if wins + losses == 0:
        bound = differing_share_bound(0, rows)
        return -bound, bound
    tail = (1 - CONFIDENCE) / 2
    masses = difference_masses(wins, losses, rows)
    low = int(np.argmax(np.cumsum(masses) >= tail)) - rows
    high = rows - int(np.argmax(np.cumsum(masses[::-1]) >= tail))
    return low / rows, high / rows


def differing_share_bound(differing: int, rows: int) -> float:
    """The upper bound at 95 % of the share of rows that differ (Clopper and Pearson 1934).

    No difference in means is larger than the share of rows that differ, so it bounds that too.
    """
    if differing == rows:
        return 1.0
    return float(stats.beta.ppf(CONFIDENCE, differing + 1, rows - differing))


def difference_masses(wins: int, losses: int, rows: int) -> Rows:
    """The distribution of the paired bootstrap: the chance of -rows, ..., rows more wins than
    losses in a resample, (2 rows + 1,).

    A resampled row adds 1, -1 or 0 to the difference, so the distribution that drawing resamples
    would only approximate is the `rows`-fold convolution of a distribution on three points. It is
    computed whole, by the Fourier transform: no seed, and no noise from the drawing.

    Args:
        wins: rows that only ours has right.
        losses: rows that only the baseline has right.
        rows: all rows, at least 1 and at least wins + losses.
    """
    one_row = np.zeros(2 * rows + 1)
    one_row[[0, 1, 2]] = losses / rows, 1 - (wins + losses) / rows, wins / rows
    # Index k of the convolution is the sum k - rows; its 2 rows + 1 values fit without wrapping.
    return np.fft.irfft(np.fft.rfft(one_row) ** rows, n=2 * rows + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values for being a family (Holm 1979); the order is kept.

    Rejecting where the adjusted value is below alpha keeps the chance of any false rejection
    below alpha, whatever the dependence between the tests.

    Args:
        p_values: each in [0, 1].
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    ascending = sorted(range(len(p_values)), key=p_values.__getitem__)
    for passed, index in enumerate(ascending):
        largest = max(largest, min(1.0, (len(p_values) - passed) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def few_rows_warning(rows: int) -> str | None:
    """The sentence to show where there are too few rows for any claim, else None."""
    if rows >= MIN_ROWS:
        return None
    counted = "1 test row is" if rows == 1 else f"{rows} test rows are"
    return f"{counted} too few for a claim; at least {MIN_ROWS} are needed"


def as_flags(correct: npt.ArrayLike) -> Correct:
    """The array as booleans.

    Raises:
        ValueError: it is empty, has more than one dimension or holds something else; scores
            between 0 and 1 would be rounded in silence.
    """
    flags = np.asarray(correct)
    if flags.ndim != 1 or flags.size == 0 or flags.dtype != np.bool_:
        raise ValueError(
            f"expected a row of booleans, one for each row of the task; got {flags.dtype} of "
            f"shape {flags.shape}"
        )
    return flags
