import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from recycle_cli.errors import RecycleError
from recycle_cli.lora.config import AdapterConfig, parse_config
from recycle_cli.lora.folder import read_adapter, read_config, weights_sha256
from recycle_cli.store.cache import CacheEntry, clean_config, damage, is_whole, keep, remove
from recycle_cli.store.evidence import FolderEvidence
from recycle_cli.store.folder import FoundFolder, find_adapters
from recycle_cli.store.unfinished import sweep


def entry_for(folder: Path, **changes: Any) -> CacheEntry:
    evidence = FolderEvidence(FoundFolder(folder.name, folder, folder.parent))
    ranks = {module: a.shape[0] for module, (a, _) in evidence.pairs.items()}
    fields: dict[str, Any] = {
        "sha256": evidence.sha256,
        "weights": evidence.weights_path,
        "config": clean_config(evidence.config, ranks, "org/base"),
        "source_config": evidence.config_text,
        "source_card": evidence.card_text,
    }
    return CacheEntry(**fields | changes)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).double()


def write_peft_adapter(folder: Path) -> None:
    """rsLoRA with patterns that overlap: the order of the keys matters to PEFT."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 6, "q_proj": 2},
        alpha_pattern={"layers.0.self_attn.v_proj": 32, "v_proj": 5, "layers.1.mlp.down_proj": 3},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny_llama(), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).float()
    model.save_pretrained(folder)


def merged_weights(folder: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(tiny_llama(), str(folder)).double()
    return dict(model.merge_and_unload(safe_merge=True).state_dict())


def test_peft_loads_the_clean_folder_to_the_same_update(tmp_path: Path) -> None:
    original = tmp_path / "original"
    write_peft_adapter(original)

    kept = keep(tmp_path / "cache", entry_for(original))

    ours, theirs = merged_weights(kept), merged_weights(original)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    base = tiny_llama().state_dict()
    adapter = read_adapter(original)
    assert len(adapter.update) == 6
    for module, update in adapter.update.items():
        delta = ours[f"{module}.weight"] - base[f"{module}.weight"]
        assert torch.allclose(delta, update.to(torch.float64).dense(), rtol=1e-9, atol=1e-9)
        assert float(delta.norm()) > 1.0
    assert read_adapter(kept).update.keys() == adapter.update.keys()
    for module, update in read_adapter(kept).update.items():
        assert update.scale == adapter.update[module].scale


def test_a_path_that_ends_in_another_path_keeps_its_own_rank() -> None:
    config = parse_config({"peft_type": "LORA", "r": 8, "alpha_pattern": {"b": 3.5}})
    ranks = {"b": 2, "a.b": 8, "c.b": 8, "a.c": 8}
    clean = parse_config(clean_config(config, ranks, "org/base"))
    assert {module: clean.rank_of(module) for module in ranks} == ranks
    assert {module: clean.alpha_of(module) for module in ranks} == {
        "b": 3.5,
        "a.b": 3.5,
        "c.b": 3.5,
        "a.c": 8.0,
    }


def test_a_clean_config_holds_plain_data_only() -> None:
    config = clean_config(AdapterConfig(rank=4, alpha=8.0), {"a.q": 4, "b.q": 4}, "org/base")
    assert json.loads(json.dumps(config)) == config
    assert config["target_modules"] == ["a.q", "b.q"]
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert config["lora_alpha"] == 8
    assert isinstance(config["lora_alpha"], int)


def test_what_is_kept(tmp_path: Path, write_adapter: Any) -> None:
    original = write_adapter(tmp_path / "one", {"unknown_field": "x"})
    kept = keep(tmp_path / "cache", entry_for(original))
    assert kept.name == weights_sha256(original) == weights_sha256(kept)
    assert "unknown_field" not in read_config(kept)
    source = kept / "source"
    assert json.loads((source / "adapter_config.original.json").read_text()) == read_config(
        original
    )
    assert (source / "README.md").read_text() == (original / "README.md").read_text()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [kept.name]
    assert [found.id for found in find_adapters(tmp_path / "cache")] == [kept.name]
    assert damage(kept) is None


def test_the_same_weights_under_another_alpha(tmp_path: Path, write_adapter: Any) -> None:
    """Each has a folder of its own, and neither loses it to the other."""
    first = keep(tmp_path / "cache", entry_for(write_adapter(tmp_path / "one")))
    before = read_config(first)
    louder = entry_for(write_adapter(tmp_path / "one", {"lora_alpha": 64}))
    for _ in range(2):
        kept = keep(tmp_path / "cache", louder)
        assert kept != first
        assert kept.name.startswith(first.name)
        assert read_config(kept)["lora_alpha"] == 64
        assert read_config(first) == before
        assert damage(kept) is damage(first) is None
    assert remove(tmp_path / "cache", kept.name)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.name]


def test_weights_that_change_underway_are_not_kept(tmp_path: Path, write_adapter: Any) -> None:
    entry = entry_for(write_adapter(tmp_path / "one"), sha256="0" * 64)
    with pytest.raises(RecycleError, match="changed while"):
        keep(tmp_path / "cache", entry)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_folder_is_replaced(tmp_path: Path, write_adapter: Any) -> None:
    entry = entry_for(write_adapter(tmp_path / "one"))
    kept = keep(tmp_path / "cache", entry)
    (kept / "adapter_model.safetensors").write_bytes(b"short")
    assert "sha256" in (damage(kept) or "")
    assert keep(tmp_path / "cache", entry) == kept
    assert damage(kept) is None
    (kept / "adapter_config.json").write_text("not json")
    assert damage(kept) is not None
    keep(tmp_path / "cache", entry)
    assert damage(kept) is None


def test_damage_names_what_is_wrong(tmp_path: Path, write_adapter: Any) -> None:
    kept = keep(tmp_path / "cache", entry_for(write_adapter(tmp_path / "one")))
    clean = read_config(kept)
    (kept / "adapter_config.json").write_text(json.dumps(clean | {"r": 3}))
    assert "rank" in (damage(kept) or "")
    (kept / "adapter_config.json").write_text(json.dumps(clean))
    (kept / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin" in (damage(kept) or "")
    (kept / "adapter_model.safetensors").unlink()
    assert damage(kept) is not None
    assert not is_whole(kept, 0)


def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, write_adapter: Any
) -> None:
    cache = tmp_path / "cache"
    original = write_adapter(tmp_path / "one")
    context = multiprocessing.get_context("fork")
    writer = context.Process(target=_die_while_writing, args=(cache, original))
    writer.start()
    writer.join(20)
    assert writer.exitcode == 9
    (left,) = cache.iterdir()
    assert left.name.startswith(".unfinished-")
    assert (left / "adapter_config.json").is_file()

    kept = keep(cache, entry_for(original))

    assert damage(kept) is None
    assert sweep(cache) == 1
    assert list(cache.iterdir()) == [kept]


def _die_while_writing(cache: Path, original: Path) -> None:
    os.rename = os.replace = lambda *_: os._exit(9)  # type: ignore[assignment]
    Path.rename = lambda *_: os._exit(9)  # type: ignore[assignment,method-assign]
    keep(cache, entry_for(original))


def test_many_writers_at_once_leave_one_whole_folder(tmp_path: Path, write_adapter: Any) -> None:
    cache, original = tmp_path / "cache", write_adapter(tmp_path / "one")
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    writers = [
        context.Process(target=_write_repeatedly, args=(cache, entry_for(original), barrier))
        for _ in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert [writer.exitcode for writer in writers] == [0] * 4
    (kept,) = cache.iterdir()
    assert damage(kept) is None
    assert sorted(path.name for path in kept.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "source",
    ]


def _write_repeatedly(cache: Path, entry: CacheEntry, barrier: Any) -> None:
    for _ in range(3):
        barrier.wait(20)
        keep(cache, entry)
        barrier.wait(20)
        remove(cache, entry.sha256)
    barrier.wait(20)
    keep(cache, entry)


def test_remove(tmp_path: Path, write_adapter: Any) -> None:
    cache = tmp_path / "cache"
    kept = keep(cache, entry_for(write_adapter(tmp_path / "one")))
    assert remove(cache, kept.name) is True
    assert list(cache.iterdir()) == []
    assert remove(cache, kept.name) is False
    with pytest.raises(ValueError, match="no sha256"):
        remove(cache, "..")
