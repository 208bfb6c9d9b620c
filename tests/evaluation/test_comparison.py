"""Comparisons over tasks and seeds, against scipy, enumeration and simulation."""

import itertools
import math
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recycle_cli.evaluation.comparison import (
    compare,
    equivalence,
    mean_over_tasks,
    moments,
    rows_needed,
    rows_needed_to_match,
    with_holm,
)
from recycle_cli.evaluation.sign_flips import task_sign_flips
from recycle_cli.evaluation.statistics import holm, mean_estimate, paired_test, proportion
from recycle_cli.records import PairedTest

Scores = dict[str, npt.NDArray[np.float64]]


def compared(ours: Scores, baseline: Scores, seed: int = 0, draws: int = 9_999) -> PairedTest:
    return compare(ours, baseline, baseline_name="target", metric="acc", seed=seed, draws=draws)


def answers(rng: np.random.Generator, tasks: int, seeds: int, rows: int, p: float = 0.6) -> Scores:
    return {
        f"task{number}": (rng.random((seeds, rows)) < p).astype(float) for number in range(tasks)
    }


# --- one task ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40,), (1, 40)])
def test_right_and_wrong_with_one_seed_is_mcnemars(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    ours, baseline = rng.random(40) < 0.8, rng.random(40) < 0.5
    test = compared({"t": ours.reshape(shape)}, {"t": baseline.reshape(shape)})
    assert test == paired_test(ours, baseline, "target", "acc")
    wins, losses = int((ours & ~baseline).sum()), int((baseline & ~ours).sum())
    assert test.p_value == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)
    assert (test.rows, test.tasks) == (40, 1)
    as_floats = compared({"t": ours.astype(float)}, {"t": baseline.astype(float)})
    assert as_floats == test


def test_a_base_model_repeated_for_every_seed_is_one_run() -> None:
    rng = np.random.default_rng(1)
    ours, base = rng.random((3, 50)) < 0.7, rng.random(50) < 0.5
    assert compared({"t": ours}, {"t": base}) == compared({"t": ours}, {"t": np.tile(base, (3, 1))})


def test_a_row_counts_once_however_many_seeds_answer_it() -> None:
    rng = np.random.default_rng(2)
    ours, baseline = rng.random(60) < 0.7, rng.random(60) < 0.5
    thrice = compared({"t": np.tile(ours, (3, 1))}, {"t": np.tile(baseline, (3, 1))})
    assert thrice == compared({"t": ours}, {"t": baseline})


