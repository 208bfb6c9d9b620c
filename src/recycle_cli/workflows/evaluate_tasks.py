"""What `recycle eval` scores on: tasks of one's own and lm-eval's, asked in the same way."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycle_cli.errors import InputError
from recycle_cli.evaluation.metrics import ACC, EXACT_MATCH, GENERATED, PERPLEXITY, find_metric
from recycle_cli.evaluation.tasks import Row, Task, load_task, overlap
from recycle_cli.records import EvaluatedTask

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.evaluation.lm_eval_names import NamedTask
    from recycle_cli.evaluation.lm_eval_run import Figures, Sample, TaskOutcome
    from recycle_cli.evaluation.row_scores import RowScores

# What lm-eval calls `acc` and `acc_norm`. Ours is the second, under both names.
CHOICE_METRICS = {"acc": "acc_norm", "acc_norm": "acc_norm", "acc_sum": "acc"}
# The smallest difference that no rounding explains.
SAME = 1e-9


@dataclass(frozen=True)
class RowResult:
    """One row as one model answered it.

    Args:
        input: the row's text, or the whole prompt of an lm-eval task.
        output: the right answer.
        prediction: the choice or the text that the model gave; empty where it only scored.
        score: by the task's main metric; None where that says nothing of a single row.
        log_likelihoods: of each choice, in nats.
        answer_log_likelihood: of the right answer, where it was scored.
    """

    input: str
    output: str
    prediction: str
    score: float | None
    log_likelihoods: tuple[float, ...] = ()
    answer_log_likelihood: float | None = None


@dataclass(frozen=True)
class Result:
    """What came of one model on one task or group.

    Args:
        task: what was scored.
        metric: the one that models are compared by.
        metrics: name -> value.
        stderr: name -> standard error, where lm-eval gives it.
        higher_is_better: by metric.
        scores: name -> the rows' scores, where the metric has them.
        rows: the rows' answers; empty for a group.
        warnings: what a reader of the figures should know.
    """

    task: EvaluatedTask
    metric: str
    metrics: Mapping[str, float]
    stderr: Mapping[str, float]
    higher_is_better: Mapping[str, bool]
    scores: "Mapping[str, RowScores]"
    rows: Sequence[RowResult] = ()
    warnings: Sequence[str] = ()


Ask = Callable[[], list[Result]]
"""Asks the model with whatever adapter is on it."""


@dataclass(frozen=True)
class TaskOptions:
    """How tasks are asked.

    Args:
        metric: what to compare by, or None for each task's own.
        rows: score this many rows at most, the first ones, or all with None.
        max_new_tokens: the longest answer that the model may write, for a task of one's own.
        allow_overlap: go on where test rows also stand in the training part.
        likelihoods: also score the right answers where text is generated, which costs a pass more.
        apply_chat_template: put the prompts of lm-eval's tasks into the model's chat template.
        hear: is told what lm-eval warns of.
    """

    metric: str | None = None
    rows: int | None = None
    max_new_tokens: int = 30
    allow_overlap: bool = False
    likelihoods: bool = False
    apply_chat_template: bool = False
    hear: Callable[[str], object] = field(default=lambda _: None, compare=False)


class AskedTask(ABC):
    """A task with the way that it is asked."""

    @abstractmethod
    def metrics(self) -> set[str]:
        """The names of what will be measured."""

    @abstractmethod
    def prepare(self, base: "BaseModel") -> Ask:
        """Makes the prompts for a model, once for all adapters of it.

        Raises:
            InputError: a row does not fit into the model's context.
        """


def find_task(
    source: str,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    offline: bool = False,
) -> "Task | NamedTask":
    """The task that a name or path means: a file or a folder, else one of lm-eval's.

    Raises:
        InputError: it is neither, or cannot be loaded.
    """
    from recycle_cli.evaluation.lm_eval_names import load_named_task

    path = Path(source).expanduser()
    if path.exists() or path.suffix in {".jsonl", ".yaml", ".yml"} or "/" in source:
        return load_task(source)
    return load_named_task(source, include_path, num_fewshot, offline)


def ask(task: "Task | NamedTask", options: TaskOptions) -> AskedTask:
    """The task with the way that it is asked.

    Raises:
        InputError: it has no test rows or leaks them, or the metric does not fit.
    """
    return OwnTask(task, options) if isinstance(task, Task) else LmEvalTask(task, options)


class OwnTask(AskedTask):
    """The test rows of a task of one's own, by way of an lm-eval task in memory."""

    def __init__(self, task: Task, options: TaskOptions) -> None:
        self._task, self._options = task, options
        self._metric = options.metric or task.metric
        self._rows = task.test[: options.rows]
        self._warnings: list[str] = []
        self._check()

    def _check(self) -> None:
        task = self._task
        if not task.test:
            raise InputError(
                f"task {task.name} has no test rows",
                "give a folder with a test.jsonl, or a task.yaml",
            )
        if find_metric(self._metric).needs_choices and not all(row.choices for row in task.test):
            raise InputError(
                f"--metric {self._metric} needs choices in every row of {task.name}",
                f"use --metric {EXACT_MATCH}",
            )
        leaked = overlap(task.train, task.test)
        if not leaked.count:
            return
        verb = "row also stands" if leaked.count == 1 else "rows also stand"
        said = f"{leaked.count} of {len(task.test)} test {verb} in the training rows of {task.name}"
        if not self._options.allow_overlap:
            examples = ", ".join(map(repr, leaked.examples))
            raise InputError(
                f"{said}, white space and case apart: {examples}",
                "remove them from train.jsonl, or accept it: --allow-overlap",
            )
        self._warnings.append(f"{said}: scores flatter whatever was trained on them")

    def metrics(self) -> set[str]:
        """See `AskedTask`."""
        return set(CHOICE_METRICS) if self._metric == ACC else {self._metric}

    def prepare(self, base: "BaseModel") -> Ask:
        """See `AskedTask`."""
        from recycle_cli.engine.encoding import encode_questions, prompt_text
        from recycle_cli.evaluation.lm_eval_model import EngineLM
        from recycle_cli.evaluation.lm_eval_run import run
        from recycle_cli.evaluation.lm_eval_task import check_lengths, lm_eval_config, load_config

        alone = encode_questions(base, [replace(row, choices=()) for row in self._rows])
        config = lm_eval_config(
            "task",
            [prompt_text(base, row.input) for row in self._rows],
            self._rows,
            self._metric,
            self._options.max_new_tokens,
            # As the engine writes it: a chat template ends where the answer begins.
            delimiter="" if base.tokenizer.chat_template else " ",
            answer_tokens=[len(one.lead) + len(one.candidates[0]) for one in alone],
        )
        loaded = load_config(config)
        lm = EngineLM(base, own_tasks=True, asks_greedy=False)
        check_lengths(lm, loaded["tasks"]["task"])

        def likelihoods() -> Sequence[float | None]:
            from recycle_cli.engine.scoring import candidate_log_likelihoods

            if self._metric not in GENERATED or not self._options.likelihoods:
                return [None] * len(self._rows)
            return [scores[0] for scores in candidate_log_likelihoods(base, alone)]

        def asked() -> list[Result]:
            (outcome,) = run(lm, loaded, hear=self._options.hear).tasks
            return [self._result(outcome, likelihoods())]

        return asked

    def _result(self, outcome: "TaskOutcome", likelihoods: Sequence[float | None]) -> Result:
        names = CHOICE_METRICS if self._metric == ACC else {self._metric: self._metric}
        scores = {ours: _own_scores(theirs, outcome) for ours, theirs in names.items()}
        return Result(
            task=EvaluatedTask(
                name=self._task.name,
                sha256=self._task.sha256,
                path=str(self._task.path),
                rows=len(self._rows),
                split="test",
            ),
            metric=self._metric,
            metrics={ours: outcome.metrics[theirs] for ours, theirs in names.items()},
            stderr={
                ours: outcome.stderr[theirs]
                for ours, theirs in names.items()
                if theirs in outcome.stderr
            },
            higher_is_better={name: find_metric(self._metric).higher_is_better for name in names},
            scores=scores,
            rows=[
                self._row(row, sample, likelihood)
                for row, sample, likelihood in zip(
                    self._rows, outcome.samples, likelihoods, strict=True
                )
            ],
            warnings=self._warnings,
        )

    def _row(self, row: Row, sample: "Sample", likelihood: float | None) -> RowResult:
        if self._metric == ACC:
            likelihood = sample.log_likelihoods[row.choices.index(row.output)]
        elif self._metric == PERPLEXITY:
            likelihood = sample.log_likelihoods[0]
        return RowResult(
            input=row.input,
            output=row.output,
            prediction=_prediction(sample, per_character=True),
            score=sample.scores.get(CHOICE_METRICS.get(self._metric, self._metric)),
            log_likelihoods=sample.log_likelihoods if self._metric == ACC else (),
            answer_log_likelihood=likelihood,
        )


