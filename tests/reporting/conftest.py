"""The reports that tests read, written once."""

from pathlib import Path

import pytest
from support.study import study_results

from recycle_cli.records import StudyResults
from recycle_cli.reporting.report import write_report

LICENSE_NOTES = ["Commercial use is not allowed under cc-by-nc-4.0 & <b>others</b>."]


@pytest.fixture(scope="session")
def results() -> StudyResults:
    """A study with everything that a report can show."""
    return study_results()


@pytest.fixture(scope="session")
def folder(results: StudyResults, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report."""
    folder = tmp_path_factory.mktemp("report")
    write_report(results, folder, LICENSE_NOTES)
    return folder
