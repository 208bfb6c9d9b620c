"""`recycle eval`: score the base model and adapters on tasks, with paired tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import GateNotMet, InputError
from recycle_cli.evaluation.metrics import find_metric
from recycle_cli.evaluation.statistics import few_rows_warning, paired_test, proportion
from recycle_cli.evaluation.tasks import Row, Task, overlap
from recycle_cli.progress import Progress, Silent
from recycle_cli.records import EvaluatedTask, EvaluationDocument
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.answers import Answers, answer_rows
from recycle_cli.workflows.provenance import Clock, shown

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.lora.routed import RoutedAdapter
    from recycle_cli.lora.update import ModelUpdate

BASE = "base"
MIN_PREFIX = 8


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate.

    Args:
        tasks: the tasks; their test part is scored.
        base_model: the canonical name of the base model.
        metric: a metric, or None for each task's own.
        baseline: what everything is compared with: `base`, or one of the adapters by id, folder or
            `sha256:` prefix.
        rows: score this many test rows at most, the first ones, or all with None.
        max_new_tokens: the longest answer that `exact_match` lets the model write.
        allow_overlap: go on where test rows also stand in the training part.
        seed: kept in the document; nothing here is drawn.
    """

    tasks: tuple[Task, ...]
    base_model: str
    metric: str | None = None
    baseline: str = BASE
    rows: int | None = None
    max_new_tokens: int = 30
    allow_overlap: bool = False
    seed: int = 0

    def command(self, sources: Sequence[Source]) -> list[str]:
        """The command line that asks for the same."""
        words = ["recycle", "eval", *(source.word for source in sources)]
        for task in self.tasks:
            words += ["--task", shown(task.path)]
        words += ["--base-model", self.base_model]
        words += ["--baseline", self.baseline] if self.baseline != BASE else []
        words += ["--metric", self.metric] if self.metric else []
        words += ["--rows", str(self.rows)] if self.rows else []
        words += ["--allow-overlap"] if self.allow_overlap else []
        if self.max_new_tokens != EvalRequest.max_new_tokens:
            words += ["--max-new-tokens", str(self.max_new_tokens)]
        return words


@dataclass(frozen=True)
class Sample:
    """One row's outcome for one adapter; `sha256` is None for the base model."""

    adapter: str
    sha256: str | None
    task: str
    row: int
    input: str
    output: str
    prediction: str
    correct: bool


@dataclass(frozen=True)
class Evaluated:
    """The documents of an evaluation, and the outcome of every row."""

    documents: list[EvaluationDocument]
    samples: list[Sample]


@dataclass(frozen=True)
class _Scored:
    source: Source | None
    answers: Answers

    @property
    def name(self) -> str:
        return self.source.ref.id if self.source else BASE


def evaluate(
    request: EvalRequest, sources: Sequence[Source], base: "BaseModel", progress: Progress
) -> Evaluated:
    """Scores the base model and every adapter on every task, on the same rows.

    Raises:
        InputError: a task has no test part or leaks it, a metric does not fit, or the baseline is
            none of the adapters.
    """
    baseline = _find_baseline(request, sources)
    prepared = [(task, *_prepare(request, task)) for task in request.tasks]
    updates = [None, *(source.load_to_score(request.base_model) for source in sources)]
    documents, samples = [], []
    for task, rows, metric in prepared:
        clock = Clock()
        progress.stage(f"scoring {len(updates)} models on {task.name}", len(updates))
        scored = []
        for source, update in zip([None, *sources], updates, strict=True):
            answers = _answer(request, base, update, rows, metric)
            scored.append(_Scored(source, answers))
            share = sum(answers.correct) / len(rows)
            progress.advance(f"{scored[-1].name} {share:.3f}")
        against = next(one for one in scored if one.source is baseline)
        table = _Table(request, sources, task, metric, against, clock)
        documents += [table.document(one) for one in scored]
        samples += [sample for s in scored for sample in _samples(s, task, rows)]
    return Evaluated(documents, samples)


def check_request(
    request: EvalRequest, sources: Sequence[Source], fail_under: Sequence[str] = ()
) -> None:
    """Checks, before anything is loaded, that the request and the gates make sense.

    Raises:
        InputError: as `evaluate`; or a gate is not METRIC=VALUE with a metric that is computed
            here and a value from 0 to 1, or there is no adapter to ask.
    """
    _find_baseline(request, sources)
    computed = {_prepare(request, task)[1] for task in request.tasks}
    gates = [_parse_gate(text) for text in fail_under]
    if gates and not sources:
        raise InputError("--fail-under asks adapters, and none is named", "name one")
    for metric, _ in gates:
        if metric not in computed:
            raise InputError(
                f"--fail-under names {metric!r}", f"computed here: {', '.join(sorted(computed))}"
            )


