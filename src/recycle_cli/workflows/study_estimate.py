"""`recycle study --dry-run`: what a study would take, from what is at hand to tell."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.evaluation.tasks import Task, task_name
from recycle_cli.progress import Progress, Silent
from recycle_cli.records import StudyPlanDocument
from recycle_cli.selection.catalog import find_selection_method
from recycle_cli.settings import Settings
from recycle_cli.tuning.catalog import find_tuning_method
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.provenance import Clock
from recycle_cli.workflows.study import StudyRequest
from recycle_cli.workflows.study_arms import Arm, arms_of, pace_of
from recycle_cli.workflows.study_config import StudyConfig
from recycle_cli.workflows.study_graph import Schedule
from recycle_cli.workflows.study_plan import (
    check_counts,
    check_tasks,
    find_pool,
    load_study_task,
    plan_study,
)
from recycle_cli.workflows.study_runs import Common
from recycle_cli.workflows.tune_request import LORA, TuneRequest

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel

PROBE_STEPS = (1, 4)
PROBE_ROWS = 16
SHOWN_NAMES = 3
FLOAT32 = 4


@dataclass
class _AtHand:
    """What there is to tell from; None where something is missing, and why in `notes`."""

    tasks: tuple[Task, ...] | None = None
    pool: tuple[Source, ...] | None = None
    base: "BaseModel | None" = None
    notes: list[str] = field(default_factory=list)


def estimate(request: StudyRequest, settings: Settings, progress: Progress) -> StudyPlanDocument:
    """What a study would take. Whatever is not at hand is said, and the rest told without it.

    Args:
        request: the study.
        settings: where the index is, and where the model runs.
        progress: told of what is measured.

    Raises:
        InputError: there are fewer adapters than the arms take.
    """
    config, arms = request.config, arms_of(request.config)
    there = _look(request, settings, progress)
    if there.pool is not None:
        check_counts(arms, there.pool)
    runs, reused = _runs(request, arms), _reused(request, there)
    whole_s = _seconds(request, arms, there, progress)
    return StudyPlanDocument(
        name=config.name,
        base_model=request.base_model,
        tasks=[task.name for task in there.tasks] if there.tasks else _names(request),
        missing_tasks=config.missing_tasks,
        arms=[arm.name for arm in arms],
        seeds=list(config.seeds),
        adapters=len(there.pool) if there.pool is not None else None,
        cells=len(arms) * len(config.tasks) * len(config.seeds),
        runs=runs,
        reused=reused,
        elapsed_s=whole_s and whole_s * (1 - (reused or 0) / runs),
        disk_bytes=_disk_bytes(request, arms, there),
        notes=there.notes,
    )


def _look(request: StudyRequest, settings: Settings, progress: Progress) -> _AtHand:
    from recycle_cli.engine.base_model import load_base_model

    there = _AtHand()
    progress.stage("looking for tasks, adapters and the base model")
    try:
        there.tasks = _tasks_here(request.config)
    except RecycleError as error:
        there.notes.append(f"the tasks are not all at hand: {error.message}")
    try:
        there.pool = find_pool(request.config.pool, request.base_model, settings)
    except RecycleError as error:
        there.notes.append(f"the pool is not at hand: {error.message}")
    try:
        there.base = load_base_model(request.base_model, settings)
    except RecycleError as error:
        there.notes.append(f"the base model is not at hand: {error.message}")
    return there


def _tasks_here(config: StudyConfig) -> tuple[Task, ...]:
    """The tasks of a study, if all of them are here: nothing is fetched.

    Raises:
        InputError: they are not, or they make no study.
    """
    tasks: list[Task] = []
    missing: dict[str, RecycleError] = {}
    for source in config.tasks:
        try:
            tasks.append(load_study_task(source, cached_only=True))
        except RecycleError as error:
            missing[task_name(source)] = error
    if missing:
        first, more = next(iter(missing.values())), len(missing) - SHOWN_NAMES
        names = ", ".join(list(missing)[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
        count = f"{len(missing)} of {len(config.tasks)}"
        raise InputError(f"{count} are missing ({names}): {first.message}", first.hint)
    check_tasks(tasks, config)
    return tuple(tasks)


def _names(request: StudyRequest) -> list[str]:
    """Of the tasks, as far as the configuration itself tells."""
    return [task_name(task) for task in request.config.tasks]


def _runs(request: StudyRequest, arms: Sequence[Arm]) -> int:
    """Rankings, target LoRAs, and cells; the base model's are the same with every seed."""
    config = request.config
    tasks, seeds = len(config.tasks), len(config.seeds)
    rankings = len({arm.selection for arm in arms if arm.selection})
    return tasks * (1 + seeds * (1 + rankings + len(arms) - 1))


