"""A result that routes token by token: scored, and refused where a LoRA is wanted."""

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.command import RECYCLE, Done, Recycle, assert_refused

FEW = ("--steps", "4", "--eval-every", "2", "--batch-size", "4", "--lr", "0.1")


@pytest.fixture
def line(task: Path, pico_folder: Path) -> tuple[object, ...]:
    return (
        "lab/plain", "lab/rslora", "shop/mlp", "--task", task, "--base-model", pico_folder,
        "--method", "arrow",
    )  # fmt: skip


def test_it_is_made_and_scored(crawled: Recycle, line: tuple[object, ...], tmp_path: Path) -> None:
    made = crawled("tune", *line, *FEW, "--out", "routed", "--json")
    document = made.document
    assert document["max_logit_deviation"] < 1e-5
    assert document["best"]["step"] > 0
    assert document["settings"]["top_k"] == 4
    assert document["rank"] == 4 + 8  # of plain and rslora, in q
    written = {path.name for path in (tmp_path / "routed").iterdir()}
    assert written == set(document["files"])
    assert "adapter_config.json" not in written
    base, scored = crawled("eval", "-", "--rows", "35", "--json", stdin=made.stdout).documents
    assert base["adapter"] == "base"
    assert scored["adapter"]["sha256"] == document["sha256"]
    by_name = ("--task", line[4], "--base-model", line[6], "--rows", "35", "--json")
    again = crawled("eval", "routed", *by_name).documents[1]
    assert again["metrics"] == scored["metrics"]


def test_the_configuration_names_the_adapters(
    crawled: Recycle, line: tuple[object, ...], tmp_path: Path
) -> None:
    document = crawled("tune", *line, "--out", "routed", "--json").document
    config = json.loads((tmp_path / "routed/routed_config.json").read_text())
    of_document = [(a["id"], a["sha256"]) for a in document["adapters"]]
    assert [(a["id"], a["sha256"]) for a in config["adapters"]] == of_document
    assert [name for name, _ in of_document] == list(line[:3])
    tensors = load_file(tmp_path / "routed/routed_adapter.safetensors")
    present = {key: value.tolist() for key, value in tensors.items() if key.endswith(".present")}
    assert present["model.layers.0.self_attn.q_proj.present"] == [0, 1]
    assert present["model.layers.0.self_attn.k_proj.present"] == [1]
    assert present["model.layers.1.mlp.down_proj.present"] == [2]


def test_it_says_plainly_what_it_is(
    crawled: Recycle, line: tuple[object, ...], tmp_path: Path
) -> None:
    said = crawled("tune", *line, "--out", "routed")
    card = (tmp_path / "routed/README.md").read_text()
    for text in (said.stderr, card):
        assert "token by token" in text
        assert "cannot be folded into a LoRA" in text
        assert "only recycle eval does" in text
    for text in (said.stdout, card):
        assert "mean share of tokens" in text
    assert "library_name: peft" not in card
    assert "without training" in card
    trained = crawled("tune", *line, *FEW, "--out", "trained")
    assert "mean share of tokens" in trained.stdout
    assert "tuned on 32 rows" in (tmp_path / "trained/README.md").read_text()


def test_without_steps_it_needs_no_training(crawled: Recycle, line: tuple[object, ...]) -> None:
    document = crawled("tune", *line, "--top-k", "1", "--out", "routed", "--json").document
    assert document["best"]["step"] == 0
    assert len(document["history"]) == 1
    shares = {adapter["id"]: adapter["coefficient_mean"] for adapter in document["adapters"]}
    assert shares["shop/mlp"] == 1  # alone in its modules
    # Both share q and v; rslora is alone in k and o, in two layers each.
    assert 0 < shares["lab/plain"] < 1
    assert 4 * shares["lab/plain"] + 8 * shares["lab/rslora"] == pytest.approx(8, abs=1e-4)


def test_narrow_factors_are_asked_for(
    crawled: Recycle, line: tuple[object, ...], tmp_path: Path
) -> None:
    # A soft router: what rounding does to a hard one's choices is not what is tested.
    words = ("--save-dtype", "bfloat16", "--temperature", "20", "--out", "routed", "--json")
    document = crawled("tune", *line, *words).document
    tensors = load_file(tmp_path / "routed/routed_adapter.safetensors")
    kinds = {key.rpartition(".")[2]: str(tensor.dtype) for key, tensor in tensors.items()}
    assert kinds["lora_A"] == kinds["lora_B"] == "torch.bfloat16"
    assert kinds["prototypes"] == "torch.float32"
    assert 1e-3 < document["max_logit_deviation"] < 0.3