def _own_scores(metric: str, outcome: "TaskOutcome") -> "RowScores":
    import numpy as np

    from recycle_cli.evaluation.row_scores import RowScores

    if metric == PERPLEXITY:
        sums = np.array([sample.sums[metric] for sample in outcome.samples], dtype=np.float64)
        return RowScores(-sums[:, 0], sums[:, 1])
    return RowScores(np.array([sample.scores[metric] for sample in outcome.samples]))


class LmEvalTask(AskedTask):
    """A task, group or tag of lm-eval."""

    def __init__(self, task: "NamedTask", options: TaskOptions) -> None:
        from recycle_cli.evaluation.lm_eval_names import main_metric

        self._task, self._options = task, options
        for name, reported in task.metrics().items():
            if main_metric(reported, options.metric) is None:
                raise InputError(
                    f"lm-eval's task {name!r} has no metric {options.metric!r}",
                    f"it reports {', '.join(sorted(reported))}",
                )

    def metrics(self) -> set[str]:
        """See `AskedTask`."""
        return set().union(*self._task.metrics().values())

    def prepare(self, base: "BaseModel") -> Ask:
        """See `AskedTask`."""
        from recycle_cli.evaluation.lm_eval_model import EngineLM, asks_greedy
        from recycle_cli.evaluation.lm_eval_run import run

        loaded = self._task.loaded
        chat = self._options.apply_chat_template
        if chat and not base.tokenizer.chat_template:
            raise InputError(
                f"--apply-chat-template: {base.id} has no chat template", "leave the option out"
            )
        lm = EngineLM(base, own_tasks=False, asks_greedy=asks_greedy(loaded))

        def asked() -> list[Result]:
            outcome = run(lm, loaded, self._options.rows, chat, self._options.hear)
            rows = {task.name: len(task.samples) for task in outcome.tasks}
            return [
                *(self._result(task) for task in outcome.tasks),
                *(
                    self._figures(
                        group,
                        kind="group",
                        members=list(group.members),
                        rows=sum(rows.values()),
                        split="test",
                    )
                    for group in outcome.groups
                ),
            ]

        return asked

    def _result(self, outcome: "TaskOutcome") -> Result:
        task = self._task.loaded["tasks"][outcome.name]
        split = task.config.test_split or task.config.validation_split or "train"
        result = self._figures(
            outcome, sha256=outcome.sha256, rows=len(outcome.samples), split=split
        )
        scores = {
            metric: found
            for metric in result.metrics
            if (found := _mean_scores(metric, outcome)) is not None
        }
        per_character = result.metric.startswith("acc_norm")
        return replace(
            result,
            scores=scores,
            rows=[_named_row(one, result.metric, scores, per_character) for one in outcome.samples],
        )

    def _figures(self, figures: "Figures", **of_task: Any) -> Result:
        from recycle_cli.evaluation.lm_eval_names import main_metric

        metric = main_metric(figures.metrics, self._options.metric)
        task = EvaluatedTask(
            name=figures.name,
            path=self._task.name,
            origin="lm-eval",
            num_fewshot=figures.num_fewshot,
            **{"sha256": "", **of_task},
        )
        return Result(
            task=task,
            metric=metric or "",
            metrics=figures.metrics,
            stderr=figures.stderr,
            higher_is_better={
                name: figures.higher_is_better.get(name, True) for name in figures.metrics
            },
            scores={},
        )


