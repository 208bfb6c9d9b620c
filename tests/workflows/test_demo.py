"""The demo's whole run, on the pico model with a pool and a task of its own."""

import shlex
from pathlib import Path

import pytest
from support.adapters import write_peft_adapter
from support.tasks import write_task
from typer.testing import CliRunner

from recycle_cli.cli.app import app
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.errors import InputError, RecycleError
from recycle_cli.progress import Silent
from recycle_cli.records import StudyDocument, TuneDocument, read_documents
from recycle_cli.settings import Settings
from recycle_cli.workflows import demo as workflow
from recycle_cli.workflows.demo import ARMS, DemoRequest, Extent, Method, check_demo, demo

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


def run(base: BaseModel, out: Path, listener: Listener, force: bool = False) -> StudyDocument:
    request = DemoRequest(out, base.id, TASK, force=force)
    return demo(request, Settings(out.parent / "home", dtype="float32"), base, listener)


def test_the_demo_makes_scores_and_records_every_method(
    examples: Path, pico_base: BaseModel, tmp_path: Path
) -> None:
    listener = Listener()
    document = run(pico_base, tmp_path / "out", listener)
    assert [row.method for row in document.table] == list(Method)
    assert all(0 <= row.metrics["acc"] <= 1 for row in document.table)
    assert [row.p_value_against_target is None for row in document.table] == [
        method is Method.TARGET for method in Method
    ]
    assert [arm.name for arm in ARMS] == list(Method)
    assert document.verdict.figures["rows"] == TINY.test_rows
    (recorded,) = read_documents((tmp_path / "out/recycle.json").open())
    assert recorded == document
    tuned = [
        next(iter(read_documents((tmp_path / "out" / name / "recycle.json").open())))
        for name in (Method.TARGET, Method.RECYCLED, Method.RECYCLED_TARGET)
    ]
    best = min(
        (one for one in tuned if isinstance(one, TuneDocument)), key=lambda d: d.best.valid_loss
    )
    assert document.adapter == best.path


def test_the_commands_it_shows_do_the_same_again(
    examples: Path, pico_base: BaseModel, tmp_path: Path
) -> None:
    listener = Listener()
    run(pico_base, tmp_path / "out", listener)
    shown = [words[1] for words in listener.commands]
    assert shown == ["crawl", "index", "select", "tune", "merge", *["tune"] * 5, "eval"]
    for words in listener.commands:
        if "--out" in words:
            first = Path(words[words.index("--out") + 1])
            again = tmp_path / "again" / first.name
            words[words.index("--out") + 1] = str(again)
            file = "adapter_model.safetensors"
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, result.stderr
        if "--out" in words:
            assert (again / file).read_bytes() == (first / file).read_bytes(), words


def test_what_an_earlier_demo_wrote_is_replaced_and_nothing_else(
    examples: Path, pico_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RecycleError("half-way", "try again")

    out = tmp_path / "out"
    run(pico_base, out, Listener())
    request = DemoRequest(out, pico_base.id, TASK)
    with pytest.raises(InputError, match="exists"):
        check_demo(request)
    run(pico_base, out, Listener(), force=True)
    monkeypatch.setattr(workflow, "evaluate", fails)
    with pytest.raises(RecycleError, match="half-way"):
        run(pico_base, out, Listener(), force=True)
    assert (out / "recycle.json").exists(), "the earlier result is back"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        run(pico_base, out, Listener(), force=True)
    assert (out / "recycled" / "adapter_config.json").exists()