def test_a_narrow_model_computes_what_it_was_made_with(
    crawled: Recycle, line: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECYCLE_DTYPE", "bfloat16")
    document = crawled("tune", *line, "--out", "routed", "--json").document
    assert document["settings"]["base_dtype"] == "bfloat16"
    assert document["max_logit_deviation"] == 0


def test_it_starts_from_an_earlier_one(crawled: Recycle, line: tuple[object, ...]) -> None:
    first = crawled("tune", *line, *FEW, "--out", "first", "--json").document
    second = crawled("tune", *line, "--init-from", "first", "--out", "second", "--json").document
    assert second["sha256"] == first["sha256"]


def test_force_replaces_it(crawled: Recycle, line: tuple[object, ...]) -> None:
    crawled("tune", *line, "--out", "routed")
    crawled("tune", *line, "--top-k", "2", "--out", "routed", "--force")


def test_it_is_no_lora(crawled: Recycle, line: tuple[object, ...], task: Path) -> None:
    made = crawled("tune", *line, "--out", "routed", "--json").stdout
    base = ("--base-model", line[6])
    for words, piped in (
        (("merge", "routed", "lab/plain", *base, "--out", "new"), None),
        (("merge", "-", "--out", "new"), made),
        (("tune", "routed", "--task", task, *base, "--out", "new"), None),
        (("tune", "lab/plain", "--target", "routed", "--task", task, *base, "--out", "new"), None),
        (("select", "routed", "lab/plain", "--task", task, *base), None),
        (("select", "routed", "--method", "random", *base), None),
    ):
        refused = crawled(*words, stdin=piped, succeeds=False)
        assert_refused(refused, 2, "'routed' routes token by token", "recycle eval")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rank 4", "--rank has no effect with --method arrow"),
        ("--lr 0.1", "--lr has no effect without steps"),
        ("--steps 0 --lr-schedule linear", "--lr-schedule has no effect without steps"),
        ("--batch-size 4", "--batch-size has no effect without steps"),
        ("--micro-batch 4", "--micro-batch has no effect without steps"),
        ("--gradient-checkpointing", "--gradient-checkpointing has no effect without steps"),
        ("--l1 0.1", "--l1 has no effect with --method arrow"),
        ("--top-k -1", "--top-k is -1"),
        ("--temperature 0", "--temperature is 0"),
    ],
)
def test_options_without_effect_are_refused(
    crawled: Recycle, line: tuple[object, ...], words: str, said: str
) -> None:
    refused = crawled("tune", *line, *words.split(), "--out", "new", succeeds=False)
    assert_refused(refused, 2, said)


def test_shares_of_tokens_are_no_weights_of_a_merge(
    crawled: Recycle, line: tuple[object, ...], tmp_path: Path
) -> None:
    made = crawled("tune", *line, "--out", "routed", "--json")
    merge = ("merge", "-", "--weights", "from:coefficient", "--method", "linear", "--out", "flat")
    refused = crawled(*merge, stdin=made.stdout, succeeds=False)
    assert_refused(refused, 2, "--method arrow has no coefficients", "mean share of tokens")
    assert not (tmp_path / "flat").exists()


def test_damage_is_said(crawled: Recycle, line: tuple[object, ...], tmp_path: Path) -> None:
    crawled("tune", *line, "--out", "routed")
    scored = ("eval", "routed", "--task", line[4], "--base-model", line[6])
    config = tmp_path / "routed/routed_config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"temperature": 1.0', '"temperature": 0'))
    assert_refused(crawled(*scored, succeeds=False), 2, "temperature is 0")
    config.write_text(json.dumps({**json.loads(whole), "base_model": "other/base"}))
    assert_refused(crawled(*scored, succeeds=False), 2, "'routed' belongs to other/base")
    (tmp_path / "routed/routed_adapter.safetensors").unlink()
    refused = crawled(*scored, succeeds=False)
    assert_refused(refused, 2, "no readable routed_adapter.safetensors")


@pytest.mark.parametrize("limit", [100, 8_000], ids=["in the state", "in the weights"])
def test_a_full_disk_is_said(
    pool: Path, pico_folder: Path, task: Path, tmp_path: Path, limit: int
) -> None:
    adapters = [str(pool / name) for name in ("lab/plain", "lab/rslora")]
    words = ["--task", str(task), "--base-model", str(pico_folder), "--method", "arrow"]
    done = subprocess.run(
        [*RECYCLE, "tune", *adapters, *words, "--out", "routed"],
        cwd=tmp_path,
        env={**os.environ, "RECYCLE_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
        # Python ignores SIGXFSZ, so that writing on fails with EFBIG.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}
    refused = Done(done.returncode, done.stdout, done.stderr)
    assert_refused(refused, 1, "routed cannot be written: ", "free some space")
