"""What goes wrong ends in `error:` and `hint:`, the right exit code, and nothing on disk."""

import json
import shutil
from pathlib import Path

import pytest
from support.adapters import write_peft_adapter
from support.command import Done, Recycle
from support.tasks import closed_rows, write_rows, write_task


@pytest.fixture
def place(tmp_path: Path, pool: Path, task: Path, pico_folder: Path) -> Path:
    """A folder with an adapter, a task, and much that is broken."""
    shutil.copytree(pool / "lab/plain", tmp_path / "plain")
    shutil.copytree(task, tmp_path / "task")
    (tmp_path / "model").symlink_to(pico_folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "there/precious.txt").write_text("keep me")
    (tmp_path / "file").write_text("no folder")
    write_rows(tmp_path / "broken.jsonl", closed_rows(7))
    with (tmp_path / "broken.jsonl").open("a") as file:
        file.write('{"input": "no answer"}\n')
    write_rows(tmp_path / "few.jsonl", closed_rows(3))
    write_task(tmp_path / "leaky")
    shutil.copy(tmp_path / "leaky/train.jsonl", tmp_path / "leaky/test.jsonl")
    write_task(tmp_path / "open", closed=False)
    shutil.copytree(pool / "shop/mlp", tmp_path / "copy")
    (tmp_path / "copy/checkpoint").mkdir()
    shutil.copytree(pool / "lab/rslora", tmp_path / "twin/copy")
    (tmp_path / "dangling").symlink_to("nowhere")
    write_rows(tmp_path / "tested/test.jsonl", closed_rows(30))
    shutil.copytree(pico_folder, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    stranger = shutil.copytree(pool / "lab/plain", tmp_path / "stranger")
    config = json.loads((stranger / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/other-model"
    (stranger / "adapter_config.json").write_text(json.dumps(config))
    write_peft_adapter(tmp_path / "bad/dora", pico_folder, use_dora=True)
    return tmp_path


def assert_refused(done: Done, code: int, *said: str) -> None:
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: "), done.stderr
    assert hint.startswith("hint: "), done.stderr
    assert "Traceback" not in done.stderr
    for text in said:
        assert text in f"{error}\n{hint}", done.stderr
    assert done.exit_code == code
    assert done.stdout == ""


SELECT = "select plain --base-model model"
MERGE = "merge plain --base-model model --out new"
TUNE = "tune --task task --base-model model --steps 1 --out new"
EVAL = "eval plain --base-model model"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("crawl nowhere", ("nowhere does not exist",)),
        ("crawl file", ("file is no folder",)),
        ("crawl empty --base-model model", ("empty holds no adapter",)),
        ("crawl . --base-model nowhere/model", ("'nowhere/model' cannot be loaded",)),
        ("index show nothing", ("no adapter 'nothing'",)),
        ("index show sha256:abc", ("sha256:abc",)),
        ("index list --sort beauty", ("beauty", "norm")),
        ("index list --status good", ("'good'", "accepted")),
        (f"{SELECT} --method evaluate", ("'evaluate'", "did you mean evaluation")),
        (SELECT, ("no task is named", "--task")),
        (f"{SELECT} --task nowhere", ("nowhere",)),
        (f"{SELECT} --task broken.jsonl", ("broken.jsonl", "8", "output")),
        (f"{SELECT} --task few.jsonl", ("3",)),
        (f"{SELECT} --task task --score-on test", ("--score-on is 'test'",)),
        ("select --base-model model --method random -k 1 plain plain", ("same file",)),
        (f"{MERGE} --method averag", ("'averag'", "did you mean average")),
        (f"{MERGE} --weights=1,2", ("2 numbers for 1",)),
        (f"{MERGE} --weights=one", ("one",)),
        (f"{MERGE} --weights=0", ("sums to 0",)),
        (f"{MERGE} --rank 0", ("'0'",)),
        (f"{MERGE} --rank energy:1.5", ("energy:1.5",)),
        ("merge --base-model model --out new", ("no adapters",)),
        ("merge nowhere --base-model model --out new", ("'nowhere'",)),
        ("merge empty --base-model model --out new", ("empty is no adapter folder",)),
        ("merge stranger --base-model model --out new", ("belongs to org/other-model",)),
        ("merge bad/dora --base-model model --out new", ("'dora' cannot be used", "DoRA")),
        ("merge plain --base-model model --out there", ("there exists", "--force")),
        ("merge plain --base-model model --out there --force", ("leaves it alone",)),
        ("merge plain --base-model model --out plain --force", ("plain is one of the adapters",)),
        ("merge plain --base-model model --out copy --force", ("leaves it alone",)),
        ("merge plain --base-model model --out dangling", ("dangling exists",)),
        ("merge plain --base-model model --out file --force", ("file is no folder",)),
        (f"{MERGE} --weights=nan", ("'nan'",)),
        (f"{MERGE} --weights=inf", ("'inf'",)),
        (f"{SELECT} --method random --rows 5", ("scores no rows",)),
        (f"{SELECT} --task tested", ("no training rows",)),
        ("index --json list", ("recycle index list --json",)),
        ("tune --task tested --base-model model --out new", ("no training rows",)),
        ("tune --task task --base-model mute --out new", ("the tokenizer of", "mute")),
        ("merge plain --base-model model --out file/new", ("file cannot be written",)),
        (f"{TUNE} --method lor", ("'lor'", "did you mean lora")),
        (f"{TUNE} --method recycle", ("needs adapters",)),
        (f"{TUNE} plain --method lora", ("takes no adapters",)),
        (f"{TUNE} --target plain plain", ("also stands among",)),
        (f"{TUNE} plain --method rescale", ("the target LoRA alone",)),
        (f"{TUNE} plain --rank 4 --rslora", ("no use for rank, use_rslora",)),
        (f"{TUNE} --reinit expert", ("'expert'",)),
        (f"{TUNE} --lr 0", ("--lr is 0",)),
        (f"{TUNE} --lr nan", ("--lr is nan",)),
        (f"{TUNE} --alpha 0", ("--alpha is 0",)),
        (f"{TUNE} --rank-pattern v_proj", ("v_proj=16",)),
        (f"{TUNE} --rank-pattern v_proj=0", ("v_proj=0",)),
        (f"{TUNE} --rank-pattern [(=3", ("'[(=3'",)),
        (f"{TUNE} --rank-pattern v_proj={'9' * 400}", ("v_proj=999",)),
        (f"{TUNE} --rank-pattern nosuch=3", ("'nosuch'", "q_proj")),
        (f"{TUNE} --target-module q_proj --alpha-pattern v_proj=3", ("'v_proj'", "q_proj")),
        (f"{TUNE} plain --license mit", ("--license is 'mit'",)),
        (f"{TUNE} --target plain --reinit experts", ("there are none",)),
        (f"{TUNE} --rows 1", ("1 training rows",)),
        (f"{TUNE} --target-module w_proj", ("'w_proj'", "q_proj")),
        (f"{TUNE} --save-dtype int8", ("'int8'", "bfloat16")),
        ("tune plain --task task --base-model model --lr 1e30 --out new", ("lower --lr",)),
        (EVAL, ("no task is named",)),
        (f"{EVAL} --task few.jsonl", ("no test rows",)),
        (f"{EVAL} --task leaky", ("40 test rows", "--allow-overlap")),
        (f"{EVAL} --task open --metric acc", ("needs choices",)),
        (f"{EVAL} --task task --metric f1", ("'f1'",)),
        (f"{EVAL} --task task --baseline best", ("'best'", "plain")),
        (f"{EVAL} --task task --fail-under acc", ("acc",)),
        (f"{EVAL} --task task --fail-under acc=nan", ("acc=nan",)),
        (f"{EVAL} --task task --fail-under exact_match=0", ("computed here: acc",)),
        ("eval --task task --base-model model --fail-under acc=0", ("none is named",)),
        (f"{EVAL} copy twin/copy --task task --baseline copy", ("more than one",)),
        (f"{EVAL} --task task --fail-under f1=1", ("'f1'",)),
        (f"{EVAL} --task task --samples there/precious.txt", ("precious.txt exists",)),
        ("demo --task hotel --out new", ("'hotel'", "did you mean hotel_reviews")),
        ("demo --out there", ("there exists",)),
        ("demo --out there --force", ("'precious.txt', which no demo wrote",)),
    ],
)
def test_refusals(recycle: Recycle, place: Path, line: str, said: tuple[str, ...]) -> None:
    before = set(place.rglob("*"))
    done = recycle(*line.split(), succeeds=False)
    assert_refused(done, 1 if "1e30" in line else 2, *said)
    after = {path for path in place.rglob("*") if "home" not in path.relative_to(place).parts}
    assert after == before, "something was left behind"
    assert (place / "there/precious.txt").read_text() == "keep me"


def test_nothing_usable_is_a_failure_with_the_reasons_in_the_index(
    recycle: Recycle, place: Path
) -> None:
    done = recycle("crawl", "bad", "--base-model", "model", succeeds=False)
    assert done.exit_code == 1
    assert "error: none of the 1 adapters under bad can be used" in done.stderr
    refused = recycle("select", "--method", "random", "--base-model", "model", succeeds=False)
    assert_refused(refused, 1, "holds no adapter", "recycle crawl")
    (row,) = recycle("index", "list", "--status", "rejected", "--json").documents
    assert "DoRA" in row["detail"]


@pytest.mark.parametrize("command", ["select -", "merge - --out new", "tune - --out new", "eval -"])
@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        ("", "standard input is empty"),
        ("\n \n", "standard input is empty"),
        ("{]\n", "line 1 is not JSON"),
        ('{"schema": "recycle.merge/2"}\n', "recycle.merge/2"),
        ('{"schema": "recycle.cake/1"}\n', "recycle.cake/1"),
        ('{"id": 1}\n', "line 1 has no schema"),
        ('{"schema": "recycle.merge/1"}\n', "bad field"),
    ],
)
def test_bad_standard_input(recycle: Recycle, command: str, stdin: str, said: str) -> None:
    assert_refused(recycle(*command.split(), stdin=stdin, succeeds=False), 2, said)


def test_force_replaces_an_adapter_and_nothing_else(recycle: Recycle, place: Path) -> None:
    words = ("merge", "plain", "--base-model", "model", "--out")
    recycle(*words, "new", "--rank", "1")
    document = recycle(*words, "new", "--rank", "2", "--force", "--json").document
    assert document["rank"] == 2
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []
