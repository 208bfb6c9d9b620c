"""What came of a study: its table, its comparisons, its verdict."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recycle_cli.evaluation.comparable import Comparable, comparable
from recycle_cli.evaluation.tasks import training_split
from recycle_cli.records import (
    SelectionDocument,
    StudyCells,
    StudyCoefficients,
    StudyComparison,
    StudyDocument,
    StudyFailure,
    StudyMean,
    StudyResults,
    StudyRow,
    StudySelection,
    StudySource,
    StudyTask,
    Verdict,
)
from recycle_cli.workflows.provenance import Clock
from recycle_cli.workflows.study_arms import BASE, TARGET, Arm
from recycle_cli.workflows.study_graph import Node, failures
from recycle_cli.workflows.study_plan import Plan
from recycle_cli.workflows.study_runs import Cell

if TYPE_CHECKING:
    from recycle_cli.evaluation.verdict import Decision

Scores = Mapping[str, Mapping[str, list[list[float]]]]
"""Arm -> task -> seed by seed, the score of each test row."""


def conclude(plan: Plan, out: str, clock: Clock, command: list[str]) -> StudyResults:
    """The results of a study whose runs are settled.

    Args:
        plan: the study.
        out: its folder.
        clock: started when it began.
        command: the command line that asks for the same.
    """
    scores = _scores(plan)
    compared = comparable(scores, (BASE, TARGET))
    decision = _decide(plan, compared)
    done = [node for node in plan.cells.values() if node.outcome is not None]
    failed = failures(plan.cells.values())
    reused = sum(node.reused for node in done)
    study = StudyDocument(
        path=out,
        name=plan.config.name,
        base_model=plan.common.base_model,
        rows=_training_rows(plan),
        fast=plan.config.fast,
        metric=_metric(plan),
        verdict=_with_what_was_left_out(decision.verdict, compared),
        adapter=_best_adapter(plan),
        tasks=_tasks(plan),
        arms=[arm.described() for arm in plan.arms],
        table=[_row(plan, *where, node) for where, node in _finished(plan)],
        means=list(_means(plan, {**scores, **compared.scores})),
        comparisons=list(_comparisons(plan, scores, decision)),
        selections=list(_selections(plan)),
        failures=list(_failed(plan)),
        sources=_sources(plan),
        settings=plan.config.model_dump(mode="json"),
        cells=StudyCells(done=len(done) - reused, reused=reused, failed=len(failed)),
        **clock.fields(plan.config.seeds[0], command),
    )
    return StudyResults(study=study, coefficients=list(_coefficients(plan)))


def _finished(plan: Plan) -> Iterator[tuple[tuple[Arm, str, int], Node]]:
    """The cells that were finished: arm by arm, task by task, seed by seed."""
    for arm in plan.arms:
        for task in plan.tasks:
            for seed in plan.config.seeds:
                node = plan.cells[arm.name, task, seed]
                if node.outcome is not None:
                    yield (arm, task, seed), node


def _scores(plan: Plan) -> Scores:
    """Of the tasks that an arm was scored on with every seed. The base model, and an adapter as it
    is, answer alike with every seed that chooses the same one."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for (arm, task, _), node in _finished(plan):
        assert node.outcome is not None
        found.setdefault(arm.name, {}).setdefault(task, []).append(node.outcome["scores"])
    seeds = len(plan.config.seeds)
    whole = {
        name: {task: runs for task, runs in by_task.items() if len(runs) == seeds}
        for name, by_task in found.items()
    }
    return {name: by_task for name, by_task in whole.items() if by_task}


def _decide(plan: Plan, compared: Comparable[list[list[float]]]) -> "Decision":
    from recycle_cli.evaluation.verdict import Arm as Judged
    from recycle_cli.evaluation.verdict import Role, decide

    return decide(
        compared.scores,
        [
            Judged(arm.name, arm.label, Role(arm.role), arm.control, arm.with_target)
            for arm in plan.arms
        ],
        metric=_metric(plan),
        examples=_training_rows(plan),
        margin=plan.config.margin / 100,
        relevance=_single_adapters(plan, compared),
        seed=plan.config.seeds[0],
    )


def _with_what_was_left_out(verdict: Verdict, compared: Comparable[Any]) -> Verdict:
    tasks = compared.tasks_left_out
    if not tasks:
        return verdict
    note = f"Left out, since not every arm could be scored there: {', '.join(tasks)}."
    return verdict.model_copy(update={"notes": [*verdict.notes, note]})


