"""Did recycling help? One answer, from what each method got right on the same rows.

The paper behind this package (arXiv 2602.12323) found that adapters with random weights, merged
adaptively beside the target LoRA, often do as well as recycled ones. So "recycling helped" takes
more here than a better score than the target LoRA's: the same variant must also beat random
adapters merged in the same way, and the target LoRA rescaled alone where that was run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy.typing as npt

from recycle_cli.evaluation.statistics import as_flags, few_rows_warning, holm, paired_test
from recycle_cli.records import PairedTest, Verdict

ALPHA = 0.05


class Method(StrEnum):
    """The methods that a verdict compares, as study tables name them."""

    BASE = "base"
    TARGET = "target"
    AVERAGE = "average"
    RECYCLED = "recycled"
    RECYCLED_TARGET = "recycled+target"
    CONTROL = "control"
    CONTROL_TARGET = "control+target"
    RESCALED = "rescaled-target"

    @property
    def label(self) -> str:
        """What people read in place of the name."""
        return LABELS[self]


LABELS: dict[Method, str] = {
    Method.BASE: "the base model",
    Method.TARGET: "the target LoRA",
    Method.AVERAGE: "the plain average of the recycled adapters",
    Method.RECYCLED: "recycled adapters",
    Method.RECYCLED_TARGET: "recycled adapters with the target LoRA",
    Method.CONTROL: "random adapters",
    Method.CONTROL_TARGET: "random adapters with the target LoRA",
    Method.RESCALED: "the target LoRA rescaled alone",
}

# Each recycled variant with its own control: the same method with adapters of random weights. The
# target LoRA must stand on both sides, or its worth would be counted as that of recycling.
MATCHED_CONTROL: dict[Method, Method] = {
    Method.RECYCLED: Method.CONTROL,
    Method.RECYCLED_TARGET: Method.CONTROL_TARGET,
}
CONTROLS = (Method.CONTROL, Method.CONTROL_TARGET, Method.RESCALED)


class VerdictKind(StrEnum):
    """What a verdict can say, from the most welcome to none at all."""

    HELPED = "helped"
    RESCALING = "rescaling"
    REGULARISATION = "regularisation"
    NO_CONTROL = "no_control"
    NO_BETTER_THAN_TARGET = "no_better_than_target"
    WORSE_THAN_TARGET = "worse_than_target"
    NO_GAIN = "no_gain"
    TOO_FEW_ROWS = "too_few_rows"
    INCOMPLETE = "incomplete"


Pair = tuple[Method, Method]


@dataclass(frozen=True)
class Decision:
    """A verdict with the tests that it rests on.

    Args:
        verdict: kind, sentence and figures.
        tests: (method, baseline) -> test, the p-value as it is: every method against the base
            and against the target LoRA, every recycled variant against every control.
        adjusted: (variant, baseline) -> the p-value after Holm's correction over the variants.
    """

    verdict: Verdict
    tests: dict[Pair, PairedTest]
    adjusted: dict[Pair, float]


def decide(correct: Mapping[Method, npt.ArrayLike], metric: str, examples: int) -> Decision:
    """Decides whether recycling helped.

    A variant beats a baseline when its difference is positive and the p-value of the exact
    McNemar test, corrected after Holm over the recycled variants, is below 0.05. So both variants
    may be tried and the better one named. "Helped" asks a variant to beat the target LoRA and
    every control that was run, its own among them; asking for all of them needs no further
    correction.

    Args:
        correct: for each method that was run, whether each row was answered rightly: (rows,)
            booleans, in the same order of rows. Tasks may be concatenated; repeated runs over the
            same rows may not, since such rows are not independent.
        metric: the name of the metric, for the records.
        examples: how many examples the target LoRA was trained on.

    Raises:
        ValueError: no method was run, or the arrays are not booleans of one length.
    """
    flags = {Method(method): as_flags(answers) for method, answers in correct.items()}
    if len({answers.size for answers in flags.values()}) != 1:
        raise ValueError("every method needs the same rows, and at least one method is needed")
    accuracy = {method: float(answers.mean()) for method, answers in flags.items()}
    tests = {
        (method, baseline): paired_test(flags[method], flags[baseline], baseline, metric)
        for method, baseline in _pairs(list(flags))
    }
    rows = next(iter(flags.values())).size
    evidence = _Evidence(accuracy, tests, _adjust(tests), rows, examples)
    kind, sentence = _judge(evidence)
    verdict = Verdict(kind=kind, sentence=sentence, figures=_figures(evidence))
    return Decision(verdict, tests, evidence.adjusted)


def _pairs(methods: list[Method]) -> list[Pair]:
    anchors = [(m, b) for b in (Method.BASE, Method.TARGET) for m in methods if b in methods]
    controls = [(m, c) for c in CONTROLS if c in methods for m in methods if m in MATCHED_CONTROL]
    return [(m, b) for m, b in anchors + controls if m is not b]


def _adjust(tests: Mapping[Pair, PairedTest]) -> dict[Pair, float]:
    adjusted: dict[Pair, float] = {}
    for baseline in Method:
        family = [pair for pair in tests if pair[1] is baseline and pair[0] in MATCHED_CONTROL]
        corrected = holm([tests[pair].p_value for pair in family])
        adjusted.update(zip(family, corrected, strict=True))
    return adjusted


# --- the evidence ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Evidence:
    accuracy: dict[Method, float]
    tests: dict[Pair, PairedTest]
    adjusted: dict[Pair, float]
    rows: int
    examples: int

    @property
    def variants(self) -> list[Method]:
        """The recycled variants that were run, the one furthest above the target LoRA first."""
        run = [method for method in MATCHED_CONTROL if method in self.accuracy]
        return sorted(run, key=lambda method: -self.accuracy[method])

    @property
    def controls(self) -> list[Method]:
        return [method for method in CONTROLS if method in self.accuracy]

    def beats(self, method: Method, baseline: Method) -> bool:
        return self._differs(method, baseline) and self.tests[method, baseline].difference > 0

    def loses_to(self, method: Method, baseline: Method) -> bool:
        return self._differs(method, baseline) and self.tests[method, baseline].difference < 0

    def _differs(self, method: Method, baseline: Method) -> bool:
        return self.adjusted[method, baseline] < ALPHA

    def unbeaten(self, method: Method) -> list[Method]:
        """The controls that the variant does not beat, the closest rival first."""
        rivals = [control for control in self.controls if not self.beats(method, control)]
        return sorted(rivals, key=lambda control: -self.accuracy[control])


def _judge(evidence: _Evidence) -> tuple[VerdictKind, str]:
    missing = [m.label for m in (Method.BASE, Method.TARGET) if m not in evidence.accuracy]
    if not evidence.variants:
        missing.append("a recycled variant")
    if missing:
        return VerdictKind.INCOMPLETE, f"No verdict: {_listed(missing)} not scored."
    warning = few_rows_warning(evidence.rows)
    if warning:
        scores = ", ".join(f"{m} {_percent(share)}" for m, share in evidence.accuracy.items())
        return VerdictKind.TOO_FEW_ROWS, f"No verdict: {warning} ({scores})."
    winners = [v for v in evidence.variants if evidence.beats(v, Method.TARGET)]
    if winners:
        # The kinds stand in order of merit, so the smallest index is the strongest claim that
        # a variant supports; among equals the first, which scored highest, is the one named.
        order = list(VerdictKind)
        return min((_judge_winner(v, evidence) for v in winners), key=lambda c: order.index(c[0]))
    return _judge_loser(evidence.variants[0], evidence)


def _judge_winner(variant: Method, evidence: _Evidence) -> tuple[VerdictKind, str]:
    """The claim that a variant supports which beats the target LoRA."""
    against_target = _against(variant, Method.TARGET, evidence)
    unbeaten = evidence.unbeaten(variant)
    own = MATCHED_CONTROL[variant]
    random = [control for control in unbeaten if control is not Method.RESCALED]
    if random:
        return VerdictKind.REGULARISATION, (
            f"Recycling helped, but not measurably more than random adapters do: {against_target}; "
            f"{_rival(variant, random[0], evidence)}."
        )
    if own not in evidence.accuracy:
        return VerdictKind.NO_CONTROL, (
            f"Recycling beat the target LoRA, but whether random adapters would have done as well "
            f"is not known, since {own.label} ({own}) were not run: {against_target}."
        )
    if unbeaten:
        return VerdictKind.RESCALING, (
            f"Recycling helped, but not measurably more than rescaling the target LoRA alone "
            f"does: {against_target}; {_rival(variant, unbeaten[0], evidence)}."
        )
    return VerdictKind.HELPED, (
        f"Recycling helped, and more than random adapters do: {against_target}; "
        f"{_rival(variant, own, evidence)}."
    )


def _judge_loser(variant: Method, evidence: _Evidence) -> tuple[VerdictKind, str]:
    """The verdict where no variant beats the target LoRA; `variant` is the one closest to it."""
    against_target = _against(variant, Method.TARGET, evidence)
    against_base = _rival(variant, Method.BASE, evidence)
    if evidence.loses_to(variant, Method.TARGET):
        return VerdictKind.WORSE_THAN_TARGET, (
            f"Recycling was worse than the target LoRA: {against_target}; {against_base}."
        )
    if evidence.beats(variant, Method.BASE):
        return VerdictKind.NO_BETTER_THAN_TARGET, (
            f"Recycling did not help measurably: {against_target}; {against_base}."
        )
    return VerdictKind.NO_GAIN, (
        f"Recycling gained nothing measurable over the base model: {against_target}; "
        f"{against_base}."
    )


# --- words and figures ----------------------------------------------------------------------------


def _against(variant: Method, baseline: Method, evidence: _Evidence) -> str:
    counted = "example" if evidence.examples == 1 else "examples"
    return (
        f"{_percent(evidence.accuracy[variant])} for {variant.label} against "
        f"{_percent(evidence.accuracy[baseline])} for a LoRA trained on the same "
        f"{evidence.examples} {counted} "
        f"({_comparison(variant, baseline, evidence)}, {evidence.rows} test rows)"
    )


def _rival(variant: Method, baseline: Method, evidence: _Evidence) -> str:
    verb = "reached" if baseline is not Method.BASE else "alone reached"
    return (
        f"{baseline.label} {verb} {_percent(evidence.accuracy[baseline])} "
        f"({_comparison(variant, baseline, evidence)})"
    )


def _comparison(variant: Method, baseline: Method, evidence: _Evidence) -> str:
    test = evidence.tests[variant, baseline]
    low, high = test.interval
    p_value = evidence.adjusted[variant, baseline]
    name = "adjusted p" if len(evidence.variants) > 1 else "p"
    return (
        f"difference {_points(test.difference)} points, 95 % interval {_points(low)} to "
        f"{_points(high)}, {name} {_p_value(p_value)}"
    )


def _listed(names: list[str]) -> str:
    if len(names) == 1:
        return f"{names[0]} was"
    return f"{', '.join(names[:-1])} and {names[-1]} were"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _points(share: float) -> str:
    # Adding zero turns the -0.0 that rounding can leave into 0.0.
    return f"{round(100 * share, 1) + 0.0:.1f}"


def _p_value(value: float) -> str:
    if value < 0.001:
        return "< 0.001"
    return f"= {value:.3f}" if value < 0.1 else f"= {value:.2f}"


def _figures(evidence: _Evidence) -> dict[str, float]:
    """The figures under names such as `accuracy.target` and `p_value.recycled.target`."""
    figures: dict[str, float] = {"rows": evidence.rows, "examples": evidence.examples}
    figures.update({f"accuracy.{m}": share for m, share in evidence.accuracy.items()})
    for (method, baseline), p_value in evidence.adjusted.items():
        test, pair = evidence.tests[method, baseline], f"{method}.{baseline}"
        figures[f"difference.{pair}"] = test.difference
        figures[f"interval_low.{pair}"], figures[f"interval_high.{pair}"] = test.interval
        figures[f"p_value.{pair}"] = test.p_value
        figures[f"adjusted_p_value.{pair}"] = p_value
    return figures
