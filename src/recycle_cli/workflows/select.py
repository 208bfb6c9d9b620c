"""`recycle select`: score the pool for a task and take the best."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from recycle_cli.errors import RecycleError
from recycle_cli.progress import Progress
from recycle_cli.records import (
    AdapterRef,
    LeftOut,
    ScoredAdapter,
    SelectionCost,
    SelectionDocument,
    TaskRef,
)
from recycle_cli.selection.catalog import (
    CARD,
    HALVING,
    NORMALISED,
    RANDOM,
    find_selection_method,
)
from recycle_cli.selection.ranking import Score, rank
from recycle_cli.selection.shuffle import random_score
from recycle_cli.settings import Settings
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.provenance import Clock
from recycle_cli.workflows.select_outcome import Outcome
from recycle_cli.workflows.select_request import SelectRequest, check_request

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.lora.update import ModelUpdate
    from recycle_cli.store.catalog import AdapterQuery

Shapes = Mapping[str, Mapping[str, tuple[int, int]]]
"""The sha256 of an adapter -> module path -> (out, in)."""
OPEN_AT_ONCE = 128
"""Adapters whose files are open at the same time."""


def pool_of(
    base_model: str, settings: Settings, query: "AdapterQuery | None" = None
) -> list[Source]:
    """The accepted adapters of a base model in the index.

    Args:
        base_model: the canonical name of the base model.
        settings: where the index is.
        query: what else they have to be; None for all.

    Raises:
        RecycleError: there is none.
    """
    from recycle_cli.store.catalog import AdapterQuery, Catalog

    with Catalog(settings.catalog_file) as catalog:
        rows = catalog.query(replace(query or AdapterQuery(), base_model=base_model))
    pool = [
        Source(AdapterRef(id=row.id, revision=row.revision, sha256=row.sha256, path=row.path))
        for row in rows
        if row.sha256 and row.path
    ]
    if not pool:
        raise RecycleError(
            f"the index holds no adapter of {base_model}"
            + (" that is asked for" if query and query != AdapterQuery() else ""),
            f"crawl adapters first: recycle crawl hub --base-model {base_model}, or a folder",
        )
    return pool


def select(
    request: SelectRequest,
    pool: Sequence[Source],
    base: "BaseModel | None",
    settings: Settings,
    progress: Progress,
) -> SelectionDocument:
    """Ranks a pool.

    Args:
        request: what to select.
        pool: the adapters to rank; a target LoRA among them is not ranked.
        base: the loaded base model, where `request.runs_model_here`.
        settings: where the index is, in which answers are kept.
        progress: told of every adapter scored.

    Raises:
        InputError: as `check_request`.
        RecycleError: none of the adapters could be ranked.
        ValueError: the base model is needed here, and is not given.
    """
    clock = Clock()
    check_request(request, pool)
    method = find_selection_method(request.method)
    if request.runs_model_here and base is None:
        raise ValueError(f"{request.method} runs the base model, and there is none")
    target = request.target.ref.sha256 if request.target else None
    ranked = [source for source in pool if source.ref.sha256 != target]
    if method.needs == "rows":
        outcome = _by_rows(request, ranked, base, settings, progress)
    elif method.needs == "gradient":
        assert base is not None
        outcome = _by_gradient(request, ranked, base, progress)
    elif method.needs == "target":
        outcome = _by_target(request, ranked, progress)
    elif method.needs == "index":
        outcome = _by_index(request, ranked, settings)
    else:
        outcome = _by_themselves(request, ranked)
    if not outcome.scores:
        first = outcome.left_out[0] if outcome.left_out else LeftOut(id="-", reason="none was left")
        raise RecycleError(
            f"none of the {len(pool)} adapters could be ranked; {first.id}: {first.reason}",
            "see recycle index list, and crawl adapters of this base model",
        )
    return _document(request, pool, outcome, clock)


def _by_rows(
    request: SelectRequest,
    pool: Sequence[Source],
    base: "BaseModel | None",
    settings: Settings,
    progress: Progress,
) -> Outcome:
    from recycle_cli.store.answers import AnswerBook
    from recycle_cli.workflows.scorers import scoring_hands
    from recycle_cli.workflows.select_rows import RowScores, evaluate, halve

    assert request.task is not None
    metric, workers, ray = request.task.metric, request.workers, request.ray
    with (
        AnswerBook(settings.catalog_file) as book,
        scoring_hands(base, request.base_model, metric, settings, workers, ray) as hands,
    ):
        if request.elsewhere:
            progress.stage("loading the base model")
        scores = RowScores(book, hands, progress)
        return (halve if request.method == HALVING else evaluate)(request, pool, scores)


def _by_gradient(
    request: SelectRequest, pool: Sequence[Source], base: "BaseModel", progress: Progress
) -> Outcome:
    """One pass of the base model, then the products of its gradients with every update."""
    from recycle_cli.engine.encoding import encode_examples
    from recycle_cli.engine.gradients import factor_dtype, weight_gradients
    from recycle_cli.lora.norm import module_norms, total_norm
    from recycle_cli.selection.first_order import slopes

    rows = request.rows_to_score()
    shapes, left_out = _fitting(request, pool, base)
    modules = {module for of_source in shapes.values() for module in of_source}
    progress.stage("one gradient of the base model")
    gradients = weight_gradients(base, encode_examples(base, rows), sorted(modules), progress)
    normalise = request.method == NORMALISED
    precision = factor_dtype(base)

    def score(updates: "Sequence[ModelUpdate]") -> list[float]:
        found = [-slope for slope in slopes(gradients, updates, precision)]
        if not normalise:
            return found
        norms = [total_norm(module_norms(update)) for update in updates]
        return [one / norm if norm else 0.0 for one, norm in zip(found, norms, strict=True)]

    scores = _scored(request, _those(pool, shapes), score, progress)
    return Outcome(scores, left_out, passes=1, rows_scored=len(rows))


def _by_target(request: SelectRequest, pool: Sequence[Source], progress: Progress) -> Outcome:
    from recycle_cli.selection.similarity import Target, similarity

    assert request.target is not None
    target = Target(request.target.load(request.base_model))

    def score(updates: "Sequence[ModelUpdate]") -> list[float]:
        return [similarity(update, target, request.method, request.aggregate) for update in updates]

    usable, left_out = _usable(request, pool)
    return Outcome(_scored(request, _those(pool, usable), score, progress), left_out)


def _scored(
    request: SelectRequest,
    pool: Sequence[Source],
    score: "Callable[[Sequence[ModelUpdate]], list[float]]",
    progress: Progress,
) -> list[Score]:
    """Scores from updates, which are read module by module, some adapters at a time."""
    progress.stage(f"comparing {len(pool)} adapters", len(pool))
    scores = []
    for start in range(0, len(pool), OPEN_AT_ONCE):
        part = pool[start : start + OPEN_AT_ONCE]
        with ExitStack() as stack:
            opened = [stack.enter_context(source.open(request.base_model)) for source in part]
            values = score([one.update for one in opened])
        for source, value in zip(part, values, strict=True):
            scores.append(Score(source.ref.sha256, value))
            progress.advance(f"{source.ref.id} {value:.4g}")
    return scores


def _usable(request: SelectRequest, pool: Sequence[Source]) -> tuple[Shapes, list[LeftOut]]:
    """The adapters that can be opened, with their shapes, and the others, with the reason."""
    usable, left_out = {}, []
    for source in pool:
        try:
            usable[source.ref.sha256] = source.shapes(request.base_model)
        except RecycleError as error:
            left_out.append(LeftOut(id=source.ref.id, reason=error.message))
    return usable, left_out


def _fitting(
    request: SelectRequest, pool: Sequence[Source], base: "BaseModel"
) -> tuple[Shapes, list[LeftOut]]:
    """The adapters whose modules are those of the base model, with their shapes; and the others."""
    usable, left_out = _usable(request, pool)
    there, fitting = base.shapes, {}
    for source in _those(pool, usable):
        shapes = usable[source.ref.sha256]
        wrong = [module for module, shape in shapes.items() if there.get(module) != shape]
        if wrong:
            reason = f"{wrong[0]} is not in {request.base_model}, or has another shape there"
            left_out.append(LeftOut(id=source.ref.id, reason=reason))
        else:
            fitting[source.ref.sha256] = shapes
    return fitting, left_out


def _those(pool: Sequence[Source], shapes: Shapes) -> list[Source]:
    """The adapters of a pool that have shapes here."""
    return [source for source in pool if source.ref.sha256 in shapes]


def _by_index(request: SelectRequest, pool: Sequence[Source], settings: Settings) -> Outcome:
    """Scores from what the index holds: downloads, or the words of cards."""
    from recycle_cli.selection.words import words_of
    from recycle_cli.store.catalog import AdapterQuery, Catalog

    with Catalog(settings.catalog_file) as catalog:
        if request.method == CARD:
            assert request.task is not None
            texts = [f"{row.input} {row.output}" for row in request.rows_to_score()]
            found = catalog.relevance(words_of([request.task.name, *texts]))
            scores = [Score(s.ref.sha256, found.get(s.ref.sha256, 0.0)) for s in pool]
            return Outcome(scores)
        rows = catalog.query(AdapterQuery())
    counts: Mapping[str | None, int | None] = {row.sha256: row.downloads for row in rows}
    scores, left_out = [], []
    for source in pool:
        count = counts.get(source.ref.sha256)
        if count is None:
            left_out.append(LeftOut(id=source.ref.id, reason="nobody counted its downloads"))
        else:
            scores.append(Score(source.ref.sha256, float(count)))
    return Outcome(scores, left_out)


def _by_themselves(request: SelectRequest, pool: Sequence[Source]) -> Outcome:
    if request.method == RANDOM:
        return Outcome(
            [Score(s.ref.sha256, random_score(s.ref.sha256, request.seed)) for s in pool]
        )
    usable, left_out = _usable(request, pool)
    scores = [
        Score(s.ref.sha256, float(s.largest_rank(request.base_model))) for s in _those(pool, usable)
    ]
    return Outcome(scores, left_out)


def _document(
    request: SelectRequest, pool: Sequence[Source], outcome: Outcome, clock: Clock
) -> SelectionDocument:
    target = request.target
    first = [target.ref] if target and request.include_target else []
    ranking = rank(outcome.scores, max(0, request.k - len(first)))
    refs = {source.ref.sha256: source.ref for source in pool}
    method = find_selection_method(request.method)
    task = request.task
    taken = [
        ScoredAdapter(
            **refs[score.sha256].model_dump(),
            score=score.value,
            log_likelihood=score.tie_breaker if method.needs == "rows" else None,
        )
        for score in ranking.taken
    ]
    return SelectionDocument(
        task=TaskRef(name=task.name, sha256=task.sha256, path=str(task.path)) if task else None,
        base_model=request.base_model,
        method=request.method,
        k=request.k,
        scored_on=request.score_on if method.needs_task else None,
        adapters=[
            *(ScoredAdapter(**ref.model_dump(), score=None, role="target") for ref in first),
            *taken,
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
