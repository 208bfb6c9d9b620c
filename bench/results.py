"""The tables of docs/results.md, from the study of examples/studies/smollm-mini.yaml.

recycle crawl $RECYCLE_DATA/pool --min-norm 0
recycle study --config examples/studies/smollm-mini.yaml --out DIR --jobs 2 --threads 1
python -m bench.results DIR [--write]
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.pages import DOCS, write_table
from bench.timing import machine
from recycle_cli.records import StudyArm, StudyComparison, StudyDocument, StudyResults

PAGE = DOCS / "results.md"
BASE, TARGET, RESCALED = "base", "target", "rescaled-target"


def main() -> None:
    """Prints the tables of a finished study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="the folder of the study")
    parser.add_argument("--write", action="store_true", help=f"keep the tables in {PAGE.name}")
    options = parser.parse_args()
    file = options.study / "results.json"
    study = StudyResults.from_fields(json.loads(file.read_text(encoding="utf-8")), str(file)).study
    text = "\n".join(tables(study))
    print(text)
    if options.write:
        write_table(PAGE, "results", text)


def tables(study: StudyDocument) -> Iterator[str]:
    """The Markdown of a study's results."""
    tasks = [task.name for task in study.tasks]
    yield f"The report's verdict: {study.verdict.sentence}\n"
    yield from (f"- {note}" for note in study.verdict.notes)
    yield "\nAccuracy in %, the mean over seeds (each seed in brackets); `mean` is over tasks:\n"
    yield from _grid(
        "method", [*tasks, "mean"], ((a.name, _accuracies(study, a)) for a in study.arms)
    )
    yield "\nDifferences in points on the same rows, with 95 % intervals and the adjusted p:\n"
    pairs = [pair for arm in study.arms for pair in _baselines(study, arm)]
    rows = ((f"{ours} - {theirs}", _differences(study, ours, theirs)) for ours, theirs in pairs)
    yield from _grid("comparison", [*tasks, "mean", "p"], rows)
    yield "\nWhat a cell cost, medians over tasks and seeds:\n"
    yield from _grid("method", ["seconds to make", "seconds to score"], _costs(study))
    rows_of = ", ".join(f"{task.name} {task.test_rows}" for task in study.tasks)
    yield f"\nTest rows: {rows_of}. {study.cells.failed} cells failed. {machine()}"


def _grid(
    first: str, columns: Sequence[str], rows: Iterator[tuple[str, list[str]]]
) -> Iterator[str]:
    yield f"| {first} | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, cells in rows:
        yield f"| {name} | {' | '.join(cells)} |"


def _accuracies(study: StudyDocument, arm: StudyArm) -> list[str]:
    """Of an arm on each task, and over all."""
    cells = []
    for task in study.tasks:
        found = [
            100 * row.metrics[study.metric]
            for row in study.table
            if (row.method, row.task) == (arm.name, task.name)
        ]
        each = f" ({', '.join(f'{value:.1f}' for value in found)})" if len(set(found)) > 1 else ""
        cells.append(f"{statistics.mean(found):.1f}{each}" if found else "failed")
    (mean,) = (mean for mean in study.means if mean.method == arm.name)
    low, high = mean.interval
    return [*cells, f"{100 * mean.value:.1f} ({100 * low:.1f} to {100 * high:.1f})"]


def _baselines(study: StudyDocument, arm: StudyArm) -> Iterator[tuple[str, str]]:
    """What an arm is compared with."""
    names = {other.name for other in study.arms}
    if arm.name not in (BASE, TARGET):
        yield arm.name, TARGET
    if arm.name != BASE:
        yield arm.name, BASE
    if arm.control:
        yield arm.name, arm.control
    if arm.role == "recycled" and arm.with_target and RESCALED in names:
        yield arm.name, RESCALED


def _differences(study: StudyDocument, ours: str, theirs: str) -> list[str]:
    found = {
        one.task: one for one in study.comparisons if (one.method, one.baseline) == (ours, theirs)
    }
    cells = [_difference(found.get(task.name)) for task in study.tasks]
    over_all = found.get(None)
    if over_all is None:
        return [*cells, "-", "-"]
    p_value = over_all.p_value if over_all.adjusted_p_value is None else over_all.adjusted_p_value
    return [*cells, _difference(over_all), "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"]


def _difference(test: StudyComparison | None) -> str:
    if test is None:
        return "-"
    low, high = test.interval
    return f"{100 * test.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _costs(study: StudyDocument) -> Iterator[tuple[str, list[str]]]:
    for arm in study.arms:
        rows = [row for row in study.table if row.method == arm.name]
        if rows:
            made = statistics.median(row.elapsed_s for row in rows)
            scored = statistics.median(row.scored_s for row in rows)
            yield arm.name, [f"{made:.0f}", f"{scored:.0f}"]


if __name__ == "__main__":
    main()
