"""Every verdict with its sentence, and what must hold of the figures behind it."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recycle_cli.evaluation.statistics import holm, paired_test
from recycle_cli.evaluation.verdict import ALPHA, LABELS, Decision, Method, VerdictKind, decide

ROWS = 400
M = Method


def first(right: int, rows: int = ROWS) -> npt.NDArray[np.bool_]:
    """The first rows right, the others wrong: of two such methods, one wins every differing row.

    So the exact p-value of a difference of d rows is 2 ** (1 - d): 0.031 at 6 and 0.0078 at 8.
    """
    return np.arange(rows) < right


def judged(right: dict[Method, int], rows: int = ROWS, examples: int = 100) -> Decision:
    flags = {method: first(number, rows) for method, number in right.items()}
    return decide(flags, "acc", examples)


USUAL = {M.BASE: 200, M.TARGET: 320, M.CONTROL_TARGET: 322}


@pytest.mark.parametrize(
    ("right", "kind", "sentence"),
    [
        (
            {**USUAL, M.RECYCLED_TARGET: 332},
            VerdictKind.HELPED,
            "Recycling helped, and more than random adapters do: 83.0 % for recycled adapters "
            "with the target LoRA against 80.0 % for a LoRA trained on the same 100 examples "
            "(difference 3.0 points, 95 % interval 1.5 to 4.8, p < 0.001, 400 test rows); random "
            "adapters with the target LoRA reached 80.5 % (difference 2.5 points, 95 % interval "
            "1.0 to 4.2, p = 0.002).",
        ),
        (
            {**USUAL, M.RECYCLED_TARGET: 328, M.CONTROL_TARGET: 329},
            VerdictKind.REGULARISATION,
            "Recycling helped, but not measurably more than random adapters do: 82.0 % for "
            "recycled adapters with the target LoRA against 80.0 % for a LoRA trained on the same "
            "100 examples (difference 2.0 points, 95 % interval 0.8 to 3.5, p = 0.008, 400 test "
            "rows); random adapters with the target LoRA reached 82.2 % (difference -0.2 points, "
            "95 % interval -0.8 to 0.0, p = 1.00).",
        ),
        (
            {**USUAL, M.RECYCLED_TARGET: 332, M.RESCALED: 330},
            VerdictKind.RESCALING,
            "Recycling helped, but not measurably more than rescaling the target LoRA alone does: "
            "83.0 % for recycled adapters with the target LoRA against 80.0 % for a LoRA trained "
            "on the same 100 examples (difference 3.0 points, 95 % interval 1.5 to 4.8, p < 0.001, "
            "400 test rows); the target LoRA rescaled alone reached 82.5 % (difference 0.5 points, "
            "95 % interval 0.0 to 1.2, p = 0.50).",
        ),
        (
            {M.BASE: 200, M.TARGET: 320, M.RECYCLED_TARGET: 332, M.CONTROL: 250},
            VerdictKind.NO_CONTROL,
            "Recycling beat the target LoRA, but whether random adapters would have done as well "
            "is not known, since random adapters with the target LoRA (control+target) were not "
            "run: 83.0 % for recycled adapters with the target LoRA against 80.0 % for a LoRA "
            "trained on the same 100 examples (difference 3.0 points, 95 % interval 1.5 to 4.8, "
            "p < 0.001, 400 test rows).",
        ),
        (
            {**USUAL, M.RECYCLED_TARGET: 318},
            VerdictKind.NO_BETTER_THAN_TARGET,
            "Recycling did not help measurably: 79.5 % for recycled adapters with the target LoRA "
            "against 80.0 % for a LoRA trained on the same 100 examples (difference -0.5 points, "
            "95 % interval -1.2 to 0.0, p = 0.50, 400 test rows); the base model alone reached "
            "50.0 % (difference 29.5 points, 95 % interval 25.0 to 34.0, p < 0.001).",
        ),
        (
            {**USUAL, M.RECYCLED_TARGET: 308},
            VerdictKind.WORSE_THAN_TARGET,
            "Recycling was worse than the target LoRA: 77.0 % for recycled adapters with the "
            "target LoRA against 80.0 % for a LoRA trained on the same 100 examples (difference "
            "-3.0 points, 95 % interval -4.8 to -1.5, p < 0.001, 400 test rows); the base model "
            "alone reached 50.0 % (difference 27.0 points, 95 % interval 22.8 to 31.5, p < 0.001).",
        ),
        (
            {M.BASE: 318, M.TARGET: 320, M.RECYCLED: 320},
            VerdictKind.NO_GAIN,
            "Recycling gained nothing measurable over the base model: 80.0 % for recycled adapters "
            "against 80.0 % for a LoRA trained on the same 100 examples (difference 0.0 points, "
            "95 % interval -0.7 to 0.7, p = 1.00, 400 test rows); the base model alone reached "
            "79.5 % (difference 0.5 points, 95 % interval 0.0 to 1.2, p = 0.50).",
        ),
        (
            {M.TARGET: 320, M.RECYCLED: 332},
            VerdictKind.INCOMPLETE,
            "No verdict: the base model was not scored.",
        ),
        (
            {M.AVERAGE: 300},
            VerdictKind.INCOMPLETE,
            "No verdict: the base model, the target LoRA and a recycled variant were not scored.",
        ),
    ],
)
def test_every_kind_with_its_sentence(
    right: dict[Method, int], kind: VerdictKind, sentence: str
) -> None:
    verdict = judged(right).verdict
    assert verdict.kind == kind
    assert verdict.sentence == sentence


def test_too_few_rows() -> None:
    right = {M.BASE: 0, M.TARGET: 5, M.RECYCLED: 19, M.CONTROL: 5}
    verdict = judged(right, rows=19).verdict
    assert verdict.kind == VerdictKind.TOO_FEW_ROWS
    assert verdict.sentence == (
        "No verdict: 19 test rows are too few for a claim; at least 20 are needed "
        "(base 0.0 %, target 26.3 %, recycled 100.0 %, control 26.3 %)."
    )
    assert judged(right, rows=20).verdict.kind == VerdictKind.HELPED


def test_one_example_is_singular() -> None:
    verdict = judged({**USUAL, M.RECYCLED_TARGET: 318}, examples=1).verdict
    assert "the same 1 example (" in verdict.sentence


# --- which comparison decides ---------------------------------------------------------------------


def test_trying_two_variants_costs_something() -> None:
    # A difference of 6 rows has p = 0.031: enough alone, not enough as one of two.
    alone = {M.BASE: 200, M.TARGET: 320, M.CONTROL_TARGET: 320, M.RECYCLED_TARGET: 326}
    assert judged(alone).verdict.kind == VerdictKind.HELPED
    both = {**alone, M.RECYCLED: 320, M.CONTROL: 320}
    decision = judged(both)
    assert decision.verdict.kind == VerdictKind.NO_BETTER_THAN_TARGET
    assert "adjusted p = 0.062" in decision.verdict.sentence


def test_the_target_lora_must_stand_on_both_sides() -> None:
    # Random adapters without the target LoRA are easily beaten by anything that holds it.
    weak = {M.BASE: 200, M.TARGET: 320, M.CONTROL: 210, M.RECYCLED_TARGET: 340}
    assert judged(weak).verdict.kind == VerdictKind.NO_CONTROL
    assert judged({**weak, M.CONTROL_TARGET: 338}).verdict.kind == VerdictKind.REGULARISATION
    assert judged({**weak, M.CONTROL_TARGET: 325}).verdict.kind == VerdictKind.HELPED


def test_any_random_control_that_is_not_beaten_forbids_the_claim() -> None:
    right = {M.BASE: 200, M.TARGET: 320, M.CONTROL: 210, M.RECYCLED: 340}
    assert judged(right).verdict.kind == VerdictKind.HELPED
    assert judged({**right, M.CONTROL_TARGET: 339}).verdict.kind == VerdictKind.REGULARISATION


@pytest.mark.parametrize(("alone", "beside"), [(336, 341), (341, 336)])
def test_the_closest_rival_is_named(alone: int, beside: int) -> None:
    right = {M.BASE: 200, M.TARGET: 320, M.RECYCLED: 340}
    verdict = judged({**right, M.CONTROL: alone, M.CONTROL_TARGET: beside}).verdict
    assert verdict.kind == VerdictKind.REGULARISATION
    named = M.CONTROL if alone > beside else M.CONTROL_TARGET
    assert f"; {named.label} reached 85.2 %" in verdict.sentence


def test_random_adapters_are_named_before_rescaling() -> None:
    right = {**USUAL, M.RECYCLED_TARGET: 340, M.CONTROL_TARGET: 338, M.RESCALED: 341}
    verdict = judged(right).verdict
    assert verdict.kind == VerdictKind.REGULARISATION
    assert "random adapters with the target LoRA reached 84.5 %" in verdict.sentence


def test_the_variant_with_the_stronger_claim_is_named() -> None:
    right = {M.BASE: 100, M.TARGET: 300, M.CONTROL: 200, M.CONTROL_TARGET: 200}
    flags = {method: first(number) for method, number in right.items()}
    flags[M.RESCALED] = first(320)
    # Ahead of the rescaled LoRA by 12 rows to 0, and by 60 to 44: the second scores higher, but
    # it alone might owe that to chance.
    flags[M.RECYCLED] = first(332)
    flags[M.RECYCLED_TARGET] = first(380) & ~first(44)
    verdict = decide(flags, "acc", 100).verdict
    assert verdict.kind == VerdictKind.HELPED
    assert "83.0 % for recycled adapters against 75.0 %" in verdict.sentence
    del flags[M.RECYCLED]
    assert decide(flags, "acc", 100).verdict.kind == VerdictKind.RESCALING


def test_worse_takes_both_variants() -> None:
    right = {M.BASE: 200, M.TARGET: 320, M.RECYCLED: 280, M.RECYCLED_TARGET: 319}
    verdict = judged(right).verdict
    assert verdict.kind == VerdictKind.NO_BETTER_THAN_TARGET
    assert "79.8 % for recycled adapters with the target LoRA" in verdict.sentence
    assert judged({**right, M.RECYCLED_TARGET: 300}).verdict.kind == VerdictKind.WORSE_THAN_TARGET


# --- the figures ----------------------------------------------------------------------------------


def test_tests_and_figures_are_those_of_the_arrays() -> None:
    rng = np.random.default_rng(0)
    flags = {method: rng.random(120) < 0.5 + 0.05 * i for i, method in enumerate(Method)}
    decision = decide(flags, "exact_match", 50)
    variants, controls = (M.RECYCLED, M.RECYCLED_TARGET), (M.CONTROL, M.CONTROL_TARGET, M.RESCALED)
    expected = {(m, b) for b in (M.BASE, M.TARGET) for m in Method if m is not b}
    expected |= {(v, c) for v in variants for c in controls}
    assert set(decision.tests) == expected
    for (method, baseline), test in decision.tests.items():
        assert test == paired_test(flags[method], flags[baseline], str(baseline), "exact_match")
    figures = decision.verdict.figures
    assert (figures["rows"], figures["examples"]) == (120, 50)
    for method in Method:
        assert figures[f"accuracy.{method}"] == flags[method].mean()
    for baseline in (M.BASE, M.TARGET, *controls):
        raw = [decision.tests[variant, baseline].p_value for variant in variants]
        for variant, adjusted in zip(variants, holm(raw), strict=True):
            pair = f"{variant}.{baseline}"
            assert figures[f"adjusted_p_value.{pair}"] == adjusted
            assert figures[f"p_value.{pair}"] == decision.tests[variant, baseline].p_value
            interval = figures[f"interval_low.{pair}"], figures[f"interval_high.{pair}"]
            assert interval == decision.tests[variant, baseline].interval


def significant(figures: dict[str, float], variant: str, baseline: str, sign: int) -> bool:
    pair = f"{variant}.{baseline}"
    return figures[f"adjusted_p_value.{pair}"] < ALPHA and figures[f"difference.{pair}"] * sign > 0


@settings(max_examples=150)
@given(
    right=st.dictionaries(st.sampled_from(Method), st.integers(20, 40), min_size=4).filter(
        lambda right: (
            {M.BASE, M.TARGET} <= set(right) and {M.RECYCLED, M.RECYCLED_TARGET} & set(right)
        )
    ),
    seed=st.integers(0, 3),
)
def test_the_kind_follows_from_the_figures(right: dict[Method, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    noise = rng.random(40) < 0.1
    flags = {
        method: first(number, 40) ^ (noise & (rng.random(40) < 0.5))
        for method, number in right.items()
    }
    verdict = decide(flags, "acc", 100).verdict
    figures = verdict.figures
    own = {M.RECYCLED: M.CONTROL, M.RECYCLED_TARGET: M.CONTROL_TARGET}
    variants = [variant for variant in own if variant in right]
    winners = [v for v in variants if significant(figures, v, M.TARGET, 1)]
    controls = [c for c in (M.CONTROL, M.CONTROL_TARGET, M.RESCALED) if c in right]
    proven = [
        v
        for v in winners
        if own[v] in right and all(significant(figures, v, c, 1) for c in controls)
    ]
    best = max(variants, key=lambda variant: figures[f"accuracy.{variant}"])
    assert (verdict.kind == VerdictKind.HELPED) == bool(proven)
    not_above = {
        VerdictKind.NO_BETTER_THAN_TARGET,
        VerdictKind.WORSE_THAN_TARGET,
        VerdictKind.NO_GAIN,
    }
    assert (verdict.kind in not_above) == (not winners)
    if verdict.kind == VerdictKind.WORSE_THAN_TARGET:
        assert significant(figures, best, M.TARGET, -1)
    if verdict.kind == VerdictKind.NO_BETTER_THAN_TARGET:
        assert significant(figures, best, M.BASE, 1)
    if verdict.kind == VerdictKind.NO_GAIN:
        assert not significant(figures, best, M.BASE, 1)
    assert verdict.sentence.endswith(".")


def test_random_adapters_alone_seldom_earn_a_claim() -> None:
    # Everything is a draw from one and the same model, so any "helped" is false.
    rng = np.random.default_rng(5)
    kinds = [
        decide({method: rng.random(60) < 0.7 for method in Method}, "acc", 100).verdict.kind
        for _ in range(200)
    ]
    assert kinds.count(VerdictKind.HELPED) <= 2


def test_every_method_has_a_label() -> None:
    assert set(LABELS) == set(Method)
    assert M.RESCALED.label == "the target LoRA rescaled alone"


def test_arrays_must_match() -> None:
    with pytest.raises(ValueError, match="every method needs the same rows"):
        decide({M.BASE: first(3, 30), M.TARGET: first(3, 31)}, "acc", 100)
    with pytest.raises(ValueError, match="every method needs the same rows"):
        decide({}, "acc", 100)
    with pytest.raises(ValueError, match="expected a row of booleans"):
        decide({M.BASE: [0.5, 1.0]}, "acc", 100)
    with pytest.raises(ValueError, match="'oracle' is not a valid Method"):
        decide({"oracle": first(3)}, "acc", 100)  # type: ignore[dict-item]
