"""Values, intervals and paired tests of metrics of every kind, against scipy."""

import numpy as np
import pytest
from scipy import stats

from recycle_cli.evaluation.comparison import compare
from recycle_cli.evaluation.row_scores import RowScores, compare_rows, estimate
from recycle_cli.evaluation.statistics import proportion

RNG = np.random.default_rng(7)
ROWS = 60
TOKENS = RNG.integers(1, 9, ROWS).astype(float)
NLL = RNG.gamma(2.0, 1.0, ROWS) * TOKENS
SHIFT = RNG.normal(0.4, 0.3, ROWS) * TOKENS
NAMED = {"baseline_name": "base", "metric": "m"}


def perplexity(nll: np.ndarray, tokens: np.ndarray) -> float:
    return float(np.exp(nll.sum() / tokens.sum()))


def test_perplexity_counts_tokens_and_not_rows() -> None:
    two = RowScores(np.array([1.0, 9.0]), np.array([1.0, 3.0]))
    assert two.mean() == pytest.approx(np.exp(10 / 4))


def test_intervals_are_those_of_scipys_bootstrap() -> None:
    found = estimate(RowScores(NLL, TOKENS))
    assert found.value == pytest.approx(perplexity(NLL, TOKENS))
    expected = stats.bootstrap(
        (NLL, TOKENS), lambda a, b, axis: np.exp(a.sum(axis) / b.sum(axis)), paired=True,
        vectorized=True, method="percentile", rng=np.random.default_rng(1),
    )  # fmt: skip
    assert found.stderr == pytest.approx(expected.standard_error, rel=0.05)
    interval = expected.confidence_interval
    assert found.interval == pytest.approx((interval.low, interval.high), rel=0.03)

    shares = RNG.random(ROWS)
    mean = estimate(RowScores(shares))
    expected = stats.bootstrap(
        (shares,), np.mean, method="percentile", rng=np.random.default_rng(1)
    )
    interval = expected.confidence_interval
    assert mean.interval == pytest.approx((interval.low, interval.high), abs=0.01)
    assert mean.stderr == pytest.approx(shares.std(ddof=1) / np.sqrt(ROWS), rel=0.05)


def test_right_and_wrong_answers_are_a_proportion() -> None:
    flags = RNG.random(ROWS) < 0.3
    assert estimate(RowScores(flags.astype(float))) == proportion(flags)
    other = RNG.random(ROWS) < 0.5
    test = compare_rows(RowScores(flags.astype(float)), RowScores(other.astype(float)), **NAMED)
    assert test == compare({"": flags}, {"": other}, **NAMED)
    assert "McNemar" in test.test


def test_scores_that_are_all_alike_still_have_an_interval() -> None:
    low, high = estimate(RowScores(np.full(30, 0.5))).interval
    assert low < 0.5 < high


def test_a_lower_perplexity_is_found_to_be_lower() -> None:
    ours, theirs = RowScores(NLL, TOKENS), RowScores(NLL + SHIFT, TOKENS)
    test = compare_rows(ours, theirs, **NAMED)
    assert test.difference == pytest.approx(
        perplexity(NLL, TOKENS) - perplexity(NLL + SHIFT, TOKENS)
    )
    assert test.difference < 0
    assert test.interval[0] < test.difference < test.interval[1] < 0
    assert test.p_value < 0.001
    back = compare_rows(theirs, ours, **NAMED)
    assert (back.difference, back.p_value) == (-test.difference, test.p_value)
    expected = stats.permutation_test(
        (NLL, NLL + SHIFT), lambda a, b, axis: (a - b).mean(axis), permutation_type="samples",
        vectorized=True, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert test.p_value == pytest.approx(expected.pvalue, abs=2e-3)


def test_p_values_agree_with_scipys_where_little_differs() -> None:
    noise = RNG.normal(0.1, 1.0, ROWS)
    ours, theirs = RowScores(NLL * 3), RowScores(NLL * 3 + noise)
    test = compare_rows(ours, theirs, **NAMED)
    expected = stats.permutation_test(
        (NLL * 3, NLL * 3 + noise), lambda a, b, axis: (a - b).mean(axis),
        permutation_type="samples", vectorized=True, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert test.p_value == pytest.approx(expected.pvalue, abs=0.02)


def test_the_same_scores_do_not_differ() -> None:
    test = compare_rows(RowScores(NLL, TOKENS), RowScores(NLL, TOKENS), **NAMED)
    assert (test.difference, test.p_value, test.interval) == (0, 1, (0, 0))


def test_false_positives_are_no_more_than_alpha() -> None:
    rng = np.random.default_rng(11)
    found = 0
    for _ in range(100):
        drawn = rng.gamma(2.0, 1.0, (2, 25))
        one, other = (RowScores(values, np.full(25, 3.0)) for values in drawn)
        found += compare_rows(one, other, **NAMED).p_value < 0.05
    assert found <= 12
