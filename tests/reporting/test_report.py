"""A report says what its study holds, the same way in each of its forms."""

import csv
import json
import os
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.study import HOSTILE_ADAPTER, HOSTILE_TASK, study_results, without_anything

from recycle_cli.records import StudyArm, StudyResults, StudyRow
from recycle_cli.reporting.coefficients import readable_groups, shown_cells
from recycle_cli.reporting.formatting import (
    p_value,
    percent,
    percent_interval,
    points,
    points_interval,
)
from recycle_cli.reporting.index import StudyIndex
from recycle_cli.reporting.opening import ADVICE, opening
from recycle_cli.reporting.report import write_report

FILES = ["report.html", "report.md", "results.csv", "results.json"]


class Outline(HTMLParser):
    """The text of a page, its identifiers, and its elements with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def markdown_of(folder: Path) -> str:
    return (folder / "report.md").read_text(encoding="utf-8")


def test_names_its_files_and_leaves_no_others(results: StudyResults, tmp_path: Path) -> None:
    assert write_report(results, tmp_path) == FILES
    assert {file.name for file in tmp_path.iterdir()} == set(FILES)
    assert write_report(results, tmp_path) == FILES


@pytest.mark.parametrize("form", [page_of, markdown_of])
def test_every_figure_of_the_main_table_is_there(form, folder: Path, results: StudyResults) -> None:  # type: ignore[no-untyped-def]
    text = form(folder)
    text = Outline(text).text if form is page_of else text.replace("&lt;", "<")
    for mean in results.study.means:
        assert percent(mean.value) in text
        assert percent_interval(mean.interval) in text
    overall = [c for c in results.study.comparisons if c.task is None]
    assert overall
    for comparison in overall:
        assert points(comparison.difference) in text
        assert points_interval(comparison.interval) in text
        assert comparison.adjusted_p_value is not None
        assert p_value(comparison.adjusted_p_value) in text
    assert "0.041" in text, "that an arm matches the target LoRA"


def test_a_row_holds_what_its_arm_reached(folder: Path, results: StudyResults) -> None:
    arm = "recycle+target k=10"
    mean = next(mean for mean in results.study.means if mean.method == arm)
    test = next(
        c
        for c in results.study.comparisons
        if c.method == arm and c.task is None and c.baseline == "target"
    )
    table = markdown_of(folder).partition("## Task by task")[0]
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {arm} ")]
    cells = row.replace("**", "").split(" | ")
    assert cells[1] == f"{percent(mean.value)} ({percent_interval(mean.interval)})"
    assert cells[2] == f"{points(test.difference)} ({points_interval(test.interval)})"
    assert cells[3] == p_value(test.adjusted_p_value or 0.0)


def opened(results: StudyResults, kept: str | None = None, **changed: Any) -> str:
    """What the first screen says of a study with another verdict, whose first adapter of an arm is
    kept."""
    verdict = results.study.verdict.model_copy(update=changed)
    table = [row.model_copy(update={"path": None}) for row in results.study.table]
    at = next((i for i, row in enumerate(table) if row.method == kept), None)
    if at is not None:
        table[at] = table[at].model_copy(update={"path": "out/kept"})
    study = results.study.model_copy(update={"verdict": verdict, "table": table})
    found = opening(StudyIndex(study.model_copy(update={"adapter": "out/kept" if kept else None})))
    return f"{found.advice} {found.adapter.words} {found.adapter.code}" if found.adapter else ""


def test_the_adapter_on_the_first_screen_is_the_one_that_the_advice_is_about(
    results: StudyResults,
) -> None:
    arm = "recycle+target k=5"
    wins = {"kind": "beats_target", "method": arm}
    assert opened(results, arm, **wins).endswith(
        f"It is that of {arm}; for {results.study.table[0].task} with seed 0 it is in out/kept"
    )
    # The lowest validation loss is that of another arm, whose adapter is the only one that is kept.
    other = opened(results, "target", **wins)
    assert f"It is that of {arm}, and was not kept" in other
    assert other.endswith("--keep all")
    own = opened(results, "target", kind="worse_than_target", method=arm)
    assert "that of target has the lowest validation loss; it is in out/kept" in own
    assert opened(results, None, kind="worse_than_target", method=arm) == ""


def test_an_arm_that_was_scored_on_easy_tasks_alone_does_not_stand_first(
    results: StudyResults,
) -> None:
    lucky = results.study.means[0].model_copy(update={"value": 1.0, "tasks": 1})
    study = results.study.model_copy(update={"means": [lucky, *results.study.means[1:]]})
    assert StudyIndex(study).means[-1] is lucky


def test_nobody_is_told_to_act_on_a_fast_run(results: StudyResults) -> None:
    study = results.study.model_copy(update={"fast": True})
    assert opening(StudyIndex(study)).advice.startswith("Run it in full before you act on it")


def test_equal_results_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    """In another process too, where hashes of text differ."""
    again = (
        "import sys; from pathlib import Path; from recycle_cli.records import StudyResults;"
        "from recycle_cli.reporting.report import write_report; import json;"
        "from reporting.conftest import LICENSE_NOTES;"
        "old, new = map(Path, sys.argv[1:]);"
        "fields = json.loads((old / 'results.json').read_text());"
        "write_report(StudyResults.from_fields(fields, 'it'), new, LICENSE_NOTES)"
    )
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(tests)}
    command = [sys.executable, "-c", again, str(folder), str(tmp_path)]
    subprocess.run(command, env=environment, check=True)
    for name in FILES:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_results_come_back_as_they_were(folder: Path, results: StudyResults) -> None:
    line = (folder / "results.json").read_text(encoding="utf-8")
    assert line.count("\n") == 1
    assert StudyResults.from_fields(json.loads(line), "results.json") == results


def test_cells_come_back_from_csv(folder: Path, results: StudyResults) -> None:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    table, failures = results.study.table, results.study.failures
    assert len(rows) == len(table) + len(failures)
    assert [row_of(fields) for fields in rows[: len(table)]] == table
    for fields, failure in zip(rows[len(table) :], failures, strict=True):
        assert (fields["method"], fields["task"]) == (failure.method, failure.task)
        assert fields["error"] == failure.error


def row_of(fields: dict[str, str]) -> StudyRow:
    prefix = "metrics."
    metrics = {k.removeprefix(prefix): float(v) for k, v in fields.items() if k.startswith(prefix)}
    assert float(fields["value"]) == metrics[fields["metric"]]
    given = {name: value for name, value in fields.items() if value != ""}
    interval = (float(fields["interval_low"]), float(fields["interval_high"]))
    return StudyRow.model_validate({**given, "metrics": metrics, "interval": interval})


# --- strangers' text ------------------------------------------------------------------------------


def test_strangers_text_starts_nothing_on_the_page(folder: Path) -> None:
    page = Outline(page_of(folder))
    assert not page.all("script") and not page.all("img") and not page.all("b")
    assert not [attributes for _, attributes in page.elements if "onerror" in attributes]
    assert HOSTILE_TASK in page.text and HOSTILE_ADAPTER in page.text
    assert "<b>others</b>" in page.text


def test_strangers_text_starts_nothing_in_markdown(folder: Path) -> None:
    text = markdown_of(folder)
    outside = re.sub(r"^(```+).*?^\1", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside
    for table in re.findall(r"(?:^\|.*\n)+", outside, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, "a name ended a cell"


@pytest.mark.parametrize("seed", range(12))
def test_any_text_at_all_can_be_a_name(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    odd = "\x00\x1b\u202e\u2028\U0001d518\ufffe漢字🦙<>&\"'`$\\^_{}#|\n\r\t%[](){{}}{%*~]]>--!:"
    name = "".join(chance.choices(odd, k=30))
    results = study_results(tasks=[name], seeds=[0], methods=[name], ks=(2, 3), layers=2)
    write_report(results, tmp_path)
    page = page_of(tmp_path)
    assert page.count("<svg") == page.count("</svg>") == page.count("<figure")
    assert {tag for tag, _ in Outline(page).elements} <= ELEMENTS


ELEMENTS = set(
    re.findall(
        r"\w+",
        "html head meta link title style body header h1 h2 h3 p strong code ul li nav a main "
        "section details summary div table thead tbody tr th td span small figure figcaption pre "
        "dl dt dd svg desc defs g path use rect text tspan clippath",
    )
)


# --- the page -------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing(folder: Path) -> None:
    page = page_of(folder)
    outline = Outline(page)
    for tag in ("script", "iframe", "object", "embed", "audio", "video"):
        assert not outline.all(tag)
    links = [value for _, attributes in outline.elements for value in (attributes.get("href"),)]
    assert all(link.startswith(("#", "data:,")) for link in links if link)
    assert not re.search(r"url\((?!#)|@import", page)


def test_identifiers_are_there_once_and_lead_somewhere(folder: Path) -> None:
    page = page_of(folder)
    outline = Outline(page)
    names = [a["id"] for _, a in outline.elements if "id" in a]
    assert len(names) == len(set(names))
    wanted = {a["href"] for _, a in outline.elements if (a.get("href") or "").startswith("#")}
    wanted |= set(re.findall(r"url\((#[^)]*)\)", page))
    assert {str(link)[1:] for link in wanted} <= set(names)


def test_tables_and_plots_can_be_read_aloud(folder: Path) -> None:
    outline = Outline(page_of(folder))
    assert outline.all("html")[0]["lang"] == "en"
    assert all(attributes.get("scope") in ("col", "row") for attributes in outline.all("th"))
    assert all(attributes.get("aria-label") for attributes in outline.all("table"))
    plots = outline.all("svg")
    assert len(plots) == len(outline.all("figure")) == len(outline.all("desc")) >= 6
    assert all(plot["role"] == "img" and plot["aria-labelledby"] for plot in plots)


def test_plots_take_their_colours_from_the_page(folder: Path) -> None:
    drawn = re.findall(r"<svg.*?</svg>", page_of(folder), flags=re.DOTALL)
    assert not [plot for plot in drawn if re.search(r"(fill|stroke)[:=]\W*#", plot)]


def test_what_a_study_has_nothing_of_is_left_out(tmp_path: Path) -> None:
    write_report(without_anything(), tmp_path)
    headings = re.findall(r"^## (.*)", markdown_of(tmp_path), flags=re.MULTILINE)
    assert headings == ["Cost", "How to run it again", "What the words mean"]
    assert "<table" not in page_of(tmp_path) and "<svg" not in page_of(tmp_path)


def test_the_claim_stands_first_and_what_to_do_under_it(folder: Path) -> None:
    lines = [line for line in markdown_of(folder).splitlines() if line]
    assert lines[1] == (
        "**Recycling beats your own LoRA, but not measurably more than random adapters do.**"
    )
    assert lines[2].startswith(f"**What to do.** {ADVICE['regularisation']}")
    assert lines[3].startswith("63.8 % for recycle of recycled adapters")


def test_every_verdict_says_what_to_do() -> None:
    from recycle_cli.evaluation.verdict import VerdictKind

    assert set(ADVICE) == {str(kind) for kind in VerdictKind}


def test_a_study_without_a_target_lora_is_compared_with_the_base_model(tmp_path: Path) -> None:
    results = study_results(seeds=[0])
    comparisons = [
        c.model_copy(update={"baseline": "base"})
        for c in results.study.comparisons
        if c.baseline == "target" and c.method != "base"
    ]
    arms = [arm for arm in results.study.arms if arm.name != "target"]
    study = results.study.model_copy(update={"arms": arms, "comparisons": comparisons})
    write_report(StudyResults(study=study), tmp_path)
    assert "Against the base model, points" in markdown_of(tmp_path)


def test_arms_that_only_the_table_names_are_shown(tmp_path: Path) -> None:
    results = study_results(seeds=[0], tasks=["qasc"])
    study = results.study.model_copy(update={"arms": list[StudyArm]()})
    write_report(StudyResults(study=study), tmp_path)
    assert "| recycle k=5 |" in markdown_of(tmp_path)


def test_many_tasks_are_folded_away(tmp_path: Path) -> None:
    write_report(study_results(tasks=[f"task {i}" for i in range(12)]), tmp_path)
    folds = Outline(page_of(tmp_path)).all("details")
    assert len(folds) >= 24 and not [fold for fold in folds if "open" in fold]


# --- coefficients ---------------------------------------------------------------------------------


def test_coefficients_of_many_modules_are_put_together(results: StudyResults) -> None:
    cell = results.coefficients[-1]
    assert len(cell.groups) == 35
    (kinds, by_kind), (layers, by_layer) = readable_groups(cell)
    assert (kinds, layers) == ("kind of module", "layer")
    assert by_kind.groups[0] == "q_proj" and by_layer.groups == ["0", "1", "2", "3", "4"]
    first = [row[0] for path, row in zip(cell.groups, cell.values, strict=True) if "q_proj" in path]
    assert by_kind.values[0][0] == pytest.approx(sum(first) / 5)
    first = [row[-1] for path, row in zip(cell.groups, cell.values, strict=True) if ".3." in path]
    assert by_layer.values[3][-1] == pytest.approx(sum(first) / 7)


def test_each_arm_is_shown_before_any_is_shown_twice(results: StudyResults) -> None:
    shown = shown_cells(results.coefficients, 3)
    assert [(c.method, c.task) for c in shown] == [
        ("recycle+target k=10", "qasc"),
        ("recycle+target k=20", "qasc"),
        ("recycle+target k=10", "strategy_qa"),
    ]
