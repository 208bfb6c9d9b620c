"""Intervals, McNemar's test and Holm's correction against independent references."""

import itertools
import math
from fractions import Fraction
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recycle_cli.evaluation.statistics import (
    MIN_ROWS,
    TEST,
    TEST_ALL_AGREE,
    difference_interval,
    few_rows_warning,
    holm,
    paired_test,
    proportion,
)

FLAG_PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
COUNTS = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 30)).filter(any)


def split(pairs: list[tuple[bool, bool]]) -> tuple[list[bool], list[bool]]:
    return [ours for ours, _ in pairs], [baseline for _, baseline in pairs]


def outcomes(wins: int, losses: int, agreed: int) -> tuple[list[bool], list[bool]]:
    return split([(True, False)] * wins + [(False, True)] * losses + [(True, True)] * agreed)


# --- one proportion -------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "rows"), [(0, 40), (1, 2), (37, 100), (400, 400)])
def test_proportion_against_closed_forms(right: int, rows: int) -> None:
    estimate = proportion([True] * right + [False] * (rows - right))
    z = 1.959963984540054
    share = right / rows
    centre = (share + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = (z / (1 + z**2 / rows)) * math.sqrt(share * (1 - share) / rows + z**2 / (4 * rows**2))
    assert estimate.value == share
    assert estimate.rows == rows
    assert estimate.interval == pytest.approx((centre - half, centre + half), abs=1e-12)
    assert estimate.stderr == pytest.approx(math.sqrt(share * (1 - share) / (rows - 1)), abs=1e-12)


def test_standard_error_is_lm_evals() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    answers = [True, False, True, True, False, True, True]
    reference = metrics.mean_stderr([float(answer) for answer in answers])
    assert proportion(answers).stderr == pytest.approx(reference, abs=1e-15)


def test_a_single_row_is_as_uncertain_as_can_be() -> None:
    estimate = proportion([True])
    assert (estimate.value, estimate.stderr) == (1.0, 0.5)


@pytest.mark.parametrize("bad", [[], [1, 0, 1], [0.5, 1.0], [[True], [False]], True])
def test_only_a_row_of_booleans_is_taken(bad: object) -> None:
    with pytest.raises(ValueError, match="expected a row of booleans"):
        proportion(bad)  # type: ignore[arg-type]


# --- paired test ----------------------------------------------------------------------------------


def mcnemar_by_enumeration(wins: int, losses: int) -> float:
    """All 2^n ways the differing rows can fall, each as likely as the other."""
    differing = wins + losses
    at_least_as_far = sum(
        abs(2 * sum(fall) - differing) >= abs(wins - losses)
        for fall in itertools.product((0, 1), repeat=differing)
    )
    return float(at_least_as_far / 2**differing)


@pytest.mark.parametrize("wins", range(7))
@pytest.mark.parametrize("losses", range(7))
def test_p_value_against_enumeration(wins: int, losses: int) -> None:
    test = paired_test(*outcomes(wins, losses, 5), "base", "acc")
    assert test.p_value == pytest.approx(mcnemar_by_enumeration(wins, losses), abs=1e-12)
    assert test.difference == (wins - losses) / (wins + losses + 5)


def test_the_figures_of_a_known_case() -> None:
    test = paired_test(*outcomes(11, 3, 26), "target", "acc")
    assert (test.baseline, test.metric, test.test) == ("target", "acc", TEST)
    assert test.p_value == pytest.approx(0.057373046875)


def interval_by_counting(wins: int, losses: int, rows: int) -> tuple[float, float]:
    """The same interval in exact arithmetic, by convolving row after row."""
    masses = {0: Fraction(1)}
    shares = {1: Fraction(wins, rows), -1: Fraction(losses, rows)}
    shares[0] = 1 - shares[1] - shares[-1]
    for _ in range(rows):
        grown: dict[int, Fraction] = {}
        for total, mass in masses.items():
            for step, share in shares.items():
                grown[total + step] = grown.get(total + step, Fraction(0)) + mass * share
        masses = grown
    tail = Fraction(25, 1000)
    low = min(k for k in masses if sum(m for j, m in masses.items() if j <= k) >= tail)
    high = max(k for k in masses if sum(m for j, m in masses.items() if j >= k) >= tail)
    return low / rows, high / rows


@pytest.mark.parametrize(
    ("wins", "losses", "rows"),
    [(1, 0, 1), (1, 0, 9), (3, 0, 10), (4, 5, 12), (5, 2, 30), (6, 6, 12)],
)
def test_interval_against_exact_arithmetic(wins: int, losses: int, rows: int) -> None:
    assert difference_interval(wins, losses, rows) == interval_by_counting(wins, losses, rows)


def test_interval_against_drawn_resamples() -> None:
    ours, baseline = outcomes(40, 22, 338)
    drawn = stats.bootstrap(
        (np.array(ours, dtype=float), np.array(baseline, dtype=float)),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        batch=500,
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = paired_test(ours, baseline, "base", "acc").interval
    # One row is 1 / 400; drawing 4,000 resamples may be off by one.
    assert low == pytest.approx(drawn.low, abs=1.01 / 400)
    assert high == pytest.approx(drawn.high, abs=1.01 / 400)


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    draws = rng.multinomial(200, [0.15, 0.1, 0.75], size=400)
    held = [
        low <= 0.05 + 1e-12 and high >= 0.05 - 1e-12
        for low, high in (difference_interval(w, losses, 200) for w, losses, _ in draws.tolist())
    ]
    assert 0.91 < np.mean(held) < 0.985


def test_many_rows() -> None:
    low, high = difference_interval(9_000, 8_000, 100_000)
    half = 1.96 * math.sqrt(17_000 / 100_000 - 0.01**2) / math.sqrt(100_000)
    assert (low, high) == pytest.approx((0.01 - half, 0.01 + half), abs=3e-5)


@pytest.mark.parametrize("rows", [1, 20, 400])
def test_no_differing_row_is_not_taken_for_certainty(rows: int) -> None:
    test = paired_test([True] * rows, [True] * rows, "base", "acc")
    assert (test.difference, test.p_value, test.test) == (0.0, 1.0, TEST_ALL_AGREE)
    low, high = test.interval
    assert low == -high
    # The share of differing rows at which seeing none has a chance of just 5 %.
    assert (1 - high) ** rows == pytest.approx(0.05)


@given(FLAG_PAIRS)
def test_swapping_negates_the_difference_and_keeps_p(pairs: list[tuple[bool, bool]]) -> None:
    ours, baseline = split(pairs)
    forth = paired_test(ours, baseline, "b", "acc")
    back = paired_test(baseline, ours, "a", "acc")
    assert back.difference == -forth.difference
    assert back.p_value == pytest.approx(forth.p_value, rel=1e-12)
    assert back.interval == (-forth.interval[1], -forth.interval[0])


@given(FLAG_PAIRS, st.randoms())
def test_the_order_of_the_rows_does_not_matter(
    pairs: list[tuple[bool, bool]], random: Random
) -> None:
    before = paired_test(*split(pairs), "b", "acc")
    random.shuffle(pairs)
    assert paired_test(*split(pairs), "b", "acc") == before


@given(COUNTS)
def test_interval_holds_the_difference(counts: tuple[int, int, int]) -> None:
    wins, losses, agreed = counts
    rows = sum(counts)
    low, high = difference_interval(wins, losses, rows)
    assert -1 <= low <= (wins - losses) / rows <= high <= 1
    if agreed + losses == 0:
        assert (low, high) == (1.0, 1.0)


def test_rows_must_pair() -> None:
    with pytest.raises(ValueError, match="2 rows cannot be paired with 3"):
        paired_test([True, False], [True, False, True], "base", "acc")


# --- Holm -----------------------------------------------------------------------------------------


def holm_by_closed_testing(p_values: list[float]) -> list[float]:
    """Holm is the closure of Bonferroni: the worst of all the families a test is a member of."""
    indices = range(len(p_values))
    families = [
        family
        for size in range(1, len(p_values) + 1)
        for family in itertools.combinations(indices, size)
    ]
    return [
        max(
            min(1.0, len(family) * min(p_values[member] for member in family))
            for family in families
            if index in family
        )
        for index in indices
    ]


@settings(max_examples=60)
@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_against_closed_testing(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(holm_by_closed_testing(p_values), abs=1e-15)


def test_holm_on_a_textbook_case() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.7]) == [0.7]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_few_rows_warning() -> None:
    assert few_rows_warning(MIN_ROWS) is None
    assert few_rows_warning(19) == "19 test rows are too few for a claim; at least 20 are needed"
    assert few_rows_warning(1) == "1 test row is too few for a claim; at least 20 are needed"
