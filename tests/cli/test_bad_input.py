"""What goes wrong ends in `error:` and `hint:`, the right exit code, and nothing on disk."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.adapters import write_peft_adapter
from support.command import Recycle, assert_refused
from support.low_rank import random_piece
from support.tasks import closed_rows, write_rows, write_task
from torch import Tensor

from recycle_cli.lora.folder import write_adapter


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
    spoil(shutil.copytree(pool / "shop/mlp", tmp_path / "bent/nan"), math.nan)
    spoil(shutil.copytree(pool / "shop/mlp", tmp_path / "bent/infinite"), -math.inf)
    shutil.copytree(pool / "lab/plain", tmp_path / "bent/unpaired")
    bend_weights(tmp_path / "bent/unpaired", lambda tensors: tensors.popitem())
    (tmp_path / "bent/narrow").mkdir()
    narrow = {"model.layers.0.self_attn.q_proj": random_piece(0, 4, (8, 8))}
    write_adapter(tmp_path / "bent/narrow", narrow, str(pico_folder))
    return tmp_path


def bend_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def spoil(folder: Path, value: float) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[f"base_model.model.{SPOILT}.lora_B.weight"][3, 1] = value

    bend_weights(folder, edit)


SPOILT = "model.layers.1.mlp.up_proj"
SELECT = "select plain --base-model model"
MERGE = "merge plain --base-model model --out new"
MERGE_TWO = "merge plain twin/copy --base-model model --out new"
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
        (
            "merge plain --base-model model --out plain --force",
            ("plain is what the result is made of",),
        ),
        ("merge plain --base-model model --out copy --force", ("leaves it alone",)),
        ("merge plain --base-model model --out dangling", ("dangling exists",)),
        ("merge plain --base-model model --out file --force", ("file is no folder",)),
        (f"{MERGE} --weights=nan", ("'nan'",)),
        (f"{MERGE} --method tie", ("'tie'", "did you mean ties", "karcher")),
        ("merge plain --base-model model", ("no folder to write is named", "--out")),
        ("merge plain plain --base-model model --out new", ("same file", "each adapter once")),
        (f"{MERGE} ./plain/", ("same file",)),
        ("merge copy stranger --base-model model --out new", ("'stranger' belongs to org/other",)),
        (
            "merge plain bent/narrow --base-model model --out new",
            ("q_proj is (32, 32) in 'plain' and (8, 8) in 'narrow'", "one base model"),
        ),
        (
            "merge plain bent/nan --base-model model --out new",
            (f"'nan' cannot be used: {SPOILT} holds NaN or infinity", "leave this adapter out"),
        ),
        (
            "merge bent/infinite --base-model model --method ties --out new",
            (f"'infinite' cannot be used: {SPOILT} holds NaN or infinity",),
        ),
        (
            "merge plain bent/nan --into-base model --out new",
            (f"'nan' cannot be used: {SPOILT} holds NaN or infinity",),
        ),
        ("merge bent/unpaired --base-model model --out new", ("'unpaired' cannot be used",)),
        (f"{MERGE_TWO} --method ties --density 0", ("--density is 0", "(0, 1]")),
        (f"{MERGE_TWO} --method ties --density 1.5", ("--density is 1.5", "(0, 1]")),
        (f"{MERGE_TWO} --method ties --density nan", ("--density is nan", "(0, 1]")),
        (f"{MERGE_TWO} --method ties --density=-inf", ("--density is -inf",)),
        (f"{MERGE_TWO} --method ties --normalize sum", ("'sum'", "count, weights")),
        (f"{MERGE_TWO} --method breadcrumbs --gamma 1.1", ("--gamma is 1.1", "[0, 1]")),
        (f"{MERGE_TWO} --method della --epsilon 0.6", ("--density 0.5", "--epsilon 0.6")),
        (f"{MERGE_TWO} --method della --density 0.95", ("1.05", "(0, 1]")),
        (f"{MERGE_TWO} --method tsv --components 0", ("--components is 0", "from 1")),
        (f"{MERGE_TWO} --method core-space --inner tie", ("--inner 'tie'", "did you mean ties")),
        (
            f"{MERGE_TWO} --method core-space --inner linear --density 0.5",
            ("--density has no effect with --inner linear",),
        ),
        (f"{MERGE_TWO} --method compress-then-merge --shared-rank 0", ("--shared-rank is 0",)),
        (f"{MERGE_TWO} --method lora-lego --clusters=-1", ("--clusters is -1",)),
        (f"{MERGE_TWO} --density 0.5", ("--density has no effect with --method average", "ties")),
        (f"{MERGE_TWO} --method linear --clusters 2", ("--clusters has no effect", "lora-lego")),
        (f"{MERGE_TWO} --absent some", ("--absent is 'some'", "zero, skip")),
        (f"{MERGE_TWO} --method linear --absent skip", ("no effect with --method linear",)),
        (f"{MERGE_TWO} --as residual", ("--as is 'residual'", "adapter, adapter+residual")),
        (f"{MERGE_TWO} --as adapter+residual", ("with --method average", "use --method fedex")),
        (f"{MERGE_TWO} --method ties --as adapter+residual", ("--method ties", "fedex")),
        (
            f"{MERGE_TWO} --method fedex --as adapter+residual",
            ("different ranks (4, 8)", "--method average"),
        ),
        (f"{MERGE_TWO} --method factor-average", ("different ranks (4, 8)", "--method average")),
        (f"{MERGE_TWO} copy --method slerp", ("slerp takes at most 2 adapters, not 3", "karcher")),
        (f"{MERGE_TWO} --method slerp --weights=2,-1", ("-1", "none below 0")),
        (f"{MERGE_TWO} --weights=1,-1", ("sums to 0, which --method average", "--method linear")),
        (f"{MERGE_TWO} --method sce --weights=1,2", ("no effect with --method sce",)),
        (f"{MERGE_TWO} --check", ("--check has no effect without --into-base",)),
        (f"{MERGE_TWO} --into-base model --uniform", ("--uniform is about an adapter",)),
        (
            f"{MERGE_TWO} --into-base model --as adapter+residual --method fedex",
            ("--as is about an adapter",),
        ),
        (f"{MERGE_TWO} --into-base model --save-dtype float16", ("--save-dtype is about",)),
        (f"{MERGE_TWO} --into-base empty", ("empty has no config.json", "Hub id")),
        (f"{MERGE_TWO} --into-base plain", ("plain has no config.json", "Hub id")),
        (f"{MERGE_TWO} --save-dtype int8", ("'int8'", "bfloat16")),
        (f"{MERGE_TWO} --rank -1", ("'-1'", "energy:E")),
        (f"{MERGE_TWO} --rank energy:0", ("energy:0",)),
        (f"{MERGE_TWO} --rank 99999999999", ("'99999999999'",)),
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
        (f"{TUNE} plain --rank 4 --rslora", ("no use for --rslora",)),
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
        (f"{TUNE} --granularity layer", ("--granularity has no effect with --method lora",)),
        (f"{TUNE} plain --granularity layers", ("'layers'", "did you mean layer")),
        (f"{TUNE} plain --activation relu", ("'relu'", "leaky-relu")),
        (f"{TUNE} plain --init nought", ("'nought'", "zero")),
        (f"{TUNE} plain --lr-schedule cosin", ("'cosin'", "did you mean cosine")),
        (f"{TUNE} plain --init one-hot", ("starts at the target LoRA", "--target")),
        (f"{TUNE} plain --affine", ("--affine has no effect", "--activation")),
        (f"{TUNE} plain --activation squared --affine", ("--affine has no effect",)),
        (f"{TUNE} plain --l1 -1", ("--l1 is -1",)),
        (f"{TUNE} plain --l1 inf", ("--l1 is inf",)),
        (f"{TUNE} --target-module w_proj", ("'w_proj'", "q_proj")),
        (f"{TUNE} --save-dtype int8", ("'int8'", "bfloat16")),
        ("tune plain --task task --base-model model --lr 1e30 --out new", ("lower --lr",)),
        (EVAL, ("no task is named",)),
        (f"{EVAL} --task few.jsonl", ("no test rows",)),
        (f"{EVAL} --task leaky", ("40 test rows", "--allow-overlap")),
        (f"{EVAL} --task open --metric acc", ("needs choices",)),
        (f"{EVAL} --task task --metric f2", ("'f2'", "did you mean f1")),
        (f"{EVAL} --task task --baseline best", ("'best'", "plain")),
        (f"{EVAL} --task task --fail-under acc", ("acc",)),
        (f"{EVAL} --task task --fail-under acc=nan", ("acc=nan",)),
        (f"{EVAL} --task task --fail-under exact_match=0", ("computed here: acc",)),
        ("eval --task task --base-model model --fail-under acc=0", ("none is named",)),
        (f"{EVAL} copy twin/copy --task task --baseline copy", ("more than one",)),
        (f"{EVAL} --task task --fail-under f1=1", ("'f1'",)),
        (f"{EVAL} --task task --samples there/precious.txt", ("precious.txt exists",)),
        ("demo --task hotel --out new", ("'hotel'", "did you mean hotel_reviews")),
        ("demo --out there", ("'precious.txt', which no demo wrote",)),
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


def test_force_on_a_link_to_a_result_leaves_nothing_beside(recycle: Recycle, place: Path) -> None:
    words = ("merge", "plain", "--base-model", "model", "--out")
    recycle(*words, "new")
    (place / "link").symlink_to("new")
    recycle(*words, "link", "--rank", "1", "--force")
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []
