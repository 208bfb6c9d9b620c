"""Every verdict with its sentence, and what must hold of the figures behind it."""

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recycle_cli.evaluation.comparison import compare, equivalence
from recycle_cli.evaluation.statistics import holm
from recycle_cli.evaluation.verdict import ALPHA, Arm, Decision, Role, VerdictKind, decide

ROWS = 400
ARMS = [
    Arm("base", "the base model", Role.BASE),
    Arm("target", "the target LoRA", Role.TARGET),
    Arm("mix", "recycled adapters", Role.RECYCLED, "random mix"),
    Arm(
        "mix+target", "recycled adapters with the target LoRA", Role.RECYCLED, "random+target", True
    ),
    Arm("average", "the plain average", Role.RECYCLED),
    Arm("random mix", "random adapters", Role.CONTROL),
    Arm("random+target", "random adapters with the target LoRA", Role.CONTROL, has_target=True),
    Arm("rescaled", "the target LoRA rescaled alone", Role.RESCALED, has_target=True),
    Arm("single", "the adapter chosen first, as it is", Role.SINGLE),
]
LABELS = {arm.name: arm.label for arm in ARMS}
RECYCLED = [arm.name for arm in ARMS if arm.role is Role.RECYCLED]
CONTROLS = {arm.name: arm.control for arm in ARMS if arm.control}


def first(right: int, rows: int = ROWS) -> npt.NDArray[np.bool_]:
    """The first rows right, the others wrong: of two such arms, one wins every differing row.

    So the exact p-value of a difference of d rows is 2 ** (1 - d): 0.031 at 6 and 0.0078 at 8.
    """
    return np.arange(rows) < right


def judged(right: dict[str, int], rows: int = ROWS, examples: int = 100) -> Decision:
    scores = {name: {"mail": first(number, rows)} for name, number in right.items()}
    arms = [arm for arm in ARMS if arm.name in right]
    return decide(scores, arms, metric="acc", examples=examples, relevance={"mail": "lab/mail"})


USUAL = {"base": 200, "target": 320, "random+target": 322}
ALONE = {"base": 200, "target": 320, "random mix": 220}


@pytest.mark.parametrize(
    ("right", "kind", "sentence"),
    [
        (
            {**USUAL, "mix+target": 332},
            VerdictKind.BEATS_TARGET,
            "Recycling beats your own LoRA, by more than random adapters do: 83.0 % for recycled "
            "adapters with the target LoRA against 80.0 % for a LoRA trained on the same 100 "
            "examples (difference 3.0 points, 95 % interval 1.5 to 4.8, p < 0.001, 400 test rows); "
            "random adapters with the target LoRA reached 80.5 % (difference 2.5 points, 95 % "
            "interval 1.0 to 4.2, p = 0.002); whether rescaling that LoRA alone would do as well "
            "was not tried.",
        ),
        (
            {**USUAL, "mix+target": 340, "rescaled": 328},
            VerdictKind.BEATS_TARGET,
            "Recycling beats your own LoRA, by more than random adapters do: 85.0 % for recycled "
            "adapters with the target LoRA against 80.0 % for a LoRA trained on the same 100 "
            "examples (difference 5.0 points, 95 % interval 3.0 to 7.2, p < 0.001, 400 test rows); "
            "random adapters with the target LoRA reached 80.5 % (difference 4.5 points, 95 % "
            "interval 2.5 to 6.8, p < 0.001); the target LoRA rescaled alone reached 82.0 % "
            "(difference 3.0 points, 95 % interval 1.5 to 4.8, p < 0.001).",
        ),
        (
            {**USUAL, "mix+target": 328, "random+target": 329},
            VerdictKind.REGULARISATION,
            "Recycling beats your own LoRA, but not measurably more than random adapters do: "
            "82.0 % for recycled adapters with the target LoRA against 80.0 % for a LoRA trained "
            "on the same 100 examples (difference 2.0 points, 95 % interval 0.8 to 3.5, p = 0.008, "
            "400 test rows); random adapters with the target LoRA reached 82.2 % (difference -0.2 "
            "points, 95 % interval -0.8 to 0.0, p = 1.00).",
        ),
        (
            {**USUAL, "mix+target": 332, "rescaled": 330},
            VerdictKind.RESCALING,
            "Recycling beats your own LoRA, but not measurably more than rescaling that LoRA alone "
            "does: 83.0 % for recycled adapters with the target LoRA against 80.0 % for a LoRA "
            "trained on the same 100 examples (difference 3.0 points, 95 % interval 1.5 to 4.8, "
            "p < 0.001, 400 test rows); the target LoRA rescaled alone reached 82.5 % (difference "
            "0.5 points, 95 % interval 0.0 to 1.2, p = 0.50).",
        ),
        (
            {"base": 200, "target": 320, "mix+target": 332, "random mix": 250},
            VerdictKind.NO_CONTROL,
            "Recycling beats your own LoRA, but whether random adapters would do as well is not "
            "known, since none were scored that were made in the same way: 83.0 % for recycled "
            "adapters with the target LoRA against 80.0 % for a LoRA trained on the same 100 "
            "examples (difference 3.0 points, 95 % interval 1.5 to 4.8, p < 0.001, 400 test rows).",
        ),
        (
            {**ALONE, "mix": 308},
            VerdictKind.WORSE_THAN_TARGET,
            "Your own LoRA is better than recycling: 77.0 % for recycled adapters against 80.0 % "
            "for a LoRA trained on the same 100 examples (difference -3.0 points, 95 % interval "
            "-4.8 to -1.5, p < 0.001, 400 test rows); the base model alone reached 50.0 % "
            "(difference 27.0 points, 95 % interval 22.8 to 31.5, p < 0.001).",
        ),
        (
            {**ALONE, "mix": 320},
            VerdictKind.MATCHES_TARGET,
            "Recycling does as well as your own LoRA, to within 1.0 points: 80.0 % for recycled "
            "adapters against 80.0 % for a LoRA trained on the same 100 examples (difference 0.0 "
            "points, 90 % interval -0.7 to 0.7, p = 0.018 for lying within 1.0 points, 400 test "
            "rows); the base model alone reached 50.0 % (difference 30.0 points, 95 % interval "
            "25.5 to 34.5, p < 0.001); random adapters reached 55.0 % (difference 25.0 points, "
            "95 % interval 20.8 to 29.2, p < 0.001).",
        ),
        (
            {"base": 318, "target": 320, "average": 320},
            VerdictKind.MATCHES_TARGET,
            "Recycling does as well as your own LoRA, to within 1.0 points, but neither is "
            "measurably better than the base model: 80.0 % for the plain average against 80.0 % "
            "for a LoRA trained on the same 100 examples (difference 0.0 points, 90 % interval "
            "-0.7 to 0.7, p = 0.018 for lying within 1.0 points, 400 test rows); the base model "
            "alone reached 79.5 % (difference 0.5 points, 95 % interval 0.0 to 1.2, p = 0.50).",
        ),
        (
            {**ALONE, "mix": 316},
            VerdictKind.HELPS_OVER_BASE,
            "Recycling helps over the base model, by more than random adapters do, but whether it "
            "does better or worse than your own LoRA is open: 79.0 % for recycled adapters against "
            "50.0 % for the base model (difference 29.0 points, 95 % interval 24.5 to 33.5, "
            "p < 0.001, 400 test rows); random adapters reached 55.0 % (difference 24.0 points, "
            "95 % interval 20.0 to 28.2, p < 0.001); the target LoRA reached 80.0 % (difference "
            "-1.0 points, 95 % interval -2.0 to -0.2, p = 0.12); about 783 test rows would show a "
            "difference of this size, about 857 that there is none of 1.0 points or more, 4 times "
            "in 5.",
        ),
        (
            {**ALONE, "mix": 316, "random mix": 317},
            VerdictKind.REGULARISATION,
            "Recycling helps over the base model, but not measurably more than random adapters do: "
            "79.0 % for recycled adapters against 50.0 % for the base model (difference 29.0 "
            "points, 95 % interval 24.5 to 33.5, p < 0.001, 400 test rows); random adapters "
            "reached 79.2 % (difference -0.2 points, 95 % interval -0.8 to 0.0, p = 1.00); the "
            "target LoRA reached 80.0 % (difference -1.0 points, 95 % interval -2.0 to -0.2, "
            "p = 0.12); about 783 test rows would show a difference of this size, about 857 that "
            "there is none of 1.0 points or more, 4 times in 5.",
        ),
        (
            {"base": 200, "target": 320, "average": 316},
            VerdictKind.NO_CONTROL,
            "Recycling helps over the base model, but whether random adapters would do as well is "
            "not known, since none were scored that were made in the same way: 79.0 % for the "
            "plain average against 50.0 % for the base model (difference 29.0 points, 95 % "
            "interval 24.5 to 33.5, p < 0.001, 400 test rows); the target LoRA reached 80.0 % "
            "(difference -1.0 points, 95 % interval -2.0 to -0.2, p = 0.12); about 783 test rows "
            "would show a difference of this size, about 857 that there is none of 1.0 points or "
            "more, 4 times in 5.",
        ),
        (
            {**USUAL, "mix+target": 316, "single": 290},
            VerdictKind.RELEVANT_ADAPTER,
            "The pool holds an adapter that is close to your task: lab/mail reaches 72.5 % on mail "
            "as it is, more than half of the way from the base model's 50.0 % to the 80.0 % of a "
            "LoRA trained on the same 100 examples (beyond half-way by: difference 7.5 points, "
            "95 % interval 4.9 to 10.1, p < 0.001, 400 test rows).",
        ),
        (
            {**USUAL, "mix+target": 316},
            VerdictKind.TOO_FEW_ROWS,
            "Too little was scored to say whether recycling helps: 79.0 % for recycled adapters "
            "with the target LoRA against 80.0 % for a LoRA trained on the same 100 examples "
            "(difference -1.0 points, 95 % interval -2.0 to -0.2, p = 0.12, 400 test rows); the "
            "base model alone reached 50.0 % (difference 29.0 points, 95 % interval 24.5 to 33.5, "
            "p < 0.001); about 783 test rows would show a difference of this size, about 857 that "
            "there is none of 1.0 points or more, 4 times in 5.",
        ),
        (
            {"target": 320, "mix": 332},
            VerdictKind.INCOMPLETE,
            "No verdict: the base model was not scored.",
        ),
        (
            {"single": 300},
            VerdictKind.INCOMPLETE,
            "No verdict: the base model, the target LoRA and a recycled arm were not scored.",
        ),
    ],
)
def test_every_kind_with_its_sentence(
    right: dict[str, int], kind: VerdictKind, sentence: str
) -> None:
    verdict = judged(right).verdict
    assert verdict.kind == kind
    assert verdict.sentence == sentence
    about = verdict.method and LABELS[verdict.method]
    assert about is None or f" {about} " in sentence
    assert (about is None) == (kind in (VerdictKind.INCOMPLETE, VerdictKind.RELEVANT_ADAPTER))


def test_no_gain() -> None:
    verdict = judged({"base": 1200, "target": 1200, "average": 1201}, rows=2000).verdict
    assert verdict.kind == VerdictKind.NO_GAIN
    assert verdict.sentence == (
        "Recycling gains less than 1.0 points over the base model: 60.1 % for the plain average "
        "against 60.0 % for the base model (difference 0.1 points, 95 % interval 0.0 to 0.1, "
        "p = 1.00, 2,000 test rows); the target LoRA reached 60.0 % (difference 0.1 points, 95 % "
        "interval 0.0 to 0.1, p = 1.00)."
    )


def test_too_few_rows() -> None:
    right = {"base": 0, "target": 5, "mix": 19, "random mix": 5}
    verdict = judged(right, rows=19).verdict
    assert verdict.kind == VerdictKind.TOO_FEW_ROWS
    assert verdict.sentence == (
        "No verdict: 19 test rows are too few for a claim; at least 20 are needed "
        "(base 0.0 %, target 26.3 %, mix 100.0 %, random mix 26.3 %)."
    )
    assert judged(right, rows=20).verdict.kind == VerdictKind.BEATS_TARGET


def test_nothing_at_all() -> None:
    decision = decide({}, ARMS, metric="acc", examples=10)
    assert decision.verdict.kind == VerdictKind.INCOMPLETE
    assert (decision.tests, decision.verdict.notes) == ({}, [])


def test_no_difference_says_what_would_show_that_there_is_none() -> None:
    rows = np.arange(ROWS)
    even = {"base": rows < 100, "target": rows < 300, "mix+target": (rows >= 20) & (rows < 320)}
    scores = {name: {"mail": flags} for name, flags in even.items()}
    arms = [arm for arm in ARMS if arm.name in scores]
    verdict = decide(scores, arms, metric="acc", examples=1).verdict
    assert verdict.kind == VerdictKind.TOO_FEW_ROWS
    assert "the same 1 example (difference 0.0 points" in verdict.sentence
    assert verdict.sentence.endswith(
        "; about 8,564 test rows would show that there is no difference of 1.0 points or more, "
        "4 times in 5."
    )


# --- several tasks -------------------------------------------------------------------------------


def over_tasks(right: dict[str, int], tasks: int, rows: int = 100) -> Decision:
    """Arms that are right on the first rows of each task, a few more on each task than on the last
    one; two runs of all but the base model."""
    scores = {
        name: {f"task{i}": np.tile(first(number + i, rows), (2, 1)) for i in range(tasks)}
        for name, number in right.items()
    }
    scores["base"] = {task: runs[0] for task, runs in scores["base"].items()}
    arms = [arm for arm in ARMS if arm.name in right]
    return decide(scores, arms, metric="acc", examples=80, draws=999)


def test_few_tasks_speak_of_their_rows() -> None:
    decision = over_tasks({**USUAL_TASKS, "mix+target": 86}, 3)
    assert decision.verdict.kind == VerdictKind.BEATS_TARGET
    assert "p < 0.001, 300 test rows of these 3 tasks)" in decision.verdict.sentence
    assert decision.verdict.notes == [
        "This speaks of the adapters that were made here, on rows like those of these 3 tasks; "
        "other tasks and other random seeds may differ. To speak of those takes 6 tasks."
    ]


def test_many_tasks_speak_of_tasks_like_these() -> None:
    decision = over_tasks({**USUAL_TASKS, "mix+target": 86}, 8)
    assert decision.verdict.kind == VerdictKind.BEATS_TARGET
    assert "p = 0.008, 800 test rows of 8 tasks)" in decision.verdict.sentence
    assert decision.verdict.notes == [
        "This speaks of tasks like these 8 and of adapters trained anew: the tasks' differences "
        "are what varies."
    ]


USUAL_TASKS = {"base": 40, "target": 80, "random+target": 80}


def test_many_arms_on_a_few_tasks_can_still_earn_a_claim() -> None:
    twins = [
        Arm(f"mix{i}", f"recycled adapters {i}", Role.RECYCLED, "random mix") for i in range(12)
    ]
    rng = np.random.default_rng(0)
    right = {"base": 0.3, "target": 0.6, "random mix": 0.3, **{arm.name: 0.9 for arm in twins}}
    scores = {
        name: {f"task{i}": rng.random(60) < share for i in range(8)}
        for name, share in right.items()
    }
    arms = [arm for arm in ARMS if arm.name in right] + twins
    decision = decide(scores, arms, metric="acc", examples=80, draws=99)
    assert decision.verdict.kind == VerdictKind.BEATS_TARGET
    assert decision.tests["mix0", "target"].adjusted_p_value == 1 / 128


def test_undecided_tasks_ask_for_tasks() -> None:
    rng = np.random.default_rng(1)
    shares = {"base": 0.3, "target": 0.6, "mix+target": 0.6}
    scores = {n: {f"t{i}": rng.random(60) < p for i in range(6)} for n, p in shares.items()}
    arms = [arm for arm in ARMS if arm.name in scores]
    verdict = decide(scores, arms, metric="acc", examples=80, draws=99).verdict
    assert verdict.kind == VerdictKind.TOO_FEW_ROWS
    assert " tasks would show a difference of this size, about " in verdict.sentence


# --- which comparison decides ---------------------------------------------------------------------


def test_trying_two_arms_costs_something() -> None:
    # A difference of 6 rows has p = 0.031: enough alone, not enough as one of two.
    alone = {"base": 200, "target": 320, "random+target": 320, "mix+target": 326}
    assert judged(alone).verdict.kind == VerdictKind.BEATS_TARGET
    decision = judged({**alone, "mix": 317, "random mix": 220})
    assert decision.tests["mix+target", "target"].p_value == 0.03125
    assert decision.tests["mix+target", "target"].adjusted_p_value == 0.0625
    assert decision.verdict.kind == VerdictKind.HELPS_OVER_BASE
    assert "the target LoRA reached 80.0 % (difference -0.8 points" in decision.verdict.sentence
    assert ", adjusted p = 0.25)" in decision.verdict.sentence
    assert (
        "2 ways to recycle were compared (mix+target and mix); p-values allow for that."
        in decision.verdict.notes
    )


def test_the_target_lora_must_stand_on_both_sides() -> None:
    # Random adapters without the target LoRA are easily beaten by anything that holds it.
    weak = {"base": 200, "target": 320, "random mix": 210, "mix+target": 340}
    assert judged(weak).verdict.kind == VerdictKind.NO_CONTROL
    assert judged({**weak, "random+target": 338}).verdict.kind == VerdictKind.REGULARISATION
    assert judged({**weak, "random+target": 325}).verdict.kind == VerdictKind.BEATS_TARGET
    arms = [
        Arm("mix+target", "a", Role.RECYCLED, "random mix", has_target=True),
        Arm("random mix", "b", Role.CONTROL),
    ]
    with pytest.raises(ValueError, match="random mix is no control of mix"):
        decide({}, arms, metric="acc", examples=1)


def test_what_an_arm_owes_to_its_target_lora_is_not_counted_as_recycling() -> None:
    right = {"base": 200, "target": 320, "mix+target": 316, "random+target": 250}
    assert judged(right).verdict.kind == VerdictKind.TOO_FEW_ROWS


def test_random_adapters_are_named_before_rescaling() -> None:
    right = {**USUAL, "mix+target": 340, "random+target": 338, "rescaled": 341}
    verdict = judged(right).verdict
    assert verdict.kind == VerdictKind.REGULARISATION
    assert "random adapters with the target LoRA reached 84.5 %" in verdict.sentence


def test_the_arm_with_the_stronger_claim_is_named() -> None:
    right = {"base": 100, "target": 300, "random mix": 200, "random+target": 200}
    scores = {name: {"mail": first(number)} for name, number in right.items()}
    scores["rescaled"] = {"mail": first(320)}
    # Ahead of the rescaled LoRA by 12 rows to 0, and by 60 to 44: the second scores higher, but
    # it alone might owe that to chance.
    scores["mix"] = {"mail": first(332)}
    scores["mix+target"] = {"mail": first(380) & ~first(44)}
    verdict = decide(scores, ARMS, metric="acc", examples=100).verdict
    assert verdict.kind == VerdictKind.BEATS_TARGET
    assert "83.0 % for recycled adapters against 75.0 %" in verdict.sentence
    assert "Not compared, since not all of it could be scored: average and single." in verdict.notes
    del scores["mix"]
    assert decide(scores, ARMS, metric="acc", examples=1).verdict.kind == VerdictKind.RESCALING


def test_worse_takes_all_arms() -> None:
    right = {"base": 200, "target": 320, "mix": 280, "mix+target": 316}
    verdict = judged(right).verdict
    assert verdict.kind == VerdictKind.TOO_FEW_ROWS
    assert "79.0 % for recycled adapters with the target LoRA" in verdict.sentence
    assert judged({**right, "mix+target": 300}).verdict.kind == VerdictKind.WORSE_THAN_TARGET


def test_a_match_without_the_target_lora_is_named_first() -> None:
    right = {"base": 1000, "target": 1600, "mix": 1602, "mix+target": 1600}
    verdict = judged(right, rows=2000).verdict
    assert verdict.kind == VerdictKind.MATCHES_TARGET
    assert "80.1 % for recycled adapters against" in verdict.sentence
    assert "adjusted p < 0.001 for lying within 1.0 points" in verdict.sentence


def test_a_relevant_adapter_stands_beside_a_claim_about_the_target() -> None:
    verdict = judged({**USUAL, "mix+target": 332, "single": 290}).verdict
    assert verdict.kind == VerdictKind.BEATS_TARGET
    assert verdict.notes[-1].startswith(
        "The pool holds an adapter that is close to a task: lab/mail reaches 72.5 % on mail"
    )
    assert verdict.figures["difference.single.mail"] == pytest.approx(0.075)


def test_of_several_tasks_the_one_that_an_adapter_is_close_to_is_named() -> None:
    right = {**USUAL, "mix+target": 318, "single": 200}
    scores = {name: {"mail": first(n), "news": first(n)} for name, n in right.items()}
    scores["single"]["mail"] = first(290)
    arms = [arm for arm in ARMS if arm.name in scores]
    found = decide(scores, arms, metric="acc", examples=100, relevance={"mail": "lab/mail"})
    claim = "The pool holds an adapter that is close to mail: lab/mail reaches"
    assert found.verdict.sentence.startswith(claim)


@pytest.mark.parametrize(
    ("right", "why"),
    [
        ({"single": 262}, "2 rows in 400 beyond half-way might be chance"),
        ({"single": 400, "base": 320}, "half of no way is no way"),
    ],
)
def test_an_adapter_that_is_not_clearly_past_half_way(right: dict[str, int], why: str) -> None:
    found = judged({**USUAL, "mix+target": 316, **right}).verdict
    assert found.kind != VerdictKind.RELEVANT_ADAPTER, why
    assert not any("close to" in note for note in found.notes)


# --- the figures ----------------------------------------------------------------------------------


def test_tests_and_figures_are_those_of_the_scores() -> None:
    rng = np.random.default_rng(0)
    scores = {
        arm.name: {"a": rng.random((2, 90)) < 0.4 + 0.05 * i, "b": rng.random((2, 30)) < 0.5}
        for i, arm in enumerate(ARMS)
    }
    decision = decide(scores, ARMS, metric="exact_match", examples=50, margin=0.02, draws=199)
    expected = {(name, b) for b in ("base", "target") for name in scores if name != b}
    expected |= set(CONTROLS.items()) | {(name, "rescaled") for name in RECYCLED}
    assert set(decision.tests) == expected
    plain = {"adjusted_p_value": None, "equivalence_p_value": None, "margin": None}
    for (name, baseline), test in decision.tests.items():
        raw = compare(
            scores[name],
            scores[baseline],
            baseline_name=baseline,
            metric="exact_match",
            draws=199,
        )
        assert test.model_copy(update=plain) == raw
    figures = decision.verdict.figures
    assert (figures["rows"], figures["tasks"], figures["examples"]) == (120, 2, 50)
    for baseline in ("base", "target", "rescaled"):
        family = [decision.tests[name, baseline] for name in RECYCLED]
        adjusted = holm([test.p_value for test in family])
        assert [test.adjusted_p_value for test in family] == adjusted
        for name, value in zip(RECYCLED, adjusted, strict=True):
            assert figures[f"adjusted_p_value.{name}.{baseline}"] == value
    found = [equivalence(scores[n], scores["target"], 0.02, draws=199).p_value for n in RECYCLED]
    assert [decision.tests[n, "target"].equivalence_p_value for n in RECYCLED] == found
    assert {decision.tests[n, "target"].margin for n in RECYCLED} == {0.02}


def significant(figures: dict[str, float], name: str, baseline: str, sign: int) -> bool:
    pair = f"{name}.{baseline}"
    return figures[f"adjusted_p_value.{pair}"] < ALPHA and figures[f"difference.{pair}"] * sign > 0


@settings(max_examples=100, deadline=None)
@given(
    right=st.dictionaries(
        st.sampled_from([arm.name for arm in ARMS]), st.integers(20, 40), min_size=4
    ).filter(lambda right: {"base", "target"} <= set(right) and set(RECYCLED) & set(right)),
    seed=st.integers(0, 3),
    tasks=st.sampled_from([1, 2]),
)
def test_the_kind_follows_from_the_figures(right: dict[str, int], seed: int, tasks: int) -> None:
    rng = np.random.default_rng(seed)
    noise = rng.random(40) < 0.1
    scores = {
        name: {f"t{i}": first(number, 40) ^ (noise & (rng.random(40) < 0.5)) for i in range(tasks)}
        for name, number in right.items()
    }
    verdict = decide(scores, ARMS, metric="acc", examples=100, draws=99).verdict
    figures, kind = verdict.figures, verdict.kind
    recycled = [name for name in RECYCLED if name in right]
    winners = [name for name in recycled if significant(figures, name, "target", 1)]
    proven = [
        name
        for name in winners
        if CONTROLS.get(name) in right
        and significant(figures, name, str(CONTROLS[name]), 1)
        and ("rescaled" not in right or significant(figures, name, "rescaled", 1))
    ]
    assert (kind == VerdictKind.BEATS_TARGET) == bool(proven)
    if kind == VerdictKind.RESCALING:
        assert winners and "rescaled" in right
    if kind in (
        VerdictKind.MATCHES_TARGET,
        VerdictKind.WORSE_THAN_TARGET,
        VerdictKind.RELEVANT_ADAPTER,
        VerdictKind.HELPS_OVER_BASE,
        VerdictKind.NO_GAIN,
        VerdictKind.TOO_FEW_ROWS,
    ):
        assert not winners
    if kind == VerdictKind.WORSE_THAN_TARGET:
        best = max(recycled, key=lambda name: figures[f"accuracy.{name}"])
        assert significant(figures, best, "target", -1)
    if kind == VerdictKind.HELPS_OVER_BASE:
        assert any(significant(figures, name, "base", 1) for name in recycled)
    assert verdict.sentence.endswith(".")


def test_scores_must_match() -> None:
    scores = {"base": {"a": first(3, 30)}, "target": {"a": first(3, 31)}}
    with pytest.raises(ValueError, match="31 rows cannot be paired with 30"):
        decide(scores, ARMS, metric="acc", examples=1)
    with pytest.raises(ValueError, match="tasks b cannot be paired with a"):
        decide(
            {"base": {"a": [1]}, "target": {"b": [1]}, "mix": {"a": [1]}},
            ARMS,
            metric="acc",
            examples=1,
        )
    with pytest.raises(ValueError, match="scores of oracle, which are no arms"):
        decide({"oracle": {"a": [1]}}, ARMS, metric="acc", examples=1)


# --- simulated studies ----------------------------------------------------------------------------

SIMULATED = [
    Arm("base", "the base model", Role.BASE),
    Arm("target", "the target LoRA", Role.TARGET),
    Arm("mix", "recycled adapters", Role.RECYCLED, "random mix"),
    Arm("other mix", "other recycled adapters", Role.RECYCLED, "random mix"),
    Arm("random mix", "random adapters", Role.CONTROL),
]
OVER_TARGET = {
    VerdictKind.BEATS_TARGET,
    VerdictKind.RESCALING,
    VerdictKind.REGULARISATION,
    VerdictKind.NO_CONTROL,
}


