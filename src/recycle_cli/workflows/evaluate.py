"""`recycle eval`: score the base model, adapters and merged models, with paired tests."""

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError
from recycle_cli.evaluation.tasks import Task
from recycle_cli.progress import Progress
from recycle_cli.records import EvaluationDocument
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.evaluate_models import BASE, Contender, MergedModel, find_contender
from recycle_cli.workflows.evaluate_results import Ask, AskedTask, Result, TaskOptions
from recycle_cli.workflows.evaluate_tables import Scored, compared, mean_documents
from recycle_cli.workflows.evaluate_tasks import ask, check_no_task_twice
from recycle_cli.workflows.provenance import Clock, shown

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.evaluation.lm_eval_names import NamedTask


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate.

    Args:
        tasks: tasks of one's own, whose test part is scored, and lm-eval's.
        base_model: the canonical name of the base model.
        metric: a metric, or None for each task's own.
        baseline: what everything is compared with: `base`, or one of the adapters by id, folder or
            `sha256:` prefix.
        rows: score this many rows of each task at most, the first ones, or all with None.
        max_new_tokens: the longest answer that the model may write on a task of one's own.
        allow_overlap: go on where test rows also stand in the training part.
        seed: of resamples.
        models: models with a merge in their weights, scored beside the adapters.
        likelihoods: also score the right answers where text is generated, which costs a pass more.
        apply_chat_template: put the prompts of lm-eval's tasks into the model's chat template.
        num_fewshot: with how many examples lm-eval's tasks were loaded, where that was asked for.
        include_path: the folder with more of lm-eval's tasks.
    """

    tasks: "tuple[Task | NamedTask, ...]"
    base_model: str
    metric: str | None = None
    baseline: str = BASE
    rows: int | None = None
    max_new_tokens: int = 30
    allow_overlap: bool = False
    seed: int = 0
    models: tuple[MergedModel, ...] = ()
    likelihoods: bool = False
    apply_chat_template: bool = False
    num_fewshot: int | None = None
    include_path: str | None = None

    def command(self, sources: Sequence[Source]) -> list[str]:
        """The command line that asks for the same."""
        words = ["recycle", "eval", *(one.word for one in sources)]
        words += [model.word for model in self.models]
        for task in self.tasks:
            words += ["--task", shown(task.path) if isinstance(task, Task) else task.name]
        words += ["--base-model", self.base_model]
        words += ["--baseline", self.baseline] if self.baseline != BASE else []
        words += ["--metric", self.metric] if self.metric else []
        words += ["--rows", str(self.rows)] if self.rows else []
        words += ["--allow-overlap"] if self.allow_overlap else []
        words += ["--apply-chat-template"] if self.apply_chat_template else []
        words += ["--include-path", self.include_path] if self.include_path else []
        if self.num_fewshot is not None:
            words += ["--num-fewshot", str(self.num_fewshot)]
        words += ["--seed", str(self.seed)] if self.seed else []
        if self.max_new_tokens != EvalRequest.max_new_tokens:
            words += ["--max-new-tokens", str(self.max_new_tokens)]
        return words

    def asked(self, progress: Progress | None = None) -> list[AskedTask]:
        """The tasks with the way that they are asked.

        Raises:
            InputError: a task has no test part or leaks it, or the metric does not fit.
        """
        options = TaskOptions(
            metric=self.metric,
            rows=self.rows,
            max_new_tokens=self.max_new_tokens,
            allow_overlap=self.allow_overlap,
            likelihoods=self.likelihoods,
            apply_chat_template=self.apply_chat_template,
            **({"hear": progress.detail} if progress else {}),
        )
        return [ask(task, options) for task in self.tasks]


@dataclass(frozen=True)
class Sample:
    """One row's outcome for one adapter; `sha256` is None for the base model.

    `score` is by the metric that adapters are compared by, null where that says nothing of a single
    row, and `correct` whether it is 1. Log-likelihoods are in nats: of each choice, and of the
    right answer where it was scored.
    """

    adapter: str
    sha256: str | None
    task: str
    row: int
    input: str
    output: str
    prediction: str
    correct: bool
    metric: str
    score: float | None
    log_likelihoods: tuple[float, ...]
    answer_log_likelihood: float | None


@dataclass(frozen=True)
class Evaluated:
    """The documents of an evaluation, and the outcome of every row; `scored` is what they were made
    from, for gates."""

    documents: list[EvaluationDocument]
    samples: list[Sample]
    scored: list[Scored] = field(default_factory=list)


def evaluate(
    request: EvalRequest, sources: Sequence[Source], base: "BaseModel", progress: Progress
) -> Evaluated:
    """Scores the base model, every adapter and every merged model on every task, on the same rows.

    Adapters are put on the loaded model and taken off again; merged models are loaded one at a
    time. Nothing that one of them answered is kept for the next.

    Raises:
        InputError: a task has no test part or leaks it, a metric does not fit, an adapter cannot be
            used, or the baseline is none of them.
    """
    contenders = contenders_of(request, sources)
    baseline = find_contender(request.baseline, contenders, "the baseline")
    tasks = request.asked(progress)
    for one in contenders:
        one.check(request.base_model, base)
    progress.stage(f"scoring {_counted(request, contenders)}", len(contenders) * len(tasks))
    prepared = [task.prepare(base) for task in tasks]
    scored = []
    for one in contenders:
        for number, result, clock in _answered(one, request, base, tasks, prepared, progress):
            run = clock.fields(request.seed, request.command(sources))
            run["versions"]["lm-eval"] = importlib.metadata.version("lm_eval")
            scored.append(Scored(one, number, result, run))
    documents = compared(scored, baseline, request.base_model, request.seed)
    documents += mean_documents(scored, baseline, request.base_model, request.seed)
    return Evaluated(documents, [s for one in scored for s in _samples(one)], scored)


def _answered(
    one: Contender,
    request: EvalRequest,
    base: "BaseModel",
    tasks: Sequence[AskedTask],
    prepared: Sequence[Ask],
    progress: Progress,
) -> Iterator[tuple[int, Result, Clock]]:
    """One contender's results on every task, with a clock that started with the task.

    A function of its own, so that a merged model is let go of before the next is loaded.
    """
    with one.on(base, request.base_model) as model:
        for number, task in enumerate(tasks):
            clock = Clock()
            ask_model = prepared[number] if model is base else task.prepare(model)
            results = ask_model()
            yield from ((number, result, clock) for result in results)
            progress.advance(f"{one.name} {_headline(results)}")


def contenders_of(request: EvalRequest, sources: Sequence[Source]) -> list[Contender]:
    """All that are scored, the base model first."""
    return [Contender(None), *map(Contender, sources), *map(Contender, request.models)]


def check_request(request: EvalRequest, sources: Sequence[Source]) -> set[str]:
    """Checks, before anything is loaded, that the request makes sense.

    Returns:
        The names of all metrics that it computes.

    Raises:
        InputError: as `evaluate`; a task is named twice; or an option is given that no task takes.
    """
    find_contender(request.baseline, contenders_of(request, sources), "the baseline")
    check_no_task_twice(request.tasks)
    if all(isinstance(task, Task) for task in request.tasks):
        for option, given in (
            ("--num-fewshot", request.num_fewshot is not None),
            ("--apply-chat-template", request.apply_chat_template),
        ):
            if given:
                raise InputError(
                    f"{option} is for lm-eval's tasks, and none is named",
                    "leave it out: a task of your own is asked as its rows are, in the model's "
                    "chat template",
                )
    return set[str]().union(*(task.metrics() for task in request.asked()))


def _counted(request: EvalRequest, contenders: Sequence[Contender]) -> str:
    models = "1 model" if len(contenders) == 1 else f"{len(contenders)} models"
    names = [task.name for task in request.tasks]
    return f"{models} on {names[0] if len(names) == 1 else f'{len(names)} tasks'}"


def _headline(results: Sequence[Result]) -> str:
    first = results[0]
    return f"{first.metrics.get(first.metric, 0.0):.3f}"


def _samples(scored: Scored) -> list[Sample]:
    one, result = scored.contender, scored.result
    return [
        Sample(
            adapter=one.name,
            sha256=one.ref.sha256 if one.ref else None,
            task=result.task.name,
            row=number,
            input=row.input,
            output=row.output,
            prediction=row.prediction,
            correct=row.score == 1,
            metric=result.metric,
            score=row.score,
            log_likelihoods=row.log_likelihoods,
            answer_log_likelihood=row.answer_log_likelihood,
        )
        for number, row in enumerate(result.rows)
    ]
