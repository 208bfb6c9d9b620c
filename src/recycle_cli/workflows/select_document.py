"""The document of a selection, and who came after those that were taken."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recycle_cli.evaluation.tasks import Task
from recycle_cli.records import (
    AdapterRef,
    ScoredAdapter,
    SelectionCost,
    SelectionDocument,
    TaskRef,
)
from recycle_cli.selection.catalog import find_selection_method
from recycle_cli.selection.ranking import Score, rank
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.provenance import Clock
from recycle_cli.workflows.select_outcome import Outcome
from recycle_cli.workflows.select_request import SelectRequest


@dataclass(frozen=True)
class Selection:
    """A ranking cut at k.

    Args:
        document: what is printed.
        below: the adapters below the cut, best first.
    """

    document: SelectionDocument
    below: tuple[ScoredAdapter, ...]


def selection_of(
    request: SelectRequest, pool: Sequence[Source], outcome: Outcome, clock: Clock
) -> Selection:
    """Puts scored adapters in order and takes the first k, a target LoRA that was asked for
    included."""
    target = request.target
    first = [target.ref] if target and request.include_target else []
    ranking = rank(outcome.scores, max(0, request.k - len(first)))
    refs = {source.ref.sha256: source.ref for source in pool}
    method = find_selection_method(request.method)
    task = request.task
    document = SelectionDocument(
        task=_named(task) if task else None,
        base_model=request.base_model,
        method=request.method,
        k=request.k,
        scored_on=request.score_on if method.needs_task else None,
        adapters=[
            *(ScoredAdapter(**ref.model_dump(), score=None, role="target") for ref in first),
            *_scored(request, ranking.taken, refs),
        ],
        target=target.ref if target else None,
        left_out=list(outcome.left_out),
        tied_at_cut=ranking.tied_at_cut,
        cost=SelectionCost(
            passes=outcome.passes,
            elapsed_s=clock.elapsed_s,
            rows_scored=outcome.rows_scored,
            rows_of_full=outcome.rows_of_full,
            agreement=outcome.agreement,
        ),
        **clock.fields(request.seed, request.command(pool)),
    )
    return Selection(document, tuple(_scored(request, ranking.below, refs)))


def _scored(
    request: SelectRequest, scores: Sequence[Score], refs: Mapping[str, AdapterRef]
) -> list[ScoredAdapter]:
    answers_rows = find_selection_method(request.method).needs == "rows"
    return [
        ScoredAdapter(
            **refs[score.sha256].model_dump(),
            score=score.value,
            log_likelihood=score.tie_breaker if answers_rows else None,
        )
        for score in scores
    ]


def _named(task: Task) -> TaskRef:
    return TaskRef(name=task.name, sha256=task.sha256, path=str(task.path), revision=task.revision)
