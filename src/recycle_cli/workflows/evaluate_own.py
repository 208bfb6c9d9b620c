"""`recycle eval` on tasks of one's own: files, folders, a task.yaml."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError
from recycle_cli.evaluation.metrics import ACC, EXACT_MATCH, GENERATED, PERPLEXITY, find_metric
from recycle_cli.evaluation.tasks import Row, Task, overlap
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
    from recycle_cli.evaluation.lm_eval_run import Sample, TaskOutcome
    from recycle_cli.evaluation.row_scores import RowScores

# What lm-eval calls `acc` and `acc_norm`. Ours is the second, under both names.
CHOICE_METRICS = {"acc": "acc_norm", "acc_norm": "acc_norm", "acc_sum": "acc"}
WHITE_SPACE_ROWS = 8
"""Looked at for how likely white space before answers is, which is much the same in all."""
WHITE_SPACE_DROP = 1.0
"""Nats by which that may fall before it is told: answers of 5 and 20 characters then differ by
0.15 nats per character without a reason."""


class OwnTask(AskedTask):
    """The test rows of a task of one's own, by way of an lm-eval task in memory."""

    def __init__(self, task: Task, options: TaskOptions) -> None:
        self._task, self._options = task, options
        self._metric = options.metric or task.metric
        self._rows = task.test[: options.rows]
        self._warnings: list[str] = []
        self._usual_white_space: float | None = None
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
        if self._usual_white_space is None:  # the base model is the first to be prepared for
            self._usual_white_space = self._white_space(base)

        def likelihoods() -> Sequence[float | None]:
            from recycle_cli.engine.scoring import candidate_log_likelihoods

            if self._metric not in GENERATED or not self._options.likelihoods:
                return [None] * len(self._rows)
            return [scores[0] for scores in candidate_log_likelihoods(base, alone)]

        def asked() -> list[Result]:
            (outcome,) = run(lm, loaded, hear=self._options.hear).tasks
            return [self._result(outcome, likelihoods(), self._white_space_warnings(base))]

        return asked

    def _white_space(self, base: "BaseModel") -> float | None:
        """The mean log-likelihood, in nats, of the white space that is scored with every answer;
        None where there is none or it does not matter."""
        from recycle_cli.engine.encoding import encode_white_space
        from recycle_cli.engine.scoring import candidate_log_likelihoods

        if self._metric != ACC:
            return None
        asked = encode_white_space(base, self._rows[:WHITE_SPACE_ROWS])
        if not asked:
            return None
        return mean(scores[0] for scores in candidate_log_likelihoods(base, asked))

    def _white_space_warnings(self, base: "BaseModel") -> list[str]:
        """Whether likelihood per character still tells which answer is likely."""
        usual, now = self._usual_white_space, self._white_space(base)
        if usual is None or now is None or now > usual - WHITE_SPACE_DROP:
            return []
        return [
            "the white space before every answer, which is scored with it, has a mean "
            f"log-likelihood of {now:.1f} nats ({usual:.1f} by the base model): acc divides that "
            "by the length of an answer and so favours long ones; compare acc_sum, which it does "
            "not touch"
        ]

    def _result(
        self,
        outcome: "TaskOutcome",
        likelihoods: Sequence[float | None],
        warnings: Sequence[str],
    ) -> Result:
        names = CHOICE_METRICS if self._metric == ACC else {self._metric: self._metric}
        scores = {ours: _own_scores(theirs, outcome) for ours, theirs in names.items()}
        return Result(
            task=EvaluatedTask(
                name=self._task.name,
                sha256=self._task.sha256,
                path=str(self._task.path),
                revision=self._task.revision,
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
            warnings=[*self._warnings, *warnings],
        )

    def _row(self, row: Row, sample: "Sample", likelihood: float | None) -> RowResult:
        if self._metric == ACC:
            likelihood = sample.log_likelihoods[row.choices.index(row.output)]
        elif self._metric == PERPLEXITY:
            likelihood = sample.log_likelihoods[0]
        return RowResult(
            input=row.input,
            output=row.output,
            prediction=prediction_of(sample, "acc_norm"),
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
