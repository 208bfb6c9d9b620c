"""What adapter folders and model folders on disk hold, read back apart from the code that wrote
them wherever that is possible."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recycle_cli.lora.folder import read_adapter
from support import pico
from support.low_rank import Matrix

Dense = Mapping[str, Matrix]
"""Module path -> dW, in float64."""


def dense_sum(folders: Mapping[Path, float]) -> dict[str, Tensor]:
    """sum_i w_i dW_i by module, in float64, of adapter folders."""
    total: dict[str, Tensor] = {}
    for folder, weight in folders.items():
        for module, update in read_adapter(folder).update.items():
            dense = weight * update.to(torch.float64).dense()
            total[module] = total.get(module, torch.zeros_like(dense)) + dense
    return total


def assert_same_update(folder: Path, expected: Mapping[str, Tensor], tolerance: float) -> None:
    """An adapter folder holds this update; a module that it leaves out is zero."""
    found = dense_sum({folder: 1.0})
    for module, dense in expected.items():
        written = found.get(module, torch.zeros_like(dense))
        assert torch.allclose(written, dense, rtol=tolerance, atol=tolerance), module
    assert found.keys() <= expected.keys()


def added_by_peft(base_folder: Path, folder: Path) -> Dense:
    """What PEFT's merge changes, in float64: module path -> difference, for what differs."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float64)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # PEFT warns of keys that it misses or does not know.
        warnings.simplefilter("error", UserWarning)
        merged: Any = PeftModel.from_pretrained(model, folder).merge_and_unload()
    after = dict(merged.named_parameters())
    assert after.keys() == before.keys()
    added = {name: (after[name].detach() - before[name]).numpy() for name in before}
    return {name.removesuffix(".weight"): d for name, d in added.items() if d.any()}


def write_checkpoint(
    folder: Path, dtype: torch.dtype = torch.float32, shard: str | None = None, tied: bool = False
) -> Path:
    """The pico model in another form, with what a published one has beside its weights.

    Args:
        folder: where to.
        dtype: of the weights on disk.
        shard: the size of one weights file, as in "40KB"; None for a single file.
        tied: whether the head is the embeddings.
    """
    from transformers import LlamaForCausalLM

    tokenizer = pico.make_tokenizer()
    config = pico.make_model(len(tokenizer)).config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    tokenizer.save_pretrained(folder)
    (folder / "LICENSE").write_text("Do as you like.\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nThe base's own card.\n")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights in another form")
    return folder


def weights_of(folder: Path) -> dict[str, Tensor]:
    """All tensors in the weights files of a model folder."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def logits_of(model: Any, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """(positions, vocabulary) of a transformers model, one sentence after another."""
    with torch.no_grad():
        rows = [model(torch.tensor([tokenizer.encode(text)])).logits[0] for text in sentences]
    return torch.cat(rows).float()


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
