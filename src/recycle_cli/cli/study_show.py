"""What people see of a study on a terminal."""

from typing import TYPE_CHECKING

from recycle_cli.cli.output import Output

if TYPE_CHECKING:
    from recycle_cli.records import StudyComparison, StudyDocument

SHOWN_FAILURES = 10
FAST_NOTE = (
    "This was a fast run: fewer rows, adapters and steps. It shows how things work; with trainings "
    "cut this short, neither figures nor verdict are to be relied on."
)


def show_study(output: Output, document: "StudyDocument") -> None:
    """The table, the verdict, and where everything is; with `--json` the document."""
    if output.json:
        output.document(document)
        return
    output.text()
    output.table(
        _title(document),
        ["method", document.metric, "95 % interval", "points to target LoRA", "p", "seconds"],
        _rows(document),
    )
    output.text(f"Verdict: {document.verdict.sentence}")
    for note in document.verdict.notes:
        output.text(f"- {note}")
    for failure in document.failures[:SHOWN_FAILURES]:
        output.text(
            f"failed: {failure.method} on {failure.task}, seed {failure.seed}: {failure.error}"
        )
    if document.fast:
        output.text(FAST_NOTE)
    cells = document.cells
    output.text(f"\n{cells.done} cells run, {cells.reused} taken, {cells.failed} failed")
    if document.adapter:
        output.text(f"The adapter with the lowest validation loss: {document.adapter}")
    output.text(f"The report: {document.path}/report.html")
    output.text(f"{document.elapsed_s / 60:.1f} minutes")


def _title(document: "StudyDocument") -> str:
    rows = sum(task.test_rows for task in document.tasks)
    several = f"mean over {len(document.tasks)} tasks, " if len(document.tasks) > 1 else ""
    return (
        f"{document.name}: {several}{rows} test rows, {document.rows} rows to learn from; p is "
        "adjusted for how many are compared"
    )


def _rows(document: "StudyDocument") -> list[tuple[object, ...]]:
    against = {
        one.method: one
        for one in document.comparisons
        if one.task is None and one.baseline == "target"
    }
    seconds: dict[str, float] = {}
    for row in document.table:
        seconds[row.method] = seconds.get(row.method, 0.0) + row.elapsed_s
    return [
        (
            mean.method,
            f"{100 * mean.value:.1f} %",
            "{:.1f} to {:.1f} %".format(*(100 * end for end in mean.interval)),
            *_against(against.get(mean.method)),
            f"{seconds[mean.method]:.0f}",
        )
        for mean in document.means
    ]


def _against(test: "StudyComparison | None") -> tuple[str, str]:
    if test is None:
        return "-", "-"
    p_value = test.p_value if test.adjusted_p_value is None else test.adjusted_p_value
    return f"{100 * test.difference:+.1f}", f"{p_value:.2g}"
