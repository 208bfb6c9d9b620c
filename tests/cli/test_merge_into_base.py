"""`recycle merge --into-base`: a model's weights with the merge in them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import pico
from support.command import Recycle, assert_refused
from support.folders import (
    dense_sum,
    logits_of,
    read_json,
    weights_of,
    write_checkpoint,
)
from support.low_rank import random_piece
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from recycle_cli.engine.comparison import SENTENCES
from recycle_cli.lora.folder import write_adapter

# PEFT asks transformers for a property that goes away.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

INDEX = "model.safetensors.index.json"
Q0 = "model.layers.0.self_attn.q_proj"
FORMS: dict[str, dict[str, Any]] = {
    "single": {},
    "sharded": {"shard": "40KB"},
    "tied": {"tied": True},
    "tied-sharded": {"tied": True, "shard": "40KB"},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16-sharded": {"dtype": torch.bfloat16, "shard": "40KB"},
    "float16": {"dtype": torch.float16},
}
NAMES = ("lab/plain", "lab/rslora", "shop/mlp")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pico model in several forms."""
    place = tmp_path_factory.mktemp("bases")
    return {name: write_checkpoint(place / name, **form) for name, form in FORMS.items()}


@pytest.fixture
def mean(pool: Path) -> dict[str, Tensor]:
    """The mean of the adapters, multiplied out."""
    return dense_sum({pool / name: 1 / len(NAMES) for name in NAMES})


def merge_into(recycle: Recycle, pool: Path, base: Path, *words: object, out: str = "model") -> Any:
    names = [pool / name for name in NAMES]
    line = ("merge", *names, "--into-base", base, *words, "--out", out, "--json")
    return recycle(*line).document


def logits(folder: Path, adapter: Path | None = None) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    return logits_of(model.eval(), AutoTokenizer.from_pretrained(folder), SENTENCES)


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_is_the_exact_sum_rounded_once(
    recycle: Recycle, pool: Path, bases: dict[str, Path], tmp_path: Path, form: str, mean: Any
) -> None:
    document = merge_into(recycle, pool, bases[form])
    before, after = weights_of(bases[form]), weights_of(tmp_path / "model")
    assert after.keys() == before.keys()
    for name, weight in before.items():
        delta = mean.get(name.removesuffix(".weight"))
        expected = weight if delta is None else (weight.double() + delta).to(weight.dtype)
        assert after[name].dtype == weight.dtype
        assert torch.equal(after[name], expected), name
    assert len(mean) == 14
    assert (document["form"], document["base_model"]) == ("model", str(bases[form].resolve()))


@pytest.mark.parametrize("form", ["single", "sharded", "tied", "tied-sharded"])
def test_the_model_says_what_the_base_says_with_the_adapter_on_it(
    recycle: Recycle, pool: Path, bases: dict[str, Path], tmp_path: Path, form: str
) -> None:
    merge_into(recycle, pool, bases[form])
    names = [pool / name for name in NAMES]
    recycle("merge", *names, "--base-model", bases[form], "--out", "adapter")
    found, expected = logits(tmp_path / "model"), logits(bases[form], tmp_path / "adapter")
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(found, logits(bases[form]), rtol=0, atol=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_shards_metadata_and_the_index_stay_as_they_were(
    recycle: Recycle, pool: Path, bases: dict[str, Path], tmp_path: Path, form: str
) -> None:
    merge_into(recycle, pool, bases[form])
    shards = sorted(path.name for path in bases[form].glob("*.safetensors"))
    assert sorted(path.name for path in (tmp_path / "model").glob("*.safetensors")) == shards
    assert (len(shards) > 1) == form.endswith("sharded")
    for shard in shards:
        one, other = bases[form] / shard, tmp_path / "model" / shard
        with safe_open(one, "pt") as before, safe_open(other, "pt") as after:
            assert set(after.keys()) == set(before.keys())
            assert after.metadata() == before.metadata() == {"format": "pt"}
    assert (tmp_path / "model" / INDEX).exists() == form.endswith("sharded")


@pytest.mark.parametrize("form", ["tied", "tied-sharded"])
def test_tied_weights_stay_tied(
    recycle: Recycle, pool: Path, bases: dict[str, Path], tmp_path: Path, form: str
) -> None:
    merge_into(recycle, pool, bases[form])
    assert "lm_head.weight" not in weights_of(tmp_path / "model")
    assert read_json(tmp_path / "model/config.json")["tie_word_embeddings"] is True
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_what_belongs_to_the_model_is_copied_and_no_other_weights(
    recycle: Recycle, pool: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    base, model = bases["sharded"], tmp_path / "model"
    document = merge_into(recycle, pool, base)
    copied = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        INDEX,
    }
    for name in copied:
        assert (model / name).read_bytes() == (base / name).read_bytes(), name
    there = {path.name for path in model.iterdir()}
    shards = {path.name for path in base.glob("*.safetensors")}
    assert there == copied | shards | {"README.md", "recycle.json"}
    assert document["files"] == sorted(there)
    assert AutoTokenizer.from_pretrained(model).chat_template == pico.CHAT_TEMPLATE
    card = (model / "README.md").read_text()
    assert "base_model_relation: merge" in card
    assert "library_name: transformers" in card
    assert "own card" not in card


@pytest.mark.parametrize("compute", ["float32", "auto"])
@pytest.mark.parametrize("form", ["single", "bfloat16", "tied"])
def test_check_reports_the_difference_that_the_logits_show(
    recycle: Recycle,
    pool: Path,
    bases: dict[str, Path],
    tmp_path: Path,
    mean: Any,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    compute: str,
) -> None:
    monkeypatch.setenv("RECYCLE_DTYPE", compute)
    document = merge_into(recycle, pool, bases[form], "--check")
    model: Any = AutoModelForCausalLM.from_pretrained(bases[form], dtype=torch.float32)
    for module, delta in mean.items():
        model.get_submodule(module).weight.data += delta.float()
    apart = logits_of(model.eval(), AutoTokenizer.from_pretrained(bases[form]), SENTENCES)
    expected = float((apart - logits(tmp_path / "model")).abs().max())
    deviation = document["max_logit_deviation"]
    assert deviation == pytest.approx(expected, rel=0.01, abs=1e-4)
    assert (deviation > 1e-3) == (form == "bfloat16")
    assert f"{deviation:.3g}" in (tmp_path / "model/README.md").read_text()
    assert merge_into(recycle, pool, bases[form], out="again")["max_logit_deviation"] is None


@pytest.mark.parametrize("words", ["--method ties", "--method iso", "--rank 3", "--rank energy:.9"])
def test_the_model_holds_what_the_adapter_would(
    recycle: Recycle, pool: Path, bases: dict[str, Path], tmp_path: Path, words: str
) -> None:
    base = bases["single"]
    model = merge_into(recycle, pool, base, *words.split())
    names = [pool / name for name in NAMES]
    line = ("merge", *names, "--base-model", base, *words.split(), "--out", "adapter", "--json")
    adapter = recycle(*line).document
    before, after = weights_of(base), weights_of(tmp_path / "model")
    for module, delta in dense_sum({tmp_path / "adapter": 1.0}).items():
        added = after[f"{module}.weight"].double() - before[f"{module}.weight"].double()
        assert torch.allclose(added, delta, rtol=0, atol=1e-5), module
    found, expected = logits(tmp_path / "model"), logits(base, tmp_path / "adapter")
    assert torch.allclose(found, expected, rtol=0, atol=1e-3)
    assert model["energy_kept"] == pytest.approx(adapter["energy_kept"])
    assert model["energy_by_module"] == pytest.approx(adapter["energy_by_module"])


def test_a_merged_model_is_a_base_model_and_nothing_else(
    recycle: Recycle, pool: Path, bases: dict[str, Path], task: Path
) -> None:
    names = [pool / name for name in NAMES]
    merged = recycle("merge", *names, "--into-base", bases["single"], "--out", "model", "--json")
    hint = f"--base-model {merged.document['path']}"
    for command in ("merge - --out more", "select - --method random"):
        refused = recycle(*command.split(), stdin=merged.stdout, succeeds=False)
        assert_refused(refused, 2, "is a merged model, no adapter", hint)
    recycle("merge", *names, "--base-model", bases["single"], "--out", "adapter")
    words = ("eval", "--task", task, "--json", "--base-model")
    *_, beside = recycle(*words, bases["single"], "adapter").documents
    (model,) = recycle(*words, "model").documents
    assert model["adapter"] == "base"
    assert model["metrics"] == beside["metrics"]
    more = recycle("merge", pool / "shop/patterned", "--into-base", "model", "--out", "more")
    assert "1 adapter by average" in more.stdout


def test_a_model_replaces_an_earlier_one_only_with_force(
    recycle: Recycle, pool: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    first = merge_into(recycle, pool, bases["sharded"])
    words = ("merge", pool / "lab/plain", "--into-base", bases["single"], "--out", "model")
    assert_refused(recycle(*words, succeeds=False), 2, "model exists", "--force")
    second = recycle(*words, "--force", "--json").document
    assert second["sha256"] != first["sha256"]
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 1
    assert not (tmp_path / "model" / INDEX).exists()
    itself = ("merge", pool / "shop/mlp", "--into-base", "model", "--out", "./model/", "--force")
    assert_refused(recycle(*itself, succeeds=False), 2, "is what the result is made of")
    (tmp_path / "model/notes").mkdir()
    (tmp_path / "model/notes/mine.txt").write_text("keep me")
    assert_refused(recycle(*words, "--force", succeeds=False), 2, "leaves it alone")
    assert (tmp_path / "model/notes/mine.txt").read_text() == "keep me"


def test_the_same_merge_gives_the_same_files(
    recycle: Recycle, pool: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    words = ("--method", "dare-ties", "--seed", "5")
    one = merge_into(recycle, pool, bases["sharded"], *words, out="one")
    two = merge_into(recycle, pool, bases["sharded"], *words, out="two")
    assert one["sha256"] == two["sha256"]
    for path in (tmp_path / "one").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    other = merge_into(recycle, pool, bases["sharded"], "--method", "dare-ties", out="other")
    assert other["sha256"] != one["sha256"]


def edit_json(name: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def bend(folder: Path) -> None:
        fields = read_json(folder / name)
        edit(fields)
        (folder / name).write_text(json.dumps(fields))

    return bend


def place(shard: Any) -> Callable[[Path], None]:
    """Lets the index name another file for one tensor."""
    return edit_json(INDEX, lambda index: index["weight_map"].update({f"{Q0}.weight": shard}))


def edit_weights(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def bend(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return bend


def other_shard(folder: Path) -> None:
    shards = read_json(folder / INDEX)["weight_map"]
    place(next(shard for shard in shards.values() if shard != shards[f"{Q0}.weight"]))(folder)


def last_shard(folder: Path) -> Path:
    return max(folder.glob("*.safetensors"))


BENT: dict[str, tuple[str, Callable[[Path], Any], tuple[str, ...]]] = {
    "no safetensors": (
        "single",
        lambda f: (f / "model.safetensors").unlink(),
        ("has no model.safetensors", "safetensors"),
    ),
    "no configuration": ("single", lambda f: (f / "config.json").unlink(), ("has no config.json",)),
    "configuration no JSON": (
        "single",
        lambda f: (f / "config.json").write_text("{"),
        ("config.json is not JSON",),
    ),
    "quantised": (
        "single",
        edit_json("config.json", lambda c: c.update(quantization_config={"bits": 4})),
        ("is quantised", "not quantised"),
    ),
    "quantised without a word": (
        "single",
        edit_weights(lambda t: t.update({f"{Q0}.weight": t[f"{Q0}.weight"].to(torch.int8)})),
        (f"{Q0} is of dtype I8", "not quantised"),
    ),
    "fewer layers": (
        "single",
        edit_json("config.json", lambda c: c.update(num_hidden_layers=1)),
        ("model.layers.1.mlp.down_proj is (32, 64) in the adapters and not there in",),
    ),
    "another shape": (
        "single",
        edit_json("config.json", lambda c: c.update(intermediate_size=48)),
        ("down_proj is (32, 64) in the adapters and (32, 48) in",),
    ),
    "weights not of the configuration": (
        "single",
        edit_weights(lambda t: t.update({f"{Q0}.weight": torch.zeros(16, 32)})),
        (f"{Q0} is (16, 32) in", "(32, 32) in the adapters"),
    ),
    "a module without weights": (
        "single",
        edit_weights(lambda t: t.pop(f"{Q0}.weight")),
        (f"{Q0} is not in",),
    ),
    "single file garbage": (
        "single",
        lambda f: (f / "model.safetensors").write_bytes(b"garbage"),
        ("model.safetensors cannot be read", "fetch it again"),
    ),
    "index leads outside": (
        "sharded",
        place("../single/model.safetensors"),
        ("has no ../single/model.safetensors",),
    ),
    "index leads to an absolute path": ("sharded", place("/etc/hostname"), ("/etc/hostname",)),
    "index names a folder": ("sharded", place(".."), ("has no ..",)),
    "index names no file": ("sharded", place("gone.safetensors"), ("has no gone.safetensors",)),
    "index no JSON": (
        "sharded",
        lambda f: (f / INDEX).write_text("[" * 9),
        (f"{INDEX} is not JSON",),
    ),
    "index empty": (
        "sharded",
        lambda f: (f / INDEX).write_text("{}"),
        ("has no weight_map of file names",),
    ),
    "shard garbage": (
        "sharded",
        lambda f: last_shard(f).write_bytes(b"garbage"),
        ("cannot be read", "fetch it again"),
    ),
    "shard cut short": (
        "sharded",
        lambda f: last_shard(f).write_bytes(last_shard(f).read_bytes()[:-9]),
        ("cannot be read", "fetch it again"),
    ),
    "index names another shard": ("sharded", other_shard, (f"says that {Q0}.weight is in",)),
    "index names a number": ("sharded", place(3), ("has no weight_map of file names",)),
    "index holds a list": (
        "sharded",
        lambda f: (f / INDEX).write_text('{"weight_map": []}'),
        ("has no weight_map of file names",),
    ),
}
CASES = [pytest.param(*case, id=name) for name, case in BENT.items()]


@pytest.mark.parametrize(("form", "bend", "said"), CASES)
def test_a_model_that_cannot_take_the_merge_is_refused(
    recycle: Recycle,
    pool: Path,
    bases: dict[str, Path],
    tmp_path: Path,
    form: str,
    bend: Callable[[Path], Any],
    said: tuple[str, ...],
) -> None:
    base = shutil.copytree(bases[form], tmp_path / "base")
    bend(base)
    names = [pool / name for name in NAMES]
    done = recycle("merge", *names, "--into-base", "base", "--out", "model", succeeds=False)
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"base", "home"}, "something was left behind"
    assert_refused(done, 2, *said)


def test_an_update_of_a_tied_head_is_refused(
    recycle: Recycle, bases: dict[str, Path], tmp_path: Path
) -> None:
    vocabulary = read_json(bases["tied"] / "config.json")["vocab_size"]
    (tmp_path / "head").mkdir()
    head = {"lm_head": random_piece(0, 2, (vocabulary, pico.HIDDEN))}
    write_adapter(tmp_path / "head", head, str(bases["tied"]))
    words = ("merge", "head", "--out", "model", "--into-base")
    refused = recycle(*words, bases["tied"], succeeds=False)
    assert_refused(refused, 2, "lm_head", "tied to the embeddings", "without --into-base")
    assert not (tmp_path / "model").exists()
    recycle(*words, bases["single"])
    assert "lm_head.weight" in weights_of(tmp_path / "model")


@pytest.mark.parametrize("base", ["nowhere", "/nowhere/at/all", "org/nowhere"])
def test_a_model_that_is_not_there_is_refused(
    recycle: Recycle, pool: Path, tmp_path: Path, base: str
) -> None:
    words = ("merge", pool / "lab/plain", "--into-base", base, "--out", "model")
    assert_refused(recycle("--offline", *words, succeeds=False), 2, f"'{base}' cannot be loaded")
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}


def test_a_refusal_leaves_no_parent_folders_behind(
    recycle: Recycle, pool: Path, tmp_path: Path
) -> None:
    words = ("merge", pool / "lab/plain", "--into-base", "nowhere", "--out", "a/b/model")
    assert_refused(recycle("--offline", *words, succeeds=False), 2, "cannot be loaded")
    assert not (tmp_path / "a").exists()


def test_a_sum_too_large_for_the_dtype_of_the_weights_is_refused(
    recycle: Recycle, pool: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    words = ("--method", "linear", "--weights=1e6", "--out", "model")
    line = ("merge", pool / "lab/plain", "--into-base", bases["float16"], *words)
    done = recycle(*line, succeeds=False)
    assert not (tmp_path / "model").exists()
    assert_refused(done, 2, "q_proj", "float16")


def test_beside_a_single_file_an_index_does_not_count(
    recycle: Recycle, pool: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    both = shutil.copytree(bases["sharded"], tmp_path / "both")
    single = {name: 2 * weight for name, weight in weights_of(bases["single"]).items()}
    save_file(single, both / "model.safetensors", metadata={"format": "pt"})
    recycle("merge", pool / "lab/plain", "--base-model", both, "--out", "adapter")
    recycle("merge", pool / "lab/plain", "--into-base", both, "--out", "model")
    found, expected = logits(tmp_path / "model"), logits(both, tmp_path / "adapter")
    assert torch.allclose(found, expected, rtol=0, atol=1e-3)