def check_gates(documents: Sequence[EvaluationDocument], fail_under: Sequence[str]) -> None:
    """Asks every adapter (not the base model) whether it meets the gates.

    Raises:
        GateNotMet: an adapter is below a value.
    """
    for metric, floor in map(_parse_gate, fail_under):
        for document in documents:
            value = document.metrics.get(metric, floor)
            if not isinstance(document.adapter, str) and value < floor:
                raise GateNotMet(
                    f"{document.adapter.id} has {metric} {value:.4f} on {document.task.name}, "
                    f"below {floor:g}",
                    "the gate --fail-under is not met",
                )


def _parse_gate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    find_metric(name)
    try:
        floor = float(value)
    except ValueError:
        floor = math.nan
    if not 0 <= floor <= 1:  # nor is NaN
        raise InputError(f"--fail-under is {text!r}", "write it as in acc=0.8, from 0 to 1")
    return name, floor


def _find_baseline(request: EvalRequest, sources: Sequence[Source]) -> Source | None:
    """The adapter that is the baseline, named as adapters are; None for the base model."""
    name = request.baseline
    if name == BASE:
        return None
    path, digest = str(Path(name).absolute()), name.removeprefix("sha256:")
    found = [
        source
        for source in sources
        if name == source.ref.id
        or path == source.ref.path
        or (len(digest) >= MIN_PREFIX and source.ref.sha256.startswith(digest))
    ]
    if len(found) != 1:
        known = ", ".join(source.word for source in sources)
        count = "none" if not found else "more than one"
        raise InputError(
            f"the baseline {name!r} is {count} of the adapters",
            f"use base, or one of: {known or 'none'}",
        )
    return found[0]


def _prepare(request: EvalRequest, task: Task) -> tuple[tuple[Row, ...], str]:
    """The rows to score and the metric to score them by."""
    if not task.test:
        raise InputError(
            f"task {task.name} has no test rows", "give a folder with a test.jsonl, or a task.yaml"
        )
    metric = request.metric or task.metric
    if find_metric(metric).needs_choices and not all(row.choices for row in task.test):
        raise InputError(
            f"--metric {metric} needs choices in every row of {task.name}",
            "use --metric exact_match",
        )
    leaked = overlap(task.train, task.test)
    if leaked.count and not request.allow_overlap:
        raise InputError(
            f"{leaked.count} test rows of {task.name} also stand in its training rows, such as "
            f"{leaked.examples[0]!r}",
            "remove them from train.jsonl, or accept it: --allow-overlap",
        )
    return task.test[: request.rows], metric


def _answer(
    request: EvalRequest,
    base: "BaseModel",
    update: "ModelUpdate | RoutedAdapter | None",
    rows: Sequence[Row],
    metric: str,
) -> Answers:
    return answer_rows(base, update, rows, metric, Silent(), request.max_new_tokens)


@dataclass(frozen=True)
class _Table:
    """What the documents of one task have in common."""

    request: EvalRequest
    sources: Sequence[Source]
    task: Task
    metric: str
    baseline: _Scored
    clock: Clock

    def document(self, one: _Scored) -> EvaluationDocument:
        """The document of one adapter, or of the base model."""
        task, metric, baseline = self.task, self.metric, self.baseline
        estimate = proportion(one.answers.correct)
        few = few_rows_warning(estimate.rows)
        return EvaluationDocument(
            adapter=one.source.ref if one.source else "base",
            base_model=self.request.base_model,
            task=EvaluatedTask(
                name=task.name,
                sha256=task.sha256,
                path=str(task.path),
                rows=estimate.rows,
                split="test",
            ),
            metrics={metric: estimate.value},
            stderr={metric: estimate.stderr},
            interval={metric: estimate.interval},
            paired=None
            if one is baseline
            else paired_test(one.answers.correct, baseline.answers.correct, baseline.name, metric),
            warnings=[few] if few else [],
            **self.clock.fields(self.request.seed, self.request.command(self.sources)),
        )


def _samples(scored: _Scored, task: Task, rows: Sequence[Row]) -> list[Sample]:
    sha256 = scored.source.ref.sha256 if scored.source else None
    answers = zip(rows, scored.answers.predictions, scored.answers.correct, strict=True)
    return [
        Sample(scored.name, sha256, task.name, number, row.input, row.output, prediction, correct)
        for number, (row, prediction, correct) in enumerate(answers)
    ]
