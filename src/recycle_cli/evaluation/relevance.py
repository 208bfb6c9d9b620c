"""Does the pool hold an adapter that was made for something close to the task?

The paper (arXiv 2602.12323) finds that recycling pays where the pool holds a highly relevant
adapter. One is, here, if as it is, untrained, it goes more than half of the way from the base model
to the LoRA that was trained on the task.
"""

from dataclasses import dataclass, replace

from recycle_cli.evaluation.arms import Role
from recycle_cli.evaluation.comparison import compare
from recycle_cli.evaluation.differences import Rows
from recycle_cli.evaluation.evidence import ALPHA, Evidence
from recycle_cli.evaluation.statistics import MIN_ROWS, holm
from recycle_cli.records import PairedTest

HALF_WAY = "half-way from base to target"


@dataclass(frozen=True)
class Relevant:
    """An adapter of the pool that is close to a task.

    Args:
        adapter: its id; None where it is not known.
        task: the task.
        alone: its mean score as it is, in [0, 1].
        base: that of the base model.
        target: that of the target LoRA.
        test: its score against the midpoint of the two; the adjusted p-value is that of both
            claims, this one and that the target LoRA beats the base model.
    """

    adapter: str | None
    task: str
    alone: float
    base: float
    target: float
    test: PairedTest


def relevant_adapters(evidence: Evidence) -> list[Relevant]:
    """The tasks that the pool holds a relevant adapter for, the clearest first.

    Of every task two things are asked: that the target LoRA beats the base model, or half of the
    way between them would be nothing, and that the adapter beats the midpoint. Both must hold, so
    the larger p-value is that of the claim; Holm's correction is over tasks. Where there are
    several arms of single adapters, the first is asked.
    """
    single = next((a.name for a in evidence.arms.values() if a.role is Role.SINGLE), None)
    if single is None or evidence.base is None or evidence.target is None:
        return []
    tasks = [task for task in evidence.tasks if evidence.scores[single][task].size >= MIN_ROWS]
    found = [_ask(evidence, task, single, evidence.base, evidence.target) for task in tasks]
    adjusted = holm([p_value for _, p_value in found])
    shown = [
        (p_value, _with_adjusted(one, p_value))
        for (one, _), p_value in zip(found, adjusted, strict=True)
        if one is not None and p_value < ALPHA
    ]
    return [one for _, one in sorted(shown, key=lambda pair: (pair[0], -pair[1].test.difference))]


def _ask(
    evidence: Evidence, task: str, single: str, base: str, target: str
) -> tuple[Relevant | None, float]:
    """The adapter where it and the target LoRA are ahead, and the p-value of both being so."""
    alone, low, high = (evidence.scores[name][task] for name in (single, base, target))
    design = evidence.design

    def compared(ours: Rows, baseline: Rows, name: str) -> PairedTest:
        return compare(
            {task: ours},
            {task: baseline},
            baseline_name=name,
            metric=design.metric,
            seed=design.seed,
            draws=design.draws,
        )

    training = compared(high, low, base)
    test = compared(alone, (low + high) / 2, HALF_WAY)
    if training.difference <= 0 or test.difference <= 0:
        return None, 1.0
    relevant = Relevant(
        adapter=design.relevance.get(task),
        task=task,
        alone=float(alone.mean()),
        base=float(low.mean()),
        target=float(high.mean()),
        test=test,
    )
    return relevant, max(training.p_value, test.p_value)


def _with_adjusted(relevant: Relevant, p_value: float) -> Relevant:
    test = relevant.test.model_copy(update={"adjusted_p_value": p_value})
    return replace(relevant, test=test)
