"""The report's sections in their order; what a study has nothing of is left out."""

import shlex
from collections.abc import Iterator, Sequence

import yaml

from recycle_cli.records import StudyComparison, StudyResults
from recycle_cli.reporting import accounts, tables
from recycle_cli.reporting.coefficients import readable_groups, shown_cells
from recycle_cli.reporting.document import (
    Block,
    Bullets,
    Figure,
    Fold,
    Listing,
    Paragraph,
    Report,
    Section,
    Table,
)
from recycle_cli.reporting.formatting import counted, listed, seconds, size
from recycle_cli.reporting.glossary import glossary
from recycle_cli.reporting.index import StudyIndex
from recycle_cli.reporting.opening import opening
from recycle_cli.reporting.plots.against_k import plots_against_k
from recycle_cli.reporting.plots.forest import forest_plot
from recycle_cli.reporting.plots.heat_map import heat_map

# So many rows of a plot, plots of a kind, and tables are shown at once; the others are folded.
ROWS_A_PLOT, PLOTS_SHOWN, ROWS_UNFOLDED = 20, 2, 40
HEAT_MAPS = 4


def make_report(results: StudyResults, license_notes: Sequence[str]) -> Report:
    """All that a study's report says, in order."""
    index = StudyIndex(results.study)
    sections = [
        Section("results", "Results", _results(index)),
        Section("tasks", "Task by task", list(_tasks(index))),
        Section("differences", "Differences", list(_differences(index))),
        Section("against-k", "How many adapters", _shown_first(plots_against_k(index))),
        Section("coefficients", "Where the coefficients went", _coefficients(results, index)),
        Section("selection", "Which adapters were chosen", list(_selections(index))),
        Section("cost", "Cost", _cost(index)),
        Section("failures", "Failures", _failures(index)),
        Section("sources", "Sources and licences", _sources(index, license_notes)),
        Section("again", "How to run it again", list(_reproduction(index))),
        Section("glossary", "What the words mean", [glossary(index)]),
    ]
    return Report(
        title=f"Did recycling help? {results.study.name}",
        facts=_facts(index),
        opening=opening(index),
        sections=[section for section in sections if section.blocks],
    )


def _facts(index: StudyIndex) -> list[str]:
    study, cells = index.study, index.study.cells
    done = [f"{cells.done} run", f"{cells.reused} reused", f"{cells.failed} failed"]
    return [
        f"Base model {study.base_model}",
        counted(len(study.tasks), "task"),
        counted(len(study.arms), "arm"),
        counted(len(index.seeds), "seed"),
        f"Cells: {', '.join(done)}",
    ]


def _results(index: StudyIndex) -> list[Block]:
    return _present(tables.main_table(index))


def _tasks(index: StudyIndex) -> Iterator[Block]:
    for task in index.study.tasks:
        if table := tables.task_table(index, task):
            small = len(table.rows) * len(index.study.tasks) <= ROWS_UNFOLDED
            yield Fold(task.name, [table], unfolded=small)


def _differences(index: StudyIndex) -> Iterator[Block]:
    if index.reference:
        found = tables.reference_comparisons(index)
        title = f"Differences to {index.reference.label}, over all tasks"
        yield from _forests(index, found, "against-target", title)
    controls = tables.control_comparisons(index)
    title = "Differences to each arm's own control with random adapters, over all tasks"
    yield from _forests(index, controls, "against-control", title)
    yield from _present(tables.control_table(index))


def _forests(
    index: StudyIndex, found: Sequence[StudyComparison], name: str, title: str
) -> list[Block]:
    parts = [found[start : start + ROWS_A_PLOT] for start in range(0, len(found), ROWS_A_PLOT)]
    figures = [
        forest_plot(
            index, part, f"{name}-{number}", title if number == 1 else f"{title} ({number})"
        )
        for number, part in enumerate(parts, start=1)
    ]
    return _shown_first(figures, shown=1)


def _coefficients(results: StudyResults, index: StudyIndex) -> list[Block]:
    cells = [cell for cell in results.coefficients if cell.groups and cell.adapters]
    shown = [pair for cell in shown_cells(cells, HEAT_MAPS) for pair in readable_groups(cell)]
    figures = [
        heat_map(cell, what, f"coefficients-{number}")
        for number, (what, cell) in enumerate(shown, start=1)
    ]
    blocks = _present(accounts.share_table(index)) + _shown_first(figures)
    if len(cells) > HEAT_MAPS:
        rest = counted(len(cells) - HEAT_MAPS, "other cell")
        blocks.append(Paragraph(f"The coefficients of {rest} are in results.json."))
    return blocks


def _selections(index: StudyIndex) -> Iterator[Block]:
    tasks = dict.fromkeys(selection.task for selection in index.study.selections)
    for task in tasks:
        of_task = [s for s in index.study.selections if s.task == task]
        of_task.sort(key=lambda selection: (selection.method, selection.seed))
        table = accounts.selection_table(of_task)
        yield Fold(task, [table], unfolded=len(table.rows) * len(tasks) <= ROWS_UNFOLDED)


def _cost(index: StudyIndex) -> list[Block]:
    study = index.study
    whole = f"The whole study took {seconds(study.elapsed_s)}"
    memory = [f"{size(study.peak_memory_bytes)} of main memory"] if study.peak_memory_bytes else []
    if study.peak_device_memory_bytes:
        memory.append(f"{size(study.peak_device_memory_bytes)} of the accelerator's")
    if memory:
        whole += f" and at its peak {listed(memory)}"
    return [
        Paragraph(f"{whole}."),
        *_present(accounts.arm_cost_table(index), accounts.selection_cost_table(index)),
    ]


def _failures(index: StudyIndex) -> list[Block]:
    failures = index.study.failures
    return [accounts.failure_table(failures)] if failures else []


def _sources(index: StudyIndex, license_notes: Sequence[str]) -> list[Block]:
    sources = index.study.sources
    blocks: list[Block] = [Bullets(license_notes)] if license_notes else []
    if sources:
        table = accounts.source_table(sources)
        blocks.append(accounts.license_table(sources))
        blocks.append(Fold(counted(len(sources), "adapter"), [table], unfolded=len(sources) <= 12))
    return blocks


def _reproduction(index: StudyIndex) -> Iterator[Block]:
    study = index.study
    yield Listing("Command", shlex.join(study.command), "sh")
    versions = "\n".join(f"{name} {version}" for name, version in sorted(study.versions.items()))
    if versions:
        yield Listing("Versions", versions, "text")
    if study.settings:
        text = yaml.safe_dump(study.settings, sort_keys=False, allow_unicode=True)
        yield Listing("Settings of the study", text.rstrip(), "yaml")


def _present(*tables: Table | None) -> list[Block]:
    return [table for table in tables if table]


def _shown_first(figures: Sequence[Figure], shown: int = PLOTS_SHOWN) -> list[Block]:
    """The first figures as they are, the others folded."""
    rest = figures[shown:]
    folded = [Fold(counted(len(rest), "more plot"), rest)] if rest else []
    return [*figures[:shown], *folded]
