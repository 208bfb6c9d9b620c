"""`recycle select`: score the pool for a task and take the best."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from recycle_cli.errors import RecycleError
from recycle_cli.progress import Progress
from recycle_cli.records import AdapterRef, LeftOut, SelectionDocument
from recycle_cli.selection.catalog import CARD, HALVING, RANDOM, find_selection_method
from recycle_cli.selection.ranking import Score
from recycle_cli.selection.shuffle import random_score
from recycle_cli.settings import Settings
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.provenance import Clock
from recycle_cli.workflows.select_document import Selection, selection_of
from recycle_cli.workflows.select_outcome import Outcome
from recycle_cli.workflows.select_request import SelectRequest, check_request
from recycle_cli.workflows.select_updates import by_gradient, by_target, usable

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.store.catalog import AdapterQuery


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
        filtered = query is not None and query != AdapterQuery()
        raise RecycleError(
            f"the index holds no adapter of {base_model}{' that is asked for' * filtered}",
            "see what there is with recycle index list, and ask for less"
            if filtered
            else f"crawl adapters first: recycle crawl hub --base-model {base_model}, or a folder",
        )
    return pool


def select(
    request: SelectRequest,
    pool: Sequence[Source],
    base: "BaseModel | None",
    settings: Settings,
    progress: Progress,
) -> SelectionDocument:
    """The document of `rank_pool`."""
    return rank_pool(request, pool, base, settings, progress).document


def rank_pool(
    request: SelectRequest,
    pool: Sequence[Source],
    base: "BaseModel | None",
    settings: Settings,
    progress: Progress,
) -> Selection:
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
    if request.runs_model_here and base is None:
        raise ValueError(f"{request.method} runs the base model, and there is none")
    target = request.target.ref.sha256 if request.target else None
    ranked = [source for source in pool if source.ref.sha256 != target]
    rows = find_selection_method(request.method).needs == "rows"
    score = _by_rows if rows else _by_what_they_are
    outcome = score(request, ranked, base, settings, progress)
    if not outcome.scores:
        first = outcome.left_out[0] if outcome.left_out else LeftOut(id="-", reason="none was left")
        raise RecycleError(
            f"none of the {len(pool)} adapters could be ranked; {first.id}: {first.reason}",
            "see recycle index list, and crawl adapters of this base model",
        )
    return selection_of(request, pool, outcome, clock)


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


def _by_what_they_are(
    request: SelectRequest,
    pool: Sequence[Source],
    base: "BaseModel | None",
    settings: Settings,
    progress: Progress,
) -> Outcome:
    """Scores of the adapters that can be opened, none of which is run."""
    method = find_selection_method(request.method)
    shapes, unusable = usable(request.base_model, pool)
    there = [source for source in pool if source.ref.sha256 in shapes]
    if method.needs == "gradient":
        assert base is not None
        outcome = by_gradient(request, there, shapes, base, progress)
    elif method.needs == "target":
        outcome = by_target(request, there, shapes, progress)
    elif method.needs == "index":
        outcome = _by_index(request, there, settings)
    else:
        outcome = Outcome([Score(one.ref.sha256, _own_score(request, one)) for one in there])
    return replace(outcome, left_out=[*unusable, *outcome.left_out])


def _by_index(request: SelectRequest, pool: Sequence[Source], settings: Settings) -> Outcome:
    """Scores from what the index holds: downloads, or the words of cards."""
    from recycle_cli.selection.words import words_of
    from recycle_cli.store.catalog import AdapterQuery, Catalog

    with Catalog(settings.catalog_file) as catalog:
        found: dict[str | None, float | None]
        found = {row.sha256: row.downloads for row in catalog.query(AdapterQuery())}
        if request.method == CARD:
            assert request.task is not None
            texts = [f"{row.input} {row.output}" for row in request.rows_to_score()]
            relevance = catalog.relevance(words_of([request.task.name, *texts]))
            found = {sha256: relevance.get(str(sha256), 0.0) for sha256 in found}
    scores, left_out = [], []
    for source in pool:
        value = found.get(source.ref.sha256)
        if value is not None:
            scores.append(Score(source.ref.sha256, float(value)))
            continue
        known = source.ref.sha256 in found
        reason = "nobody counted its downloads" if known else "it is not in the index"
        left_out.append(LeftOut(id=source.ref.id, reason=reason))
    return Outcome(scores, left_out)


def _own_score(request: SelectRequest, source: Source) -> float:
    if request.method == RANDOM:
        return random_score(source.ref.sha256, request.seed)
    return float(source.largest_rank(request.base_model))
