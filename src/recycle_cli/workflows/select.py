"""`recycle select`: score the pool for a task and take the best."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.evaluation.tasks import Row, Task, training_split
from recycle_cli.progress import Progress, Silent
from recycle_cli.records import (
    AdapterRef,
    LeftOut,
    ScoredAdapter,
    SelectionCost,
    SelectionDocument,
    TaskRef,
)
from recycle_cli.selection.catalog import find_selection_method
from recycle_cli.selection.ranking import Score, rank
from recycle_cli.selection.shuffle import random_score
from recycle_cli.settings import Settings
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.answers import Answers, answer_rows
from recycle_cli.workflows.provenance import Clock, shown

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel

ScoreOn = Literal["train", "all"]


@dataclass(frozen=True)
class SelectRequest:
    """What to select.

    Args:
        task: the task to select for; methods that need none take None.
        base_model: the canonical name of the base model.
        method: a name in the selection catalog.
        k: how many adapters to take, at least 1.
        seed: of the split, and of random scores.
        rows: how many of the task's training rows may be used, or None for all.
        score_on: the training part of those rows, or all of them, as the paper does.
        named: whether the pool was named by the user, not taken whole from the index.
    """

    task: Task | None
    base_model: str
    method: str = "evaluation"
    k: int = 10
    seed: int = 0
    rows: int | None = None
    score_on: ScoreOn = "train"
    named: bool = False

    def command(self, pool: Sequence[Source]) -> list[str]:
        """The command line that asks for the same."""
        words = ["recycle", "select"]
        words += [source.word for source in pool] if self.named else []
        words += ["--base-model", self.base_model, "--method", self.method]
        words += ["-k", str(self.k), "--seed", str(self.seed)]
        words += ["--task", shown(self.task.path)] if self.task else []
        words += ["--rows", str(self.rows)] if self.rows else []
        words += ["--score-on", self.score_on] if self.score_on != "train" else []
        return words


@dataclass(frozen=True)
class _Outcome:
    scores: list[Score]
    left_out: list[LeftOut]
    passes: int


def pool_of(base_model: str, settings: Settings) -> list[Source]:
    """All accepted adapters of a base model in the index.

    Raises:
        RecycleError: there is none.
    """
    from recycle_cli.store.catalog import AdapterQuery, Catalog

    with Catalog(settings.catalog_file) as catalog:
        rows = catalog.query(AdapterQuery(base_model=base_model))
    pool = [
        Source(AdapterRef(id=row.id, revision=row.revision, sha256=row.sha256, path=row.path))
        for row in rows
        if row.sha256 and row.path
    ]
    if not pool:
        raise RecycleError(
            f"the index holds no adapter of {base_model}",
            f"crawl a folder of adapters first: recycle crawl FOLDER --base-model {base_model}",
        )
    return pool


def check_request(request: SelectRequest, pool: Sequence[Source]) -> None:
    """Checks, before anything is loaded, that the request makes sense.

    Raises:
        InputError: the method is unknown, lacks a task or has no use for what is asked, the task
            has too few rows, or what was named is no LoRA.
    """
    for source in pool:
        source.check_is_lora()
    method = find_selection_method(request.method)
    if method.needs_task and request.task is None:
        raise InputError(f"--method {method.name} needs a task", "name one with --task")
    if method.needs_task and request.task is not None:
        _rows_to_score(request, request.task)
    elif request.rows is not None or request.score_on != "train":
        raise InputError(
            f"--method {method.name} scores no rows", "leave out --rows and --score-on"
        )


def select(
    request: SelectRequest,
    pool: Sequence[Source],
    base: "BaseModel | None",
    progress: Progress,
) -> SelectionDocument:
    """Ranks a pool.

    Args:
        request: what to select.
        pool: the adapters to rank.
        base: the loaded base model, for methods that run it.
        progress: told of every adapter scored.

    Raises:
        InputError: as `check_request`.
        RecycleError: none of the adapters could be ranked.
        ValueError: the method needs the base model and got none.
    """
    clock = Clock()
    check_request(request, pool)
    if not find_selection_method(request.method).needs_task:
        scores = [Score(s.ref.sha256, random_score(s.ref.sha256, request.seed)) for s in pool]
        outcome = _Outcome(scores, [], 0)
    elif request.task is None or base is None:
        raise ValueError(f"{request.method} runs the base model on a task; one of them is missing")
    else:
        outcome = _evaluate_pool(request, request.task, pool, base, progress)
    if not outcome.scores:
        first = outcome.left_out[0]
        raise RecycleError(
            f"none of the {len(pool)} adapters could be ranked; {first.id}: {first.reason}",
            "see recycle index list, and crawl adapters of this base model",
        )
    return _document(request, pool, outcome, clock)


def _evaluate_pool(
    request: SelectRequest, task: Task, pool: Sequence[Source], base: "BaseModel", report: Progress
) -> _Outcome:
    """One pass over the rows for each adapter; one that does not fit is left out, and why."""
    rows = _rows_to_score(request, task)
    report.stage(f"scoring {len(pool)} adapters on {len(rows)} rows", len(pool))
    scores, left_out = [], []
    for source in pool:
        try:
            update = source.load(request.base_model)
            answers = answer_rows(base, update, rows, task.metric, Silent(), likelihoods=True)
        except RecycleError as error:
            left_out.append(LeftOut(id=source.ref.id, reason=error.message))
            report.advance(f"{source.ref.id} left out")
            continue
        score = _score(source, answers)
        if math.isfinite(score.tie_breaker):
            scores.append(score)
            report.advance(f"{source.ref.id} {score.value:.3f}")
        else:
            left_out.append(LeftOut(id=source.ref.id, reason="its likelihoods are no numbers"))
            report.advance(f"{source.ref.id} left out")
    return _Outcome(scores, left_out, len(scores))


def _rows_to_score(request: SelectRequest, task: Task) -> tuple[Row, ...]:
    train, valid = training_split(task, request.seed, request.rows)
    return train + valid if request.score_on == "all" else train


def _score(source: Source, answers: Answers) -> Score:
    likelihoods = answers.log_likelihoods or [0.0]
    return Score(
        source.ref.sha256,
        sum(answers.correct) / len(answers.correct),
        sum(likelihoods) / len(likelihoods),
    )


def _document(
    request: SelectRequest, pool: Sequence[Source], outcome: _Outcome, clock: Clock
) -> SelectionDocument:
    ranking = rank(outcome.scores, request.k)
    refs = {source.ref.sha256: source.ref for source in pool}
    needs_task = find_selection_method(request.method).needs_task
    task = request.task
    return SelectionDocument(
        task=TaskRef(name=task.name, sha256=task.sha256, path=str(task.path)) if task else None,
        base_model=request.base_model,
        method=request.method,
        k=request.k,
        scored_on=request.score_on if needs_task else None,
        adapters=[
            ScoredAdapter(
                **refs[score.sha256].model_dump(),
                score=score.value,
                log_likelihood=score.tie_breaker if needs_task else None,
            )
            for score in ranking.taken
        ],
        left_out=outcome.left_out,
        tied_at_cut=ranking.tied_at_cut,
        cost=SelectionCost(passes=outcome.passes, elapsed_s=clock.elapsed_s),
        **clock.fields(request.seed, request.command(pool)),
    )