def by_enumeration(tasks: list[npt.NDArray[np.float64]]) -> float:
    """All ways in which the rows of both methods can be swapped."""
    weights = np.concatenate([rows / rows.size for rows in tasks])
    swaps = np.array(list(itertools.product((-1, 1), repeat=weights.size)))
    return float(np.mean(np.abs(swaps @ weights) >= abs(weights.sum()) - 1e-12))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3).filter(lambda s: sum(s) <= 12),
    seeds=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_flips_of_rows_against_enumeration(sizes: list[int], seeds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours = {f"t{i}": rng.integers(0, 2, (seeds, n)).astype(float) for i, n in enumerate(sizes)}
    baseline = {f"t{i}": rng.integers(0, 2, n).astype(float) for i, n in enumerate(sizes)}
    differences = [ours[task].mean(axis=0) - baseline[task] for task in ours]
    test = compared(ours, baseline, draws=99)
    assert test.p_value == pytest.approx(by_enumeration(differences), abs=1e-12)
    assert test.difference == pytest.approx(np.mean([d.mean() for d in differences]), abs=1e-11)


def test_scores_of_any_kind_against_scipy() -> None:
    rng = np.random.default_rng(3)
    ours, baseline = rng.random((2, 80)), rng.random((1, 80)) * 0.85
    test = compared({"t": ours}, {"t": baseline})
    differences = ours.mean(axis=0) - baseline[0]
    reference = stats.permutation_test(
        (differences,),
        lambda d, axis: d.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9_999,
        rng=np.random.default_rng(4),
    )
    # Two Monte-Carlo estimates of a p near 0.03, each with a standard error of 0.0017.
    assert test.p_value == pytest.approx(reference.pvalue, abs=0.008)
    drawn = stats.bootstrap(
        (differences,), np.mean, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    assert test.interval == pytest.approx((drawn.low, drawn.high), abs=0.004)
    assert test.test == (
        "sign-flip test over rows, two-sided; percentile interval of the paired bootstrap"
    )


def test_no_differing_row_is_not_taken_for_certainty() -> None:
    same = {"a": np.full((2, 30), 0.5), "b": np.full((2, 50), 1.0)}
    test = compared(same, same)
    assert (test.difference, test.p_value) == (0.0, 1.0)
    # As if both tasks had the 30 rows of the smaller one.
    assert (1 - test.interval[1]) ** 60 == pytest.approx(0.05)
    assert test.test.endswith("no row differs, so the interval is the binomial bound")


# --- several tasks -------------------------------------------------------------------------------


def test_the_tests_name_what_they_flip() -> None:
    rng = np.random.default_rng(6)
    names = {
        tasks: compared(answers(rng, tasks, 2, 20), answers(rng, tasks, 1, 20), draws=99).test
        for tasks in (2, 5, 6, 17)
    }
    assert names[2].startswith("exact sign-flip test over rows, two-sided; percentile interval of")
    assert "sign-flip test over rows" in names[5]
    assert names[6].startswith("exact sign-flip test over tasks, two-sided; ")
    assert names[17].startswith("sign-flip test over tasks, two-sided; ")
    assert names[17].endswith("of the hierarchical bootstrap over tasks and their rows")


@pytest.mark.parametrize("tasks", [6, 9])
def test_flips_of_tasks_against_scipy(tasks: int) -> None:
    rng = np.random.default_rng(tasks)
    ours, baseline = answers(rng, tasks, 2, 40, 0.66), answers(rng, tasks, 2, 40)
    means = np.array([ours[task].mean() - baseline[task].mean() for task in ours])
    reference = stats.permutation_test(
        (means,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    test = compared(ours, baseline, draws=99)
    assert test.p_value == pytest.approx(reference.pvalue, abs=1e-12)
    assert (test.tasks, test.rows) == (tasks, 40 * tasks)


def minp_by_hand(differences: npt.NDArray[np.float64]) -> list[float]:
    """Westfall and Young's step-down adjustment, written out."""
    methods, tasks = differences.shape
    flips = list(itertools.product((1, -1), repeat=tasks))
    reach = [[abs(round(float(np.dot(f, d)), 9)) for d in differences] for f in flips]
    p = [
        [sum(other[m] >= own[m] for other in reach) / len(flips) for m in range(methods)]
        for own in reach
    ]
    observed = p[0]
    adjusted, floor, left = [0.0] * methods, 0.0, sorted(range(methods), key=observed.__getitem__)
    while left:
        first = left[0]
        share = sum(min(row[m] for m in left) <= observed[first] for row in p) / len(flips)
        floor = max(floor, share)
        adjusted[left.pop(0)] = floor
    return adjusted


@settings(max_examples=30, deadline=None)
@given(methods=st.integers(1, 4), tasks=st.integers(2, 6), seed=st.integers(0, 1000))
def test_joint_flips_against_westfall_and_young(methods: int, tasks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    differences = np.round(rng.normal(0.3, 1, (methods, tasks)), 2)
    p_values, adjusted = task_sign_flips(differences, 0)
    assert adjusted == pytest.approx(minp_by_hand(differences), abs=1e-12)
    # Never more than Holm's, which knows nothing of how the methods depend.
    assert all(a <= h + 1e-12 for a, h in zip(adjusted, holm(p_values), strict=True))


def test_holm_has_no_say_with_few_tasks() -> None:
    differences = np.random.default_rng(0).uniform(0.01, 0.1, (10, 8))
    p_values, adjusted = task_sign_flips(differences, 0)
    assert p_values == [1 / 128] * 10
    assert adjusted == [1 / 128] * 10, "all flip together"
    assert min(holm(p_values)) > 0.05


# --- what must not matter -------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(tasks=st.integers(1, 7), seeds=st.integers(1, 3), seed=st.integers(0, 100))
def test_swapping_negates_the_difference_and_keeps_p(tasks: int, seeds: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ours, baseline = answers(rng, tasks, seeds, 25), answers(rng, tasks, 1, 25)
    forth, back = compared(ours, baseline, draws=499), compared(baseline, ours, draws=499)
    assert back.difference == -forth.difference
    assert back.p_value == pytest.approx(forth.p_value, rel=1e-9)
    # The resamples are drawn in another order, so the ends agree but for their Monte-Carlo error.
    assert back.interval == pytest.approx((-forth.interval[1], -forth.interval[0]), abs=0.12)


@settings(max_examples=30, deadline=None)
@given(tasks=st.integers(1, 7), seed=st.integers(0, 100), random=st.randoms())
def test_orders_of_rows_seeds_and_tasks_do_not_matter(
    tasks: int, seed: int, random: Random
) -> None:
    rng = np.random.default_rng(seed)
    ours, baseline = answers(rng, tasks, 3, 25), answers(rng, tasks, 1, 25)
    before = compared(ours, baseline, draws=199)
    names = list(ours)
    random.shuffle(names)
    order = random.sample(range(25), 25)
    runs = random.sample(range(3), 3)
    again = compared(
        {task: ours[task][runs][:, order] for task in names},
        {task: baseline[task][:, order] for task in reversed(names)},
        draws=199,
    )
    assert again == before


@pytest.mark.parametrize(
    ("ours", "baseline", "message"),
    [
        ({}, {}, "scores on a task"),
        ({"a": [1, 0]}, {"a": [1, 0, 1]}, "2 rows cannot be paired with 3"),
        ({"a": [1, 0]}, {"b": [1, 0]}, "tasks a cannot be paired with b"),
        ({"a": [1, 2]}, {"a": [1, 0]}, "scores from 0 to 1"),
        ({"a": [1, math.nan]}, {"a": [1, 0]}, "scores from 0 to 1"),
        ({"a": [[[1]]]}, {"a": [1]}, r"shape \(seeds, rows\)"),
        ({"a": []}, {"a": []}, r"shape \(seeds, rows\)"),
    ],
)
def test_bad_scores(ours: Scores, baseline: Scores, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compared(ours, baseline)


# --- simulation ----------------------------------------------------------------------------------


def test_interval_over_rows_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(7)
    held = []
    for _ in range(400):
        hard = rng.random(150)  # some rows are hard for all seeds
        ours = (rng.random((3, 150)) < 0.25 + 0.5 * hard).astype(float)
        baseline = (rng.random((2, 150)) < 0.2 + 0.5 * hard).astype(float)
        low, high = compared({"t": ours}, {"t": baseline}, draws=499).interval
        held.append(low <= 0.05 <= high)
    # The Monte-Carlo standard error of a share of 0.95 over 400 runs is 0.011.
    assert 0.925 <= np.mean(held) <= 0.975


@pytest.mark.parametrize(("between", "most"), [(0.1, 0.98), (0.0, 1.0)])
def test_interval_over_tasks_holds_the_truth_at_least_as_often(between: float, most: float) -> None:
    rng = np.random.default_rng(8)
    held = []
    for _ in range(400):
        effects = rng.normal(0.05, between, 8)
        ours = {f"t{i}": rng.random((2, 150)) < 0.5 + e for i, e in enumerate(effects)}
        baseline = {task: rng.random((2, 150)) < 0.5 for task in ours}
        low, high = compared(ours, baseline, draws=499).interval
        held.append(low <= 0.05 <= high)
    # The standard error is 0.011. Where tasks do not differ the interval is too wide, as it says.
    assert 0.925 <= np.mean(held) <= most


@pytest.mark.parametrize("tasks", [1, 3, 6])
def test_false_positives_are_no_more_than_alpha(tasks: int) -> None:
    rng = np.random.default_rng(9)
    p_values = []
    for _ in range(1000):
        hard = rng.random((tasks, 40))
        ours = {f"t{i}": rng.random((2, 40)) < h for i, h in enumerate(hard)}
        baseline = {f"t{i}": rng.random((2, 40)) < h for i, h in enumerate(hard)}
        p_values.append(compared(ours, baseline, draws=199).p_value)
    # The standard error of 0.05 over 1,000 runs is 0.007.
    assert np.mean(np.array(p_values) <= 0.05) <= 0.05 + 2 * 0.007


def test_power_grows_with_rows_and_reaches_what_it_was_planned_for() -> None:
    rng = np.random.default_rng(10)
    wins, losses = 0.15, 0.07
    planned = rows_needed(wins - losses, wins + losses)
    assert planned is not None
    found = {}
    for rows in (planned // 4, planned // 2, planned):
        drawn = rng.multinomial(rows, [wins, losses, 1 - wins - losses], size=2000)
        p = stats.binom.cdf(drawn[:, :2].min(axis=1), drawn[:, :2].sum(axis=1), 0.5) * 2
        found[rows] = float(np.mean((p < 0.05) & (drawn[:, 0] > drawn[:, 1])))
    assert sorted(found.values()) == list(found.values())
    # The exact test is a little below its nominal power; the standard error is 0.009.
    assert 0.75 < found[planned] < 0.83


# --- equivalence ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("tasks", "seeds"), [(1, 1), (1, 2), (3, 1), (7, 2)])
def test_equivalence_is_the_interval_within_the_margin(tasks: int, seeds: int) -> None:
    rng = np.random.default_rng(11)
    agree = []
    for _ in range(30):
        ours = answers(rng, tasks, seeds, 300)
        changed = {task: a * (rng.random(a.shape) > 0.05) for task, a in ours.items()}
        found = equivalence(ours, changed, margin=0.05, draws=499)
        low, high = found.interval
        agree.append((found.p_value < 0.05) == (low > -0.05 and high < 0.05))
        if not agree[-1]:  # on the edge, where quantiles are interpolated and counts are not
            assert found.p_value == pytest.approx(0.05, abs=0.02)
    assert np.mean(agree) > 0.8


@pytest.mark.parametrize("rows", [100, 298, 299, 2000])
def test_equivalence_of_equals_takes_rows(rows: int) -> None:
    same = {"t": np.ones(rows)}
    found = equivalence(same, same, margin=0.01)
    assert found.p_value == pytest.approx(0.99**rows)
    assert (found.p_value < 0.05) == (rows >= 299) == (found.interval[1] < 0.01)
    assert rows_needed_to_match(0.0, 0.01) == 299


@pytest.mark.parametrize(("rows", "margin"), [(400, 0.01), (400, 0.05), (2000, 0.01)])
def test_equivalence_is_seldom_found_at_the_margin(rows: int, margin: float) -> None:
    rng = np.random.default_rng(12)
    found = []
    for wins in rng.binomial(rows, margin, 400):  # the worst case: all that differ are wins
        ours = {"t": np.arange(rows) < wins}
        found.append(equivalence(ours, {"t": np.zeros(rows)}, margin).p_value < 0.05)
    # The standard error of 0.05 over 400 runs is 0.011.
    assert np.mean(found) <= 0.05 + 2 * 0.011


def test_equivalence_is_found_with_the_rows_planned_for_it() -> None:
    rng = np.random.default_rng(13)
    rows = rows_needed_to_match(0.1, 0.03)
    found = []
    for _ in range(300):
        signs = rng.choice([0.0, 0.5, 1.0], p=[0.05, 0.9, 0.05], size=rows)
        found.append(equivalence({"t": signs == 1}, {"t": signs == 0}, 0.03).p_value < 0.05)
    # The standard error of 0.8 over 300 runs is 0.023.
    assert 0.74 < np.mean(found) < 0.87


def test_a_margin_has_to_be_one() -> None:
    with pytest.raises(ValueError, match="margin 0 is not between"):
        equivalence({"t": [1]}, {"t": [1]}, margin=0)


# --- power, means, families ----------------------------------------------------------------------


def test_connors_formula() -> None:
    # Worked by hand: (1.95996 * sqrt(0.3) + 0.84162 * sqrt(0.3 - 0.01)) ** 2 / 0.01.
    assert rows_needed(0.1, 0.3) == 234
    assert rows_needed(-0.1, 0.3) == 234
    assert rows_needed(0.0, 0.3) is None


def test_moments_are_those_of_an_even_mixture() -> None:
    rows = np.array([1.0, -1.0, 1.0, 0.0])
    assert moments([rows]) == (0.25, 0.75)
    assert moments([rows, rows]) == (0.25, 0.75)
    assert moments([rows] * 6) == (0.25, 0.0625), "of tasks"


def test_mean_of_scores() -> None:
    flags = np.array([True, False, True])
    assert mean_estimate(flags) == mean_estimate(flags.astype(float)) == proportion(flags)
    scores = np.array([0.2, 0.5, 0.6, 0.9])
    estimate = mean_estimate(scores)
    reference = stats.ttest_1samp(scores, 0).confidence_interval(0.95)
    assert estimate.interval == pytest.approx((reference.low, 1.0)), "cut to what a score can be"
    assert reference.high > 1
    assert estimate.stderr == pytest.approx(stats.sem(scores))
    low, high = mean_estimate(np.full(10, 0.5)).interval
    assert 0 < low < 0.5 < high < 1
    assert mean_estimate([0.5]).stderr == 0.5
    with pytest.raises(ValueError, match="row of scores"):
        mean_estimate([1.5])


def test_mean_over_tasks() -> None:
    rng = np.random.default_rng(14)
    scores = answers(rng, 7, 3, 50)
    mean = mean_over_tasks(scores)
    assert mean.value == pytest.approx(np.mean([s.mean() for s in scores.values()]))
    assert mean.interval[0] < mean.value < mean.interval[1]
    assert mean.rows == 350
    assert mean_over_tasks({"a": scores["task0"]}) == mean_estimate(scores["task0"].mean(axis=0))


def test_a_family_is_adjusted_after_holm() -> None:
    rng = np.random.default_rng(15)
    tests = [compared(answers(rng, 1, 1, 60, p), answers(rng, 1, 1, 60)) for p in (0.6, 0.7, 0.9)]
    adjusted = with_holm(tests)
    assert [t.adjusted_p_value for t in adjusted] == holm([t.p_value for t in tests])
    assert [t.model_copy(update={"adjusted_p_value": None}) for t in adjusted] == tests
