"""The report's tables of everything but scores: choices, coefficients, cost, failures, sources."""

from collections.abc import Sequence
from statistics import fmean

from recycle_cli.records import (
    StudyFailure,
    StudyRow,
    StudySelection,
    StudySource,
)
from recycle_cli.reporting.document import Cell, Column, Table
from recycle_cli.reporting.formatting import NOTHING, percent, score, seconds, size
from recycle_cli.reporting.index import StudyIndex

TOP = 5
SHA_DIGITS = 12
NOT_STATED = "not stated"


def selection_table(selections: Sequence[StudySelection]) -> Table:
    """The adapters that each ranking of a task put first."""
    rows = [
        [
            Cell(place),
            Cell(adapter.id, "the target LoRA" if adapter.role == "target" else ""),
            Cell(score(adapter.score)),
            Cell(score(adapter.log_likelihood)),
            Cell(f"{selection.method}, seed {selection.seed}"),
        ]
        for selection in selections
        for place, adapter in zip(_places(selection), selection.adapters[:TOP], strict=False)
    ]
    columns = [
        Column("Place", numeric=False),
        Column("Adapter", numeric=False),
        Column("Score"),
        Column("Mean log-likelihood, nats"),
        Column("Selection", numeric=False),
    ]
    return Table("The adapters that were chosen first", columns, rows)


def _places(selection: StudySelection) -> list[str]:
    """The adapters' places, as in `1`, `2=`, `2=`: those with one score share the place."""
    scores = [adapter.score for adapter in selection.adapters]
    return [
        NOTHING if value is None else f"{scores.index(value) + 1}{'=' * (scores.count(value) > 1)}"
        for value in scores
    ]


def share_table(index: StudyIndex) -> Table | None:
    """How much of the coefficients went to the target LoRA, by arm."""
    shares = {
        name: [row.target_share for row in index.rows(name) if row.target_share is not None]
        for name in index.arms
    }
    rows = [
        [
            Cell(name),
            Cell(percent(fmean(found))),
            Cell(percent(min(found))),
            Cell(percent(max(found))),
        ]
        for name, found in shares.items()
        if found
    ]
    if not rows:
        return None
    columns = [Column("Arm", numeric=False), Column("Mean, %"), Column("Least"), Column("Most")]
    return Table("The target LoRA's share of the coefficients, over the runs", columns, rows)


def arm_cost_table(index: StudyIndex) -> Table | None:
    """What a run of each arm took."""
    rows = [_arm_cost(name, runs) for name in index.arms if (runs := index.rows(name))]
    if not rows:
        return None
    columns = [
        Column("Arm", numeric=False),
        Column("Runs"),
        Column("To make"),
        Column("To score"),
        Column("Peak memory"),
    ]
    caption = "Mean time of a run; selections and target LoRAs that arms share are not counted"
    return Table(caption, columns, rows)


def _arm_cost(name: str, runs: Sequence[StudyRow]) -> list[Cell]:
    return [
        Cell(name),
        Cell(str(len(runs))),
        Cell(seconds(fmean(run.elapsed_s for run in runs))),
        Cell(seconds(fmean(run.scored_s for run in runs))),
        Cell(size(max(run.peak_memory_bytes for run in runs))),
    ]


def selection_cost_table(index: StudyIndex) -> Table | None:
    """What choosing adapters took, by method."""
    by_method: dict[str, list[StudySelection]] = {}
    for selection in index.study.selections:
        by_method.setdefault(selection.method, []).append(selection)
    if not by_method:
        return None
    rows = [
        [
            Cell(method),
            Cell(str(len(runs))),
            Cell(f"{fmean(run.passes for run in runs):,.0f}"),
            Cell(seconds(fmean(run.elapsed_s for run in runs))),
        ]
        for method, runs in by_method.items()
    ]
    columns = [
        Column("Selection", numeric=False),
        Column("Runs"),
        Column("Passes of the model, mean"),
        Column("Time, mean"),
    ]
    return Table("What choosing the adapters took", columns, rows)


def failure_table(failures: Sequence[StudyFailure]) -> Table:
    """The cells that failed."""
    columns = [Column(title, numeric=False) for title in ("Arm", "Task", "Seed", "Error")]
    rows = [
        [Cell(f.method), Cell(f.task), Cell(str(f.seed)), Cell(" ".join(f.error.split()))]
        for f in failures
    ]
    return Table("Cells that failed; the figures above are without them", columns, rows)


def source_table(sources: Sequence[StudySource]) -> Table:
    """The adapters that the study used, by name."""
    columns = [
        Column("Adapter", numeric=False),
        Column("Revision", numeric=False),
        Column("sha256", numeric=False),
        Column("Licence", numeric=False),
        Column("Cells"),
    ]
    rows = [
        [
            Cell(source.id),
            Cell((source.revision or NOTHING)[:SHA_DIGITS]),
            Cell(source.sha256[:SHA_DIGITS]),
            Cell(source.license or NOT_STATED),
            Cell(str(source.cells)),
        ]
        for source in sorted(sources, key=lambda source: (source.id, source.sha256))
    ]
    return Table("The adapters that went into some cell", columns, rows)


def license_table(sources: Sequence[StudySource]) -> Table:
    """How many adapters stand under each licence, the most frequent first."""
    counts: dict[str, int] = {}
    for source in sources:
        name = source.license or NOT_STATED
        counts[name] = counts.get(name, 0) + 1
    rows = [
        [Cell(name), Cell(str(count))]
        for name, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    ]
    return Table(
        "Licences, as their owners state them", [Column("Licence", False), Column("Adapters")], rows
    )