def simulated(
    rng: np.random.Generator, skills: dict[str, float], tasks: int, rows: int, noise: float
) -> VerdictKind:
    """The verdict on arms of given skills (log-odds), with two seeds each: rows are easier and
    harder for all, and a trained adapter is off by as much on all rows of its task."""
    ease = rng.normal(0.4, 1, (tasks, 1, rows))
    scores = {}
    for name, skill in skills.items():
        trained = rng.normal(skill, noise, (tasks, 2, 1))
        right = rng.random((tasks, 2, rows)) < 1 / (1 + np.exp(-ease - trained))
        scores[name] = {str(number): runs for number, runs in enumerate(right)}
    verdict = decide(scores, SIMULATED, metric="acc", examples=100, draws=99).verdict
    return VerdictKind(verdict.kind)


def test_claims_over_the_target_lora_are_false_no_more_often_than_they_may_be() -> None:
    # Recycled arms are as good as the target LoRA and far better than their control, so that the
    # control keeps no false claim back. The last studies, 7 tasks, have noise from run to run.
    rng = np.random.default_rng(3)
    skills = {"base": -1.5, "target": 0.0, "mix": 0.0, "other mix": 0.0, "random mix": -1.5}
    kinds: Counter[VerdictKind] = Counter()
    for studies, tasks, rows, noise in ((350, 1, 60, 0.0), (300, 3, 40, 0.0), (350, 7, 30, 0.5)):
        found = Counter(simulated(rng, skills, tasks, rows, noise) for _ in range(studies))
        # Two standard errors of 0.05 over 300 studies are 0.025.
        assert sum(found[kind] for kind in OVER_TARGET) <= 0.075 * studies
        kinds += found
    assert kinds.total() == 1000
    assert sum(kinds[kind] for kind in OVER_TARGET) <= 50


def test_claims_grow_with_rows() -> None:
    rng = np.random.default_rng(4)
    skills = {"base": -1.5, "target": 0.0, "mix": 1.0, "other mix": 0.0, "random mix": 0.0}
    found = [
        sum(simulated(rng, skills, 1, rows, 0.0) is VerdictKind.BEATS_TARGET for _ in range(60))
        for rows in (20, 60, 180)
    ]
    assert found == sorted(found)
    assert found[0] < 20 and found[-1] > 50


def test_half_way_adapters_are_seldom_called_relevant() -> None:
    rng = np.random.default_rng(5)
    arms = [*SIMULATED[:3], Arm("single", "the adapter chosen first", Role.SINGLE)]
    found = []
    for _ in range(200):
        base = {str(i): rng.random(50) < 0.3 for i in range(2)}
        target = {str(i): rng.random(50) < 0.8 for i in range(2)}
        # Right where one of the two is, drawn anew for each row: half-way on average.
        single = {t: np.where(rng.random(50) < 0.5, base[t], target[t]) for t in base}
        scores = {"base": base, "target": target, "mix": base, "single": single}
        notes = decide(scores, arms, metric="acc", examples=9, draws=99).verdict
        found.append(
            notes.kind == VerdictKind.RELEVANT_ADAPTER
            or any("close to" in note for note in notes.notes)
        )
    # The standard error of 0.05 over 200 studies is 0.015.
    assert np.mean(found) <= 0.05 + 2 * 0.015


def test_no_kind_is_left_out() -> None:
    right = [
        {**USUAL, "mix+target": 332},
        {**ALONE, "mix": 316},
        {**USUAL, "mix+target": 332, "rescaled": 330},
        {**USUAL, "mix+target": 328, "random+target": 329},
        {"base": 200, "target": 320, "average": 316},
        {**ALONE, "mix": 320},
        {**ALONE, "mix": 308},
        {**USUAL, "mix+target": 316, "single": 290},
        {**USUAL, "mix+target": 316},
        {"target": 320},
    ]
    kinds = {VerdictKind(judged(each).verdict.kind) for each in right}
    assert set(VerdictKind) - kinds == {VerdictKind.NO_GAIN}  # test_no_gain
