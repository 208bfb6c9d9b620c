"""The demo's whole run, on the pico model with a pool and a task of its own."""

import shlex
from pathlib import Path

import pytest
from support.adapters import write_peft_adapter
from support.tasks import write_task
from typer.testing import CliRunner

from recycle_cli.cli.app import app
from recycle_cli.errors import InputError
from recycle_cli.progress import Silent
from recycle_cli.records import StudyDocument, read_documents
from recycle_cli.settings import Settings
from recycle_cli.workflows import demo as workflow
from recycle_cli.workflows.demo import DemoRequest, Extent, check_demo, demo

TASK = "hotel_reviews"
TINY = Extent(rows=30, test_rows=24, k=2, lora_steps=6, steps=4, eval_every=2)


class Listener(Silent):
    """Keeps the command lines that the demo shows."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []

    def message(self, text: str) -> None:
        self.commands += [
            shlex.split(line[2:]) for line in text.splitlines() if line.startswith("$ ")
        ]


@pytest.fixture
def examples(tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool of three adapters and a task, in the place of the shipped ones."""
    folder = tmp_path / "examples"
    for seed in range(3):
        write_peft_adapter(folder / f"pool/lab/adapter{seed}", pico_folder, seed, r=2 + seed)
    write_task(folder / "tasks" / TASK)
    monkeypatch.setattr(workflow, "examples_folder", lambda: folder)
    monkeypatch.setattr(workflow, "FULL", TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECYCLE_HOME", str(tmp_path / "home"))
    return folder


def run(base: str, out: Path, listener: Listener, force: bool = False) -> StudyDocument:
    request = DemoRequest(out, base, TASK, force=force)
    return demo(request, Settings(out.parent / "home", dtype="float32"), listener)


def test_the_demo_is_a_study_of_every_control(
    examples: Path, pico_folder: Path, tmp_path: Path
) -> None:
    document = run(str(pico_folder), tmp_path / "out", Listener())
    assert [row.method for row in document.table] == [
        "base",
        "target",
        "recycle",
        "random recycle",
        "recycle+target",
        "random recycle+target",
        "average",
        "average+target",
        "single",
        "rescaled-target",
    ]
    assert document.tasks[0].test_rows == TINY.test_rows
    assert document.adapter is not None
    assert (tmp_path / "out/report.html").exists()
    (recorded,) = read_documents((tmp_path / "out/recycle.json").open())
    assert recorded == document
    used = {source.id for source in document.sources}
    assert used <= {f"lab/adapter{seed}" for seed in range(3)}


def test_the_commands_it_shows_do_the_same_again(
    examples: Path, pico_folder: Path, tmp_path: Path
) -> None:
    listener = Listener()
    document = run(str(pico_folder), tmp_path / "out", listener)
    assert [words[1] for words in listener.commands] == ["crawl", "index", "study"]
    again = tmp_path / "again"
    for words in listener.commands:
        if "--out" in words:
            words[words.index("--out") + 1] = str(again)
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, result.stderr
    (found,) = read_documents((again / "recycle.json").open())
    assert isinstance(found, StudyDocument)
    assert [row.metrics for row in found.table] == [row.metrics for row in document.table]
    assert found.verdict == document.verdict


def test_an_earlier_demo_goes_on_or_is_replaced_and_nothing_else(
    examples: Path, pico_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(str(pico_folder), out, Listener())
    assert run(str(pico_folder), out, Listener()).cells.done == 0
    assert run(str(pico_folder), out, Listener(), force=True).cells.done > 0
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        run(str(pico_folder), out, Listener(), force=True)
    assert (out / "notes.txt").exists()
    with pytest.raises(InputError, match="is a file"):
        check_demo(DemoRequest(out / "notes.txt", str(pico_folder)))
