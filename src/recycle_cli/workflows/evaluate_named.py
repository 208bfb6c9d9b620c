"""`recycle eval` on lm-eval's tasks: figures, names and rules are lm-eval's own."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.records import EvaluatedTask
from recycle_cli.workflows.evaluate_results import (
    Ask,
    AskedTask,
    Result,
    RowResult,
    TaskOptions,
    prediction_of,
)

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.evaluation.lm_eval_names import NamedTask
    from recycle_cli.evaluation.lm_eval_run import Figures, Sample, TaskOutcome
    from recycle_cli.evaluation.row_scores import RowScores

# The smallest difference that no rounding explains.
SAME = 1e-9


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
            with self._explained():
                outcome = run(lm, loaded, self._options.rows, chat, self._options.hear)
            rows = {task.name: len(task.samples) for task in outcome.tasks}
            return [
                *(self._result(task) for task in outcome.tasks),
                *(
                    self._figures(
                        group,
                        kind="group",
                        members=list(group.members),
                        rows=sum(rows[name] for name in group.members),
                        split="test",
                    )
                    for group in outcome.groups
                ),
            ]

        return asked

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Puts the task's name before what its own code raises."""
        try:
            yield
        except (RecycleError, RuntimeError):  # RuntimeError is torch's
            raise
        except Exception as error:
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            raise RecycleError(
                f"lm-eval's task {self._task.name!r} failed: {type(error).__name__}: {reason}",
                "the task's own code says so; ask for another task, or mend its file",
            ) from error

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
        return replace(
            result,
            scores=scores,
            rows=[_named_row(one, result.metric, scores) for one in outcome.samples],
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


def _named_row(sample: "Sample", metric: str, scores: "Mapping[str, RowScores]") -> RowResult:
    right = sample.answer
    return RowResult(
        input=sample.prompt,
        output=sample.target,
        prediction=prediction_of(sample, metric),
        score=sample.scores[metric] if metric in scores else None,
        log_likelihoods=sample.log_likelihoods,
        answer_log_likelihood=None if right is None else sample.log_likelihoods[right],
    )