def _metric(plan: Plan) -> str:
    metrics = {task.metric for task in plan.tasks.values()}
    return metrics.pop() if len(metrics) == 1 else "accuracy"


def _training_rows(plan: Plan) -> int:
    """That a run may use, of the task with the most."""
    limits = [len(task.train) for task in plan.tasks.values()]
    return min(max(limits), plan.config.rows or max(limits))


def _single_adapters(plan: Plan, compared: Comparable[Any]) -> dict[str, str]:
    """Task -> the id of the adapter that the first arm of single adapters put there; without the
    tasks where it was not the same with every seed."""
    arm = next((a for a in plan.arms if a.role == "single" and a.name in compared.scores), None)
    if arm is None:
        return {}
    found = {}
    for task in compared.scores[arm.name]:
        runs = [plan.cells[arm.name, task, seed].run for seed in plan.config.seeds]
        ids = {run.sources[0].ref.id for run in runs if isinstance(run, Cell)}
        if len(ids) == 1:
            found[task] = ids.pop()
    return found


def _tasks(plan: Plan) -> list[StudyTask]:
    rows = []
    for task in plan.tasks.values():
        train, valid = training_split(task, plan.config.seeds[0], plan.config.rows)
        rows.append(
            StudyTask(
                name=task.name,
                sha256=task.sha256,
                path=str(task.path),
                revision=task.revision,
                metric=task.metric,
                train_rows=len(train),
                valid_rows=len(valid),
                test_rows=len(task.test[: plan.config.test_rows]),
            )
        )
    return rows


def _row(plan: Plan, arm: Arm, task: str, seed: int, node: Node) -> StudyRow:
    from recycle_cli.evaluation.comparison import compare
    from recycle_cli.evaluation.statistics import mean_estimate

    assert node.outcome is not None and isinstance(node.run, Cell)
    scores, metric = node.outcome["scores"], plan.tasks[task].metric
    made = _made(plan, node, task, seed)
    target = plan.cells[TARGET, task, seed].outcome
    against = None
    if target is not None and arm.name != TARGET:
        against = compare(
            {task: scores}, {task: target["scores"]}, baseline_name=TARGET, metric=metric
        )
    estimate = mean_estimate(scores)
    return StudyRow(
        method=arm.name,
        task=task,
        seed=seed,
        metrics={metric: estimate.value},
        interval=estimate.interval,
        p_value_against_target=against.p_value if against else None,
        path=_kept(_maker(plan, arm, task, seed)),
        elapsed_s=made.get("elapsed_s", 0.0),
        scored_s=node.outcome["scored_s"],
        valid_loss=made.get("best", {}).get("valid_loss"),
        adapters=len(node.run.sources),
        target_share=_target_share(made),
        peak_memory_bytes=made.get("peak_memory_bytes", 0),
    )


def _made(plan: Plan, node: Node, task: str, seed: int) -> dict[str, Any]:
    """The record of the adapter that a cell scored; empty where it made none."""
    assert node.outcome is not None and isinstance(node.run, Cell)
    if node.run.arm.role == TARGET:
        trained = plan.targets[task, seed].outcome
        return dict(trained["made"]) if trained else {}
    return dict(node.outcome["made"] or {})


def _target_share(made: Mapping[str, Any]) -> float | None:
    """The target LoRA's part of the mean sizes of the coefficients."""
    adapters = made.get("adapters", [])
    sizes = {a.get("role"): 0.0 for a in adapters}
    for adapter in adapters:
        if "coefficient_mean" in adapter:
            sizes[adapter["role"]] += abs(adapter["coefficient_mean"])
    total = sum(sizes.values())
    return sizes["target"] / total if "target" in sizes and total else None


def _means(plan: Plan, scores: Scores) -> Iterator[StudyMean]:
    from recycle_cli.evaluation.comparison import mean_over_tasks

    for arm in plan.arms:
        if arm.name in scores:
            by_task = scores[arm.name]
            mean = mean_over_tasks(by_task, seed=plan.config.seeds[0])
            yield StudyMean(
                method=arm.name,
                value=mean.value,
                interval=mean.interval,
                tasks=len(by_task),
                runs=sum(len(runs) for runs in by_task.values()),
            )