def _reused(request: StudyRequest, there: _AtHand) -> int | None:
    """The runs that are there already."""
    if there.base is None or there.tasks is None or there.pool is None:
        return None
    plan = plan_study(request.config, _common(request, there.base), there.tasks, there.pool)
    Schedule(plan.nodes, request.store(), None, Silent()).go()
    return len({node.run.key for node in plan.nodes if node.outcome and node.run})


def _common(request: StudyRequest, base: "BaseModel") -> Common:
    config = request.config
    return Common(
        request.store(),
        request.base_model,
        base.digest,
        config.rows,
        config.test_rows,
        config.max_new_tokens,
        config.max_memory,
    )


def _seconds(
    request: StudyRequest, arms: Sequence[Arm], there: _AtHand, progress: Progress
) -> float | None:
    """About how long the whole study takes with its processes: steps and rows as measured on the
    first task with the cores of one, as much longer on others as their rows are."""
    from recycle_cli.lora.threads import torch_threads

    if there.base is None or there.tasks is None:
        return None
    progress.stage("measuring some steps on the first task")
    config, tasks = request.config, there.tasks
    with torch_threads(request.cores):
        step_s = _step_seconds(request, tasks[0], there.base)
        row_s = _row_seconds(tasks[0], there.base, config.max_new_tokens)
    first, total = _length(tasks[0]), 0.0
    for task in tasks:
        longer = _length(task) / first
        tested = len(task.test[: config.test_rows])
        steps = sum(_steps(request, arms))
        pool = len(there.pool or ()) * min(config.rows or len(task.train), len(task.train))
        scoring = [find_selection_method(name) for name in {a.selection for a in arms} if name]
        ranked = pool * sum(method.needs == "rows" for method in scoring)
        a_seed = steps * step_s + (len(arms) * tested + ranked) * row_s
        total += longer * a_seed * len(config.seeds)
    # What is one task's and one seed's hangs together, so that more processes find less to do.
    return total / min(request.jobs, len(tasks) * len(config.seeds))


def _steps(request: StudyRequest, arms: Sequence[Arm]) -> Iterator[int]:
    """Of each arm that trains."""
    for arm in arms:
        trains = arm.role in ("target", "rescaled") or (arm.choice and not arm.choice.merges)
        if trains and arm.method:
            default = find_tuning_method(arm.method).pace.steps
            yield int(pace_of(arm, request.config).get("steps", default))


def _step_seconds(request: StudyRequest, task: Task, base: "BaseModel") -> float:
    """Of a step of the target LoRA."""
    from recycle_cli.workflows.tune import tune

    times = []
    for steps in PROBE_STEPS:
        with tempfile.TemporaryDirectory() as folder:
            pace = {**request.config.target.pace, "steps": steps, "eval_every": steps}
            asked = TuneRequest(
                task,
                request.base_model,
                Path(folder) / LORA,
                method=LORA,
                parameters=request.config.target.parameters,
                pace=pace,
                rows=request.config.rows,
            )
            clock = Clock()
            tune(asked, (), None, base, Silent())
            times.append(clock.elapsed_s)
    return max(0.0, times[1] - times[0]) / (PROBE_STEPS[1] - PROBE_STEPS[0])


def _row_seconds(task: Task, base: "BaseModel", max_new_tokens: int) -> float:
    """Of a test row that is scored."""
    from recycle_cli.workflows.answers import answer_rows

    rows = task.test[:PROBE_ROWS]
    clock = Clock()
    answer_rows(base, None, rows, task.metric, Silent(), max_new_tokens)
    return clock.elapsed_s / len(rows)


def _length(task: Task) -> float:
    """Of its rows, in characters."""
    rows = task.train[:100]
    return sum(len(row.input) for row in rows) / len(rows)


def _disk_bytes(request: StudyRequest, arms: Sequence[Arm], there: _AtHand) -> int | None:
    """What is kept in the end, and while it runs."""
    from recycle_cli.tuning.target_lora import LoraRecipe

    config = request.config
    if there.base is None or config.keep == "none":
        return 0 if config.keep == "none" else None
    shapes = [s for path, s in there.base.shapes.items() if not path.endswith("lm_head")]
    rank = config.target.rank or LoraRecipe.rank
    a_target = FLOAT32 * rank * sum(out + into for out, into in shapes)
    kept = len(config.tasks) * len(config.seeds) * a_target
    if config.keep == "all":
        mixed = [arm for arm in arms if arm.choice is not None]
        sizes = [
            Path(s.ref.path, "adapter_model.safetensors").stat().st_size for s in there.pool or ()
        ]
        mean = sum(sizes) / len(sizes) if sizes else 0
        takes = sum((arm.k or 0) * mean + arm.with_target * a_target for arm in mixed)
        kept += int(len(config.tasks) * len(config.seeds) * takes)
    return kept