def _mean_scores(metric: str, outcome: "TaskOutcome") -> "RowScores | None":
    """The rows' scores under a metric that is their mean; None where it is something else."""
    import numpy as np

    from recycle_cli.evaluation.row_scores import RowScores

    found = [sample.scores.get(metric) for sample in outcome.samples]
    if None in found:
        return None
    scores = RowScores(np.array(found, dtype=np.float64))
    value = outcome.metrics[metric]
    return scores if math.isclose(scores.mean(), value, rel_tol=SAME, abs_tol=SAME) else None


def _named_row(
    sample: "Sample", metric: str, scores: "Mapping[str, RowScores]", per_character: bool
) -> RowResult:
    right = sample.answer
    return RowResult(
        input=sample.prompt,
        output=sample.target,
        prediction=_prediction(sample, per_character),
        score=sample.scores[metric] if metric in scores else None,
        log_likelihoods=sample.log_likelihoods,
        answer_log_likelihood=None if right is None else sample.log_likelihoods[right],
    )


def _prediction(sample: "Sample", per_character: bool) -> str:
    """The generated text, or the choice that the model gave."""
    from recycle_cli.evaluation.metrics import choose

    if sample.text is not None:
        return sample.text
    if not sample.choices:
        return ""
    scores = sample.log_likelihoods[: len(sample.choices)]
    lengths = sample.choices if per_character else ["x"] * len(scores)
    return sample.choices[choose(scores, lengths)]