def _comparisons(plan: Plan, scores: Scores, decision: "Decision") -> Iterator[StudyComparison]:
    """Those of the verdict over all tasks; then each arm against the target LoRA, task by task."""
    from recycle_cli.evaluation.comparison import compare, with_holm

    for (name, _), test in decision.tests.items():
        yield StudyComparison(method=name, **test.model_dump())
    for task in plan.tasks:
        there = [arm.name for arm in plan.arms if task in scores.get(arm.name, {})]
        others = [name for name in there if name != TARGET] if TARGET in there else []
        tests = [
            compare(
                {task: scores[name][task]},
                {task: scores[TARGET][task]},
                baseline_name=TARGET,
                metric=plan.tasks[task].metric,
            )
            for name in others
        ]
        for name, test in zip(others, with_holm(tests), strict=True):
            yield StudyComparison(method=name, task=task, **test.model_dump())


def _selections(plan: Plan) -> Iterator[StudySelection]:
    for (task, seed, method), node in plan.rankings.items():
        if node.outcome is not None:
            selection = SelectionDocument.model_validate(node.outcome["selection"])
            yield StudySelection(
                task=task,
                seed=seed,
                method=method,
                adapters=selection.adapters,
                passes=selection.cost.passes,
                elapsed_s=selection.elapsed_s,
            )


def _failed(plan: Plan) -> Iterator[StudyFailure]:
    for (name, task, seed), node in plan.cells.items():
        if node.error is not None:
            yield StudyFailure(method=name, task=task, seed=seed, error=node.error)


def _sources(plan: Plan) -> list[StudySource]:
    """The adapters of the pool that went into cells, the most used first."""
    counts: Counter[str] = Counter()
    for node in plan.cells.values():
        if node.outcome is not None and isinstance(node.run, Cell):
            counts.update(source.ref.sha256 for source in node.run.sources)
    known = {source.ref.sha256: source for source in plan.pool}
    ordered = sorted(counts, key=lambda sha256: (-counts[sha256], sha256))
    return [
        StudySource(
            id=known[sha256].ref.id,
            revision=known[sha256].ref.revision,
            sha256=sha256,
            license=known[sha256].license,
            cells=counts[sha256],
        )
        for sha256 in ordered
    ]


def _kept(node: Node) -> str | None:
    """The folder of the adapter that a run made, where it is still there."""
    assert node.run is not None
    path = node.run.common.store.adapter(node.run.key)
    return str(path) if path.is_dir() else None


def _best_adapter(plan: Plan) -> str | None:
    """The folder of the adapter with the lowest validation loss of its task, of the first task
    that has one; test rows have no say in it."""
    best = (best_of(plan, task) for task in plan.tasks)
    return next((path for node in best if node is not None and (path := _kept(node))), None)


def best_of(plan: Plan, task: str) -> Node | None:
    """What made the adapter with the lowest validation loss on a task, controls apart: of equals
    the first arm's, which is the target LoRA's; of those with the first seed, since another one
    validates on other rows."""
    found: list[tuple[float, Node]] = []
    for (arm, name, seed), node in _finished(plan):
        if (name, seed) == (task, plan.config.seeds[0]) and arm.role in ("target", "recycled"):
            loss = _made(plan, node, task, seed).get("best", {}).get("valid_loss")
            if loss is not None:
                found.append((loss, _maker(plan, arm, task, seed)))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _maker(plan: Plan, arm: Arm, task: str, seed: int) -> Node:
    """The run that made the adapter of a cell."""
    cell = plan.cells[arm.name, task, seed]
    return plan.targets[task, seed] if arm.name == TARGET else cell


def _coefficients(plan: Plan) -> Iterator[StudyCoefficients]:
    """Of every mixture of real adapters, with the first seed."""
    for (arm, task, seed), node in _finished(plan):
        assert node.outcome is not None
        shown = node.outcome["coefficients"]
        if shown and arm.role == "recycled" and seed == plan.config.seeds[0]:
            yield StudyCoefficients(
                method=arm.name,
                task=task,
                seed=seed,
                groups=list(shown["modules"]),
                adapters=shown["adapters"],
                values=[[abs(number) for number in row] for row in shown["modules"].values()],
            )


def unused(plan: Plan, keep: str) -> list[Node]:
    """The nodes whose adapters are not to be kept."""
    if keep == "all":
        return []
    best = {best_of(plan, task) for task in plan.tasks} if keep == "best" else set()
    kept = {node.run.key for node in best if node is not None and node.run is not None}
    nodes: Sequence[Node] = list(plan.cells.values())
    if keep == "none":
        nodes = [*plan.targets.values(), *nodes]
    return [node for node in nodes if _made_one(node) and node.run and node.run.key not in kept]


def _made_one(node: Node) -> bool:
    return bool((node.outcome or {}).get("made"))
