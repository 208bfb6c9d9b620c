"""Did recycling help? One answer, from what each arm scored on the same rows.

The paper behind this package (arXiv 2602.12323) found that adapters with random weights, merged
adaptively beside the target LoRA, often do as well as recycled ones. So "recycling beats your own
LoRA" takes more here than a better score: the same arm must also beat random adapters merged in the
same way, and the target LoRA rescaled alone, where those were run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from recycle_cli.evaluation import wording
from recycle_cli.evaluation.arms import Arm, Role
from recycle_cli.evaluation.bootstrap import MANY_TASKS, RESAMPLES
from recycle_cli.evaluation.comparison import MARGIN
from recycle_cli.evaluation.differences import Scores
from recycle_cli.evaluation.evidence import ALPHA, Design, Evidence, Pair
from recycle_cli.evaluation.relevance import Relevant, relevant_adapters
from recycle_cli.evaluation.statistics import few_rows_warning
from recycle_cli.records import PairedTest, Verdict

__all__ = ["ALPHA", "Arm", "Decision", "Role", "VerdictKind", "decide"]


class VerdictKind(StrEnum):
    """What a verdict can say. Of two claims about arms that beat something, the one that stands
    first is the stronger."""

    BEATS_TARGET = "beats_target"
    HELPS_OVER_BASE = "helps_over_base"
    RESCALING = "rescaling"
    REGULARISATION = "regularisation"
    NO_CONTROL = "no_control"
    MATCHES_TARGET = "matches_target"
    WORSE_THAN_TARGET = "worse_than_target"
    RELEVANT_ADAPTER = "relevant_adapter"
    NO_GAIN = "no_gain"
    TOO_FEW_ROWS = "too_few_rows"
    INCOMPLETE = "incomplete"


NO_CONTROL = (
    "but whether random adapters would do as well is not known, since none were scored that were "
    "made in the same way"
)
NOT_RESCALED = "whether rescaling that LoRA alone would do as well was not tried"


class Claim(NamedTuple):
    """What is said, in a sentence, and of which recycled arm, where it is of one."""

    kind: VerdictKind
    sentence: str
    method: str | None = None


@dataclass(frozen=True)
class Decision:
    """A verdict with the tests that it rests on.

    Args:
        verdict: kind, sentence, figures and notes.
        tests: (arm, baseline) -> test: every arm against the base model and against the target
            LoRA, every recycled arm against its own control and against the rescaled target. Each
            has a p-value that is adjusted for how many arms were compared with that baseline; the
            recycled arms' against the target LoRA have that of their equivalence too.
    """

    verdict: Verdict
    tests: dict[Pair, PairedTest]


def decide(
    scores: Mapping[str, Scores],
    arms: Sequence[Arm],
    *,
    metric: str,
    examples: int,
    margin: float = MARGIN,
    relevance: Mapping[str, str] = MappingProxyType({}),
    seed: int = 0,
    draws: int = RESAMPLES,
) -> Decision:
    """Decides whether recycling helped.

    An arm beats another when its difference is positive and its p-value, corrected for the number
    of recycled arms, is below 0.05, so any number of arms may be tried and the best one named. The
    correction is Holm's; from 6 tasks on it is that of Westfall and Young (`task_sign_flips`).
    `beats_target` asks an arm to beat the target LoRA, its own control and the rescaled target;
    asking one arm for all of them needs no further correction. Where arms fail different ones of
    the three, a false claim is a false rejection in any of three families, each at 2.5 % in that
    direction.

    In this order, the first that holds:

    1. an arm beats the target LoRA: `beats_target`, or why that is not owed to recycling
       (`rescaling`, `regularisation`, `no_control`); of several arms the one with the most to say;
    2. `worse_than_target`: the best arm loses to the target LoRA;
    3. `matches_target`: an arm is equivalent to the target LoRA within the margin, by two one-sided
       tests with Holm's correction over all recycled arms, and not all are as good as the base
       model. Of several, an arm that does without the target LoRA is named first, since one that
       holds it needs it trained anyway, then the one with the smallest p-value;
    4. `relevant_adapter`: an adapter of the pool, as it is, goes more than half of the way from the
       base model to the target LoRA (`relevant_adapters`). Beside 1 to 3 it is a note;
    5. `no_gain`: every recycled arm is shown to gain less over the base model than the margin;
    6. an arm without the target LoRA beats the base model: `helps_over_base` where it beats its
       control too, else `regularisation` or `no_control`. An arm with the target LoRA owes what it
       gains over the base model to that;
    7. `too_few_rows`: nothing is decided, and so many rows would be needed.

    Args:
        scores: arm -> task -> scores in [0, 1], (seeds, rows) or (rows,); every arm on the same
            tasks and rows, in the same order. The numbers of seeds may differ.
        arms: the part that each plays. One base model, target LoRA and rescaled target are looked
            at, the first of each; those without scores were not run.
        metric: the name of the metric, for the records.
        examples: how many examples the target LoRA was trained on.
        margin: the largest difference that does not matter, in (0, 1).
        relevance: task -> the id of the adapter that the selection put first, the one of the first
            arm of single adapters.
        seed: of the resamples and flips that are drawn.
        draws: how many.

    Raises:
        ValueError: arms differ in tasks or rows, scores are out of range or those of no arm, or a
            control has the target LoRA where its arm has not.
    """
    design = Design(metric, examples, margin, relevance, seed, draws)
    evidence = Evidence(scores, arms, design)
    relevant = relevant_adapters(evidence)
    kind, sentence, method = _judge(evidence, relevant)
    verdict = Verdict(
        kind=kind,
        sentence=sentence,
        method=method,
        figures=_figures(evidence, relevant),
        notes=_notes(kind, evidence, relevant),
    )
    return Decision(verdict, evidence.tests)


def _judge(evidence: Evidence, relevant: Sequence[Relevant]) -> Claim:
    without_verdict = _not_enough(evidence)
    if without_verdict:
        return without_verdict
    winners = [name for name in evidence.recycled if evidence.beats(name, evidence.target)]
    if winners:
        return _strongest([_claim_over_target(name, evidence) for name in winners])
    best = evidence.recycled[0]
    if evidence.loses_to(best, evidence.target):
        return Claim(
            VerdictKind.WORSE_THAN_TARGET,
            f"Your own LoRA is better than recycling: {wording.against_target(best, evidence)}; "
            f"{_base(best, evidence)}.",
            best,
        )
    useless = all(
        not evidence.beats(name, evidence.base) and evidence.gains_less_than_margin(name)
        for name in evidence.recycled
    )
    matching = _matching(evidence)
    if matching and not useless:
        return Claim(
            VerdictKind.MATCHES_TARGET, _matches(matching[0], evidence), method=matching[0]
        )
    if relevant:
        task = relevant[0].task if len(evidence.tasks) > 1 else "your task"
        return Claim(
            VerdictKind.RELEVANT_ADAPTER,
            f"The pool holds an adapter that is close to {task}: "
            f"{wording.relevant_adapter(relevant[0], evidence)}.",
        )
    if useless:
        return Claim(
            VerdictKind.NO_GAIN,
            f"Recycling gains less than {wording.margin(evidence)} over the base model: "
            f"{wording.against_base(best, evidence)}; "
            f"{wording.rival(best, str(evidence.target), evidence)}.",
            best,
        )
    helping = [name for name in evidence.recycled if _helps_alone(name, evidence)]
    if helping:
        return _strongest([_claim_over_base(name, evidence) for name in helping])
    return Claim(
        VerdictKind.TOO_FEW_ROWS,
        "Too little was scored to say whether recycling helps: "
        f"{wording.against_target(best, evidence)}; {_base(best, evidence)}; "
        f"{_would_tell(best, evidence)}.",
        best,
    )


def _not_enough(evidence: Evidence) -> Claim | None:
    missing = [
        label
        for label, scored in (
            ("the base model", evidence.base),
            ("the target LoRA", evidence.target),
            ("a recycled arm", evidence.recycled),
        )
        if not scored
    ]
    if missing:
        verb = "was" if len(missing) == 1 else "were"
        said = f"No verdict: {wording.listed(missing)} {verb} not scored."
        return Claim(VerdictKind.INCOMPLETE, said)
    warning = few_rows_warning(evidence.rows)
    if warning:
        scored = ", ".join(f"{n} {wording.percent(mean)}" for n, mean in evidence.means.items())
        return Claim(VerdictKind.TOO_FEW_ROWS, f"No verdict: {warning} ({scored}).")
    return None


def _strongest(claims: Sequence[Claim]) -> Claim:
    """Among equals the first, which scored highest."""
    order = list(VerdictKind)
    return min(claims, key=lambda claim: order.index(claim.kind))


# --- claims ---------------------------------------------------------------------------------------


def _claim_over_target(name: str, evidence: Evidence) -> Claim:
    """What can be said of an arm that beats the target LoRA."""
    better = "Recycling beats your own LoRA"
    figures = wording.against_target(name, evidence)
    control, rescaled = evidence.control_of(name), evidence.rescaled
    if control and not evidence.beats(name, control):
        return Claim(
            VerdictKind.REGULARISATION,
            f"{better}, but not measurably more than random adapters do: {figures}; "
            f"{wording.rival(name, control, evidence)}.",
            name,
        )
    if rescaled and not evidence.beats(name, rescaled):
        return Claim(
            VerdictKind.RESCALING,
            f"{better}, but not measurably more than rescaling that LoRA alone does: {figures}; "
            f"{wording.rival(name, rescaled, evidence)}.",
            name,
        )
    if not control:
        return Claim(VerdictKind.NO_CONTROL, f"{better}, {NO_CONTROL}: {figures}.", name)
    untried = "" if rescaled else f"; {NOT_RESCALED}"
    return Claim(
        VerdictKind.BEATS_TARGET,
        f"{better}, by more than random adapters do: {figures}; "
        f"{_controls(name, evidence)}{untried}.",
        name,
    )


def _helps_alone(name: str, evidence: Evidence) -> bool:
    """Whether an arm beats the base model by what is recycled, and does not lose to the target."""
    return (
        not evidence.arms[name].has_target
        and evidence.beats(name, evidence.base)
        and not evidence.loses_to(name, evidence.target)
    )


def _claim_over_base(name: str, evidence: Evidence) -> Claim:
    """What can be said of an arm that beats the base model, and nothing of the target LoRA."""
    better = "Recycling helps over the base model"
    figures = wording.against_base(name, evidence)
    control = evidence.control_of(name)
    if not control:
        said = f"{better}, {NO_CONTROL}: {figures}; {_open(name, evidence)}."
        return Claim(VerdictKind.NO_CONTROL, said, name)
    figures = f"{figures}; {wording.rival(name, control, evidence)}; {_open(name, evidence)}"
    if not evidence.beats(name, control):
        said = f"{better}, but not measurably more than random adapters do: {figures}."
        return Claim(VerdictKind.REGULARISATION, said, name)
    return Claim(
        VerdictKind.HELPS_OVER_BASE,
        f"{better}, by more than random adapters do, but whether it does better or worse than your "
        f"own LoRA is open: {figures}.",
        name,
    )


def _matching(evidence: Evidence) -> list[str]:
    """The arms that match the target LoRA, the one to name first."""
    found = [name for name, p_value in evidence.matching.items() if p_value < ALPHA]
    return sorted(found, key=lambda n: (evidence.arms[n].has_target, evidence.matching[n]))


def _matches(name: str, evidence: Evidence) -> str:
    parts = [wording.matching_target(name, evidence), _base(name, evidence)]
    if evidence.control_of(name):
        parts.append(_controls(name, evidence))
    gain = any(evidence.beats(one, evidence.base) for one in (name, str(evidence.target)))
    but = "" if gain else ", but neither is measurably better than the base model"
    return (
        f"Recycling does as well as your own LoRA, to within {wording.margin(evidence)}{but}: "
        f"{'; '.join(parts)}."
    )


def _base(name: str, evidence: Evidence) -> str:
    return wording.rival(name, str(evidence.base), evidence)


def _controls(name: str, evidence: Evidence) -> str:
    rivals = [rival for rival in (evidence.control_of(name), evidence.rescaled) if rival]
    return "; ".join(wording.rival(name, rival, evidence) for rival in rivals)


def _open(name: str, evidence: Evidence) -> str:
    target = str(evidence.target)
    return f"{wording.rival(name, target, evidence)}; {_would_tell(name, evidence)}"


def _would_tell(name: str, evidence: Evidence) -> str:
    return wording.rows_that_would_tell(name, str(evidence.target), evidence)


# --- what stands beside ---------------------------------------------------------------------------


def _notes(kind: VerdictKind, evidence: Evidence, relevant: Sequence[Relevant]) -> list[str]:
    if kind is VerdictKind.INCOMPLETE:
        return []
    notes = [_scope(evidence)]
    if len(evidence.recycled) > 1:
        notes.append(
            f"{len(evidence.recycled)} ways to recycle were compared "
            f"({wording.listed(evidence.recycled)}); p-values allow for that."
        )
    if evidence.unscored:
        names = [arm.name for arm in evidence.unscored]
        notes.append(f"Not compared, since not all of it could be scored: {wording.listed(names)}.")
    told = relevant[1:] if kind is VerdictKind.RELEVANT_ADAPTER else relevant
    notes += [
        f"The pool holds an adapter that is close to a task: "
        f"{wording.relevant_adapter(one, evidence)}."
        for one in told
    ]
    return notes


def _scope(evidence: Evidence) -> str:
    """What the verdict is about, beyond what was scored."""
    if evidence.over_tasks:
        return (
            f"This speaks of tasks like these {len(evidence.tasks)} and of adapters trained anew: "
            "the tasks' differences are what varies."
        )
    these = "this task" if len(evidence.tasks) == 1 else f"these {len(evidence.tasks)} tasks"
    return (
        f"This speaks of the adapters that were made here, on rows like those of {these}; other "
        f"tasks and other random seeds may differ. To speak of those takes {MANY_TASKS} tasks."
    )


def _figures(evidence: Evidence, relevant: Sequence[Relevant]) -> dict[str, float]:
    """The figures under names such as `accuracy.target` and `p_value.recycled.target`."""
    figures: dict[str, float] = {
        "rows": evidence.rows,
        "tasks": len(evidence.tasks),
        "examples": evidence.design.examples,
        "margin": evidence.design.margin,
    }
    figures.update({f"accuracy.{name}": mean for name, mean in evidence.means.items()})
    for (name, baseline), test in evidence.tests.items():
        if name in evidence.recycled:
            figures.update(_test_figures(f"{name}.{baseline}", test))
    for name, p_value in evidence.matching.items():
        figures[f"adjusted_equivalence_p_value.{name}.{evidence.target}"] = p_value
    for one in relevant:
        figures.update(_test_figures(f"single.{one.task}", one.test))
    return figures


def _test_figures(pair: str, test: PairedTest) -> dict[str, float]:
    low, high = test.interval
    figures = {
        f"difference.{pair}": test.difference,
        f"interval_low.{pair}": low,
        f"interval_high.{pair}": high,
        f"p_value.{pair}": test.p_value,
    }
    if test.adjusted_p_value is not None:
        figures[f"adjusted_p_value.{pair}"] = test.adjusted_p_value
    if test.equivalence_p_value is not None:
        figures[f"equivalence_p_value.{pair}"] = test.equivalence_p_value
    return figures
