"""A study's report: a page, its Markdown, its cells as CSV, and what all of them are made of."""

from collections.abc import Sequence
from pathlib import Path

from recycle_cli.records import StudyResults
from recycle_cli.reporting.cells import render_cells
from recycle_cli.reporting.markdown import render_markdown
from recycle_cli.reporting.page import render_page
from recycle_cli.reporting.sections import make_report

RESULTS_FILE = "results.json"


def write_report(
    results: StudyResults, folder: Path, license_notes: Sequence[str] = ()
) -> list[str]:
    """Writes the report's files into a folder that is there, over earlier ones.

    The same results give the same bytes. Each file is written beside its place and renamed.

    Args:
        results: the study and the coefficients of its mixtures.
        folder: where the files go.
        license_notes: what is to be known about the licences of the sources together.

    Returns:
        The names of the files, the page first.
    """
    report = make_report(results, license_notes)
    files = {
        "report.html": render_page(report),
        "report.md": render_markdown(report),
        "results.csv": render_cells(results.study),
        RESULTS_FILE: results.to_line() + "\n",
    }
    for name, text in files.items():
        _write_whole(folder / name, text)
    return list(files)


def _write_whole(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}.partial")
    # Lone surrogates, which names of files can hold, are no UTF-8.
    beside.write_text(text, encoding="utf-8", errors="replace", newline="")
    beside.replace(file)
