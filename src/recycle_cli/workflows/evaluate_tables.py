"""From scores to documents: intervals, comparisons with the baseline, means over tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recycle_cli.evaluation.metrics import ACC, EXACT_MATCH
from recycle_cli.records import EvaluatedTask, EvaluationDocument, PairedTest
from recycle_cli.workflows.evaluate_models import Contender
from recycle_cli.workflows.evaluate_results import Result
from recycle_cli.workflows.provenance import RunFields

if TYPE_CHECKING:
    from recycle_cli.evaluation.differences import Rows
    from recycle_cli.evaluation.row_scores import RowScores

MEAN = "mean"
SCORE = "score"
"""What the mean over tasks is called where their metrics differ."""


@dataclass(frozen=True)
class Scored:
    """One contender's result on one task of those asked for, and what the run used.

    Args:
        contender: who.
        asked: which of the tasks asked for it belongs to; a group of lm-eval's has several results.
        result: what came of it.
        run: command, versions, cost.
    """

    contender: Contender
    asked: int
    result: Result
    run: RunFields

    @property
    def key(self) -> tuple[int, str, str]:
        """The same for all contenders' results on the same rows."""
        return self.asked, self.result.task.kind, self.result.task.name

    @property
    def rows(self) -> "RowScores | None":
        """The rows' scores by the metric that adapters are compared by, where it has them."""
        return self.result.scores.get(self.result.metric)


def compared(
    scored: Sequence[Scored], baseline: Contender, base_model: str, seed: int
) -> list[EvaluationDocument]:
    """A document for each contender and task, task by task, compared with the baseline on the same
    rows. P-values are adjusted over all those comparisons (Holm)."""
    against = {one.key: one for one in scored if one.contender is baseline}
    order = list(dict.fromkeys(one.key for one in scored))
    sorted_by_task = sorted(scored, key=lambda one: order.index(one.key))
    tests = [
        None if one.contender is baseline else _test(one, against[one.key], seed)
        for one in sorted_by_task
    ]
    return [
        _document(one, test, base_model, seed)
        for one, test in zip(sorted_by_task, adjusted(tests), strict=True)
    ]


def adjusted(tests: Sequence[PairedTest | None]) -> list[PairedTest | None]:
    """The tests with p-values that allow for how many there are."""
    from recycle_cli.evaluation.comparison import with_holm

    done = iter(with_holm([test for test in tests if test is not None]))
    return [None if test is None else next(done) for test in tests]


def _test(ours: Scored, baseline: Scored, seed: int) -> PairedTest | None:
    from recycle_cli.evaluation.row_scores import compare_rows

    if ours.rows is None or baseline.rows is None:
        return None
    return compare_rows(
        ours.rows,
        baseline.rows,
        baseline_name=baseline.contender.name,
        metric=ours.result.metric,
        seed=seed,
    )


def _document(
    scored: Scored, test: PairedTest | None, base_model: str, seed: int
) -> EvaluationDocument:
    from recycle_cli.evaluation.row_scores import estimate

    result = scored.result
    estimates = {metric: estimate(rows, seed) for metric, rows in result.scores.items()}
    stderr = {metric: found.stderr for metric, found in estimates.items()}
    return EvaluationDocument(
        adapter=scored.contender.ref or "base",
        form=scored.contender.form,
        base_model=base_model,
        task=result.task,
        metric=result.metric,
        metrics=dict(result.metrics),
        higher_is_better=dict(result.higher_is_better),
        stderr=stderr | dict(result.stderr),
        interval={metric: found.interval for metric, found in estimates.items()},
        paired=test,
        warnings=[*result.warnings, *_few_rows(result.task.rows)],
        **scored.run,
    )


def _few_rows(rows: int) -> list[str]:
    from recycle_cli.evaluation.statistics import few_rows_warning

    warning = few_rows_warning(rows)
    return [warning] if warning else []


# --- the mean over tasks --------------------------------------------------------------------------


def tasks_of(scored: Sequence[Scored], contender: Contender) -> list[Scored]:
    """A contender's results that count in its mean: tasks whose rows have scores from 0 to 1."""
    return [
        one
        for one in scored
        if one.contender is contender and one.rows is not None and one.rows.bounded
    ]


def compared_over_tasks(
    ours: Sequence[Scored], baseline: Sequence[Scored], seed: int
) -> PairedTest | None:
    """Two contenders' means over the same tasks, each task counted alike; None where a task has
    scores for one of them alone, or there is none."""
    from recycle_cli.evaluation.comparison import compare

    if not ours or [one.key for one in ours] != [one.key for one in baseline]:
        return None
    return compare(
        _by_task(ours),
        _by_task(baseline),
        baseline_name=baseline[0].contender.name,
        metric=common_metric(ours),
        seed=seed,
    )


def mean_documents(
    scored: Sequence[Scored], baseline: Contender, base_model: str, seed: int
) -> list[EvaluationDocument]:
    """A document for each contender with its mean over all tasks; none with a single task, or where
    a task has no scores from 0 to 1 for its rows, as for perplexity. P-values are adjusted over the
    contenders."""
    contenders = list(dict.fromkeys(one.contender for one in scored))
    tasks = {one.key for one in scored if one.result.task.kind == "task"}
    by_contender = {contender: tasks_of(scored, contender) for contender in contenders}
    if len(tasks) < 2 or any(len(found) != len(tasks) for found in by_contender.values()):
        return []
    tests = [
        None if contender is baseline else compared_over_tasks(found, by_contender[baseline], seed)
        for contender, found in by_contender.items()
    ]
    return [
        _mean_document(found, test, base_model, seed)
        for found, test in zip(by_contender.values(), adjusted(tests), strict=True)
    ]


def _mean_document(
    found: Sequence[Scored], test: PairedTest | None, base_model: str, seed: int
) -> EvaluationDocument:
    from recycle_cli.evaluation.comparison import mean_over_tasks

    metric = common_metric(found)
    estimate = mean_over_tasks(_by_task(found), seed)
    contender = found[0].contender
    run: RunFields = {
        **found[-1].run,
        "elapsed_s": round(sum({one.asked: one.run["elapsed_s"] for one in found}.values()), 3),
    }
    return EvaluationDocument(
        adapter=contender.ref or "base",
        form=contender.form,
        base_model=base_model,
        task=EvaluatedTask(
            name=MEAN,
            sha256=_digest([one.result.task.sha256 for one in found]),
            path="",
            rows=estimate.rows,
            split="test",
            kind="mean",
            origin=found[0].result.task.origin,
            members=[one.result.task.name for one in found],
            num_fewshot=None,
        ),
        metric=metric,
        metrics={metric: estimate.value},
        higher_is_better={metric: True},
        stderr={metric: estimate.stderr},
        interval={metric: estimate.interval},
        paired=test,
        warnings=_few_rows(estimate.rows),
        **run,
    )


def common_metric(found: Sequence[Scored]) -> str:
    """The metric that tasks have in common, else `score`. lm-eval's `acc` is not ours."""
    kinds = {(one.result.metric, one.result.task.origin) for one in found}
    metrics = {metric for metric, _ in kinds}
    same = len(kinds) == 1 or metrics == {EXACT_MATCH} or (len(metrics) == 1 and ACC not in metrics)
    return metrics.pop() if same else SCORE


def _by_task(found: Sequence[Scored]) -> "dict[str, Rows]":
    return {repr(one.key): one.rows.values for one in found if one.rows is not None}


def _digest(parts: Sequence[str]) -> str:
    import hashlib

    return hashlib.sha256(" ".join(parts).encode()).hexdigest()
