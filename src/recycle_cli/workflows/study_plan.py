"""From a study's configuration to its runs: tasks, pool, arms, and what waits for what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recycle_cli.errors import InputError
from recycle_cli.evaluation.tasks import (
    Task,
    load_task,
    load_task_fields,
    overlap,
    training_split,
)
from recycle_cli.progress import Silent
from recycle_cli.records import AdapterRef
from recycle_cli.selection.catalog import find_selection_method
from recycle_cli.settings import Settings
from recycle_cli.workflows.adapters import Source, counted
from recycle_cli.workflows.crawl_request import read_ids
from recycle_cli.workflows.study_arms import TARGET, Arm, arms_of, pace_of
from recycle_cli.workflows.study_config import PoolChoice, StudyConfig
from recycle_cli.workflows.study_graph import Node, Schedule
from recycle_cli.workflows.study_runs import Cell, Common, Ranking, TargetTraining, sources_of

Where = tuple[str, int]
"""A task by name, and a seed."""


def load_tasks(config: StudyConfig) -> tuple[Task, ...]:
    """The tasks of a study.

    Raises:
        InputError: one cannot be read, or `check_tasks` refuses them.
    """
    tasks = tuple(load_study_task(source) for source in config.tasks)
    check_tasks(tasks, config)
    return tasks


def load_study_task(source: str | dict[str, Any], cached_only: bool = False) -> Task:
    """A task as a study names it: by its path, or with the fields of a task.yaml.

    Args:
        source: the path or the fields.
        cached_only: fetch nothing.

    Raises:
        InputError: it cannot be read.
    """
    if isinstance(source, str):
        return load_task(source, cached_only)
    return load_task_fields(source, cached_only)


def check_tasks(tasks: Sequence[Task], config: StudyConfig) -> None:
    """Checks that tasks make a study.

    Raises:
        InputError: one has too few rows, has test rows among its training rows, or the name of
            another.
    """
    for task in tasks:
        _check_task(task, config)
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two tasks are called {name!r}", "name them apart in their task.yaml")


def _check_task(task: Task, config: StudyConfig) -> None:
    if not task.test:
        raise InputError(
            f"task {task.name} has no test rows", "give a folder with a test.jsonl, or a task.yaml"
        )
    training_split(task, config.seeds[0], config.rows)
    leaked = overlap(task.train + task.valid, task.test)
    if leaked.count and not config.allow_overlap:
        raise InputError(
            f"{leaked.count} test rows of {task.name} also stand in its training rows, such as "
            f"{leaked.examples[0]!r}",
            "remove them from the training rows (of a data set: leave_out: [overlap]), or accept "
            "it: allow_overlap: true, or --allow-overlap",
        )


def find_pool(choice: PoolChoice, base_model: str, settings: Settings) -> tuple[Source, ...]:
    """The adapters of the index that a study chooses from.

    Raises:
        InputError: the list of ids cannot be read, or the index lacks one of them.
        RecycleError: there is none.
    """
    from recycle_cli.store.catalog import AdapterQuery
    from recycle_cli.workflows.select import pool_of

    query = AdapterQuery(
        license=choice.license,
        author=choice.author,
        source=choice.source,
        min_rank=choice.min_rank,
        max_rank=choice.max_rank,
        target_module=choice.target_module,
        search=choice.search,
    )
    pool = pool_of(base_model, settings, query)
    if choice.folder is not None:
        pool = _below(pool, Path(choice.folder).absolute(), base_model, settings)
    if choice.ids_from is not None:
        pool = _named(pool, read_ids(Path(choice.ids_from)), choice.ids_from)
    return tuple(sorted(pool, key=lambda source: source.ref.sha256))


def _below(
    pool: Sequence[Source], folder: Path, base_model: str, settings: Settings
) -> list[Source]:
    """Those of a pool that were found below a folder."""
    from recycle_cli.store.catalog import AdapterQuery, Catalog

    with Catalog(settings.catalog_file) as catalog:
        rows = catalog.query(AdapterQuery(base_model=base_model, source="folder"))
    there = {row.sha256 for row in rows if Path(row.origin).is_relative_to(folder)}
    found = [source for source in pool if source.ref.sha256 in there]
    if not found:
        raise InputError(
            f"the index holds no adapter from {folder}", f"crawl it first: recycle crawl {folder}"
        )
    return found


def _named(pool: Sequence[Source], ids: Sequence[str], where: str) -> list[Source]:
    """Those of a pool that a list names."""
    wanted = {name.partition("@")[0] for name in ids}
    found = [source for source in pool if source.ref.id in wanted]
    if not found:
        raise InputError(
            f"the index holds none of the {len(wanted)} adapters that {where} names",
            f"crawl them first: recycle crawl hub --ids-from {where}",
        )
    return found


def check_counts(arms: Sequence[Arm], pool: Sequence[Source]) -> None:
    """Checks that there are as many adapters as the arms take.

    Raises:
        InputError: there are not.
    """
    most = max((arm.k or 0 for arm in arms), default=0)
    if most > len(pool):
        raise InputError(
            f"k is {most}, and the pool has {counted(pool)}", "lower k, or crawl more adapters"
        )


@dataclass
class Plan:
    """The runs of a study.

    Attributes:
        config: the study.
        common: what its runs have in common.
        tasks: by name.
        pool: what is chosen from.
        arms: what is compared.
        rankings: by task, seed and method.
        targets: the trainings of target LoRAs, by task and seed.
        cells: by arm, task and seed.
    """

    config: StudyConfig
    common: Common
    tasks: dict[str, Task]
    pool: tuple[Source, ...]
    arms: list[Arm]
    rankings: dict[tuple[str, int, str], Node] = field(default_factory=dict)
    targets: dict[Where, Node] = field(default_factory=dict)
    cells: dict[tuple[str, str, int], Node] = field(default_factory=dict)

    @property
    def nodes(self) -> list[Node]:
        """All runs: what others wait for first."""
        return [*self.targets.values(), *self.rankings.values(), *self.cells.values()]


def plan_study(
    config: StudyConfig, common: Common, tasks: Sequence[Task], pool: tuple[Source, ...]
) -> Plan:
    """The runs of a study, seed by seed, so that the first figures are there early.

    Args:
        config: the study.
        common: what its runs have in common.
        tasks: of the study.
        pool: what is chosen from.
    """
    plan = Plan(config, common, {task.name: task for task in tasks}, pool, arms_of(config))
    for seed in config.seeds:
        for task in tasks:
            _plan_shared(plan, task, seed)
            for arm in plan.arms:
                plan.cells[arm.name, task.name, seed] = _cell(plan, arm, task, seed)
    return plan


def ask_for_targets(plan: Plan) -> None:
    """Has those target LoRAs trained again whose adapters are gone and that some run takes which is
    still to be done. Unless adapters are not kept, all are asked for anyway."""
    config, tasks = plan.config, list(plan.tasks.values())
    ahead = plan_study(config, plan.common, tasks, plan.pool)
    Schedule(ahead.nodes, plan.common.store, None, Silent()).go()
    for where, target in ahead.targets.items():
        if any(not node.settled and _takes(node, target) for node in ahead.nodes):
            plan.targets[where].keeps = True


def _takes(node: Node, other: Node) -> bool:
    """Whether a run needs another one, or something that does."""
    return any(need is other or _takes(need, other) for need in node.needs)


def _plan_shared(plan: Plan, task: Task, seed: int) -> None:
    """The target LoRA of a task and seed, and its rankings."""
    config, common = plan.config, plan.common
    where = task.name, seed
    target = Node(
        f"target LoRA of {_told(where)}",
        lambda: TargetTraining(common, task, seed, config.target),
        keeps=config.keep != "none",
    )
    plan.targets[where] = target
    for name in dict.fromkeys(arm.selection for arm in plan.arms if arm.selection):
        compares = find_selection_method(name).needs == "target"
        node = Node(
            f"{name} ranking for {_told(where)}",
            _ranking(plan, task, seed, name, target if compares else None),
            (target,) if compares else (),
        )
        plan.rankings[task.name, seed, name] = node


def _ranking(
    plan: Plan, task: Task, seed: int, name: str, target: Node | None
) -> Callable[[], Ranking]:
    return lambda: Ranking(
        plan.common,
        task,
        seed,
        name,
        plan.pool,
        plan.config.score_on,
        _target_source(target) if target else None,
    )


def _cell(plan: Plan, arm: Arm, task: Task, seed: int) -> Node:
    target = plan.targets[task.name, seed] if arm.needs_target else None
    ranking = plan.rankings[task.name, seed, arm.selection] if arm.selection else None

    def build() -> Cell:
        sources: tuple[Source, ...] = ()
        if ranking is not None and ranking.outcome is not None:
            sources = sources_of(ranking.outcome["selection"], plan.pool, arm.k or 0)
        trains = arm.choice is not None and not arm.choice.merges
        return Cell(
            plan.common,
            task,
            # The base model alone, or an adapter as it is, hangs on no seed.
            seed if arm.method is not None else 0,
            arm,
            pace_of(arm, plan.config) if trains or arm.role == "rescaled" else {},
            sources,
            _target_source(target) if target else None,
            keep=plan.config.keep in ("best", "all"),
        )

    needs = tuple(node for node in (target, ranking) if node is not None)
    title = f"{arm.name} on {_told((task.name, seed))}"
    return Node(title, build, needs, keeps=plan.config.keep == "all")


def _target_source(node: Node) -> Source:
    """The target LoRA that a run trained."""
    assert node.run is not None and node.outcome is not None
    path = node.run.common.store.adapter(node.run.key)
    sha256 = node.outcome["made"]["sha256"]
    return Source(AdapterRef(id=TARGET, sha256=sha256, path=str(path)))


def _told(where: Where) -> str:
    return f"{where[0]}, seed {where[1]}"
