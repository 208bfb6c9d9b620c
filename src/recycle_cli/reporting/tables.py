"""The report's tables of scores and comparisons: what each arm reached, over all tasks and on
each."""

from statistics import fmean

from recycle_cli.records import StudyArm, StudyComparison, StudyMean, StudyRow, StudyTask
from recycle_cli.reporting.document import Cell, Column, Table
from recycle_cli.reporting.formatting import (
    NOTHING,
    counted,
    p_value,
    percent,
    percent_interval,
    points,
    points_interval,
)
from recycle_cli.reporting.index import StudyIndex, adjusted, first_metric, metric_words

ALPHA = 0.05

P_TITLE = "Adjusted p"


def main_table(index: StudyIndex) -> Table | None:
    """Every arm over all tasks, the highest mean first."""
    if not index.means:
        return None
    columns = [Column("Arm", numeric=False), Column(f"Mean {index.metric}, %")]
    if index.reference:
        columns += [Column(_difference_title(index.reference)), Column(P_TITLE)]
    if _says_no_difference(index):
        columns.append(Column(no_difference_title(index)))
    columns.append(Column("Runs"))
    return Table(
        "Each arm over all tasks, each task counted alike, with 95 % intervals",
        columns,
        [_main_row(index, mean) for mean in index.means],
    )


def _main_row(index: StudyIndex, mean: StudyMean) -> list[Cell]:
    cells = [
        _arm_cell(index, mean.method),
        Cell(percent(mean.value), percent_interval(mean.interval)),
    ]
    if index.reference:
        comparison = index.comparison(mean.method, index.reference.name)
        cells += difference_cells(comparison)
    if _says_no_difference(index):
        cells.append(_no_difference_cell(index.no_difference(mean.method)))
    cells.append(Cell(str(mean.runs), f"on {counted(mean.tasks, 'task')}"))
    return cells


def _says_no_difference(index: StudyIndex) -> bool:
    return any(index.no_difference(mean.method) is not None for mean in index.means)


def no_difference_title(index: StudyIndex) -> str:
    """As in `Adjusted p of no difference of 1.0 points`."""
    margin = f" of {points(index.margin).lstrip('+')} points" if index.margin else ""
    return f"{P_TITLE} of no difference{margin}"


def _no_difference_cell(value: float | None) -> Cell:
    return Cell(NOTHING) if value is None else Cell(p_value(value), strong=value < ALPHA)


def control_table(index: StudyIndex) -> Table | None:
    """Every recycled arm against its own control and against the target LoRA rescaled alone."""
    pairs = control_comparisons(index) + _rescaled_comparisons(index)
    if not pairs:
        return None
    return Table(
        "Recycled arms against their controls: the same steps with random adapters, and the target "
        "LoRA rescaled alone",
        [
            Column("Arm", numeric=False),
            Column("Control", numeric=False),
            Column("Difference, points"),
            Column(P_TITLE),
        ],
        [[_arm_cell(index, c.method), Cell(c.baseline), *difference_cells(c)] for c in pairs],
    )


def control_comparisons(index: StudyIndex) -> list[StudyComparison]:
    """The arms against their own controls over all tasks, the largest difference first."""
    found = [
        comparison
        for arm in index.arms.values()
        if arm.control and (comparison := index.comparison(arm.name, arm.control))
    ]
    return sorted(found, key=lambda comparison: -comparison.difference)


def _rescaled_comparisons(index: StudyIndex) -> list[StudyComparison]:
    rescaled = [arm.name for arm in index.arms.values() if arm.role == "rescaled"]
    found = [
        comparison
        for arm in index.arms.values()
        for name in rescaled
        if arm.role == "recycled" and (comparison := index.comparison(arm.name, name))
    ]
    return sorted(found, key=lambda comparison: -comparison.difference)


def reference_comparisons(index: StudyIndex) -> list[StudyComparison]:
    """All arms against the target LoRA over all tasks, the largest difference first."""
    if index.reference is None:
        return []
    found = [
        comparison
        for comparison in index.study.comparisons
        if comparison.task is None and comparison.baseline == index.reference.name
    ]
    return sorted(found, key=lambda comparison: -comparison.difference)


def task_table(index: StudyIndex, task: StudyTask) -> Table | None:
    """Every arm on one task, the highest mean over seeds first."""
    reached = [(name, rows) for name in _arm_names(index) if (rows := index.rows(name, task.name))]
    if not reached:
        return None
    means = {name: fmean(first_metric(row)[1] for row in rows) for name, rows in reached}
    reached.sort(key=lambda pair: -means[pair[0]])
    several = len(index.seeds) > 1
    seeds = ", ".join(str(seed) for seed in index.seeds)
    columns = [
        Column("Arm", numeric=False),
        Column(f"{_capital(metric_words(task.metric))}, %"),
        Column(f"By seed ({seeds})" if several else "95 % interval"),
    ]
    if index.reference:
        columns += [Column(_difference_title(index.reference)), Column(P_TITLE)]
    cells = [
        [
            Cell(name),
            Cell(percent(means[name])),
            Cell(_by_seed(index, runs) if several else percent_interval(runs[0].interval)),
            *(_task_difference(index, name, task)),
        ]
        for name, runs in reached
    ]
    return Table(
        f"{task.train_rows} rows to train on, {task.valid_rows} to validate on, "
        f"{task.test_rows} to test on",
        columns,
        cells,
    )


def _task_difference(index: StudyIndex, name: str, task: StudyTask) -> list[Cell]:
    if index.reference is None:
        return []
    return difference_cells(index.comparison(name, index.reference.name, task.name))


def _by_seed(index: StudyIndex, rows: list[StudyRow]) -> str:
    """The values in the order of the seeds; a cell that is missing is a dash."""
    values = {row.seed: percent(first_metric(row)[1]).removesuffix(" %") for row in rows}
    return " / ".join(values.get(seed, NOTHING) for seed in index.seeds)


def difference_cells(comparison: StudyComparison | None) -> list[Cell]:
    """A difference with its interval, and its p-value, set off where it is below 0.05."""
    if comparison is None:
        return [Cell(NOTHING), Cell(NOTHING)]
    value = adjusted(comparison)
    differs = value < ALPHA
    return [
        Cell(points(comparison.difference), points_interval(comparison.interval), strong=differs),
        Cell(p_value(value), strong=differs),
    ]


def _arm_names(index: StudyIndex) -> list[str]:
    """The arms in the study's order, then those that only its table names."""
    named = list(index.arms)
    return named + sorted({row.method for row in index.study.table} - set(named))


def _arm_cell(index: StudyIndex, name: str) -> Cell:
    label = index.label(name)
    return Cell(name, "" if label == name else label)


def _difference_title(reference: StudyArm) -> str:
    return f"Against {reference.label}, points"


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
