"""What comes of one model on one task of `recycle eval`, whosever task it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from recycle_cli.records import EvaluatedTask

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.evaluation.lm_eval_run import Sample
    from recycle_cli.evaluation.row_scores import RowScores


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


def prediction_of(sample: "Sample", metric: str) -> str:
    """The generated text, or the choice that the model gave, as a metric of lm-eval's has it."""
    from recycle_cli.evaluation.metrics import choose

    name, _, chosen = metric.partition(",")
    if sample.texts:
        return sample.texts.get(chosen, sample.text or "")
    if not sample.choices:
        return ""
    scores = sample.log_likelihoods[: len(sample.choices)]
    lengths = sample.choices if name == "acc_norm" else ["x"] * len(scores)
    return sample.choices[choose(scores, lengths)]
