"""Tiny adapters on disk, in every state that a stranger's may be in."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

HIDDEN = 8
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
WriteAdapter = Callable[..., Path]


@pytest.fixture
def base_shapes() -> dict[str, tuple[int, int]]:
    """A base model of two linear modules."""
    return dict.fromkeys(MODULES, (HIDDEN, HIDDEN))


def tensors_for(modules: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random factors for module path -> rank."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, rank in modules.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(HIDDEN, rank, generator=generator)
    return tensors


@pytest.fixture
def write_adapter() -> WriteAdapter:
    """Writes an adapter folder; None leaves a file out."""

    def write(
        folder: Path,
        config: dict[str, Any] | str | None = None,
        tensors: dict[str, torch.Tensor] | bytes | None = None,
        card: str | None = "---\nlicense: mit\n---\n",
        seed: int = 0,
    ) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if not isinstance(config, str):
            plain = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
            plain |= {"base_model_name_or_path": "org/base", "target_modules": ["q_proj"]}
            config = json.dumps(plain | (config or {}))
        (folder / "adapter_config.json").write_text(config)
        if isinstance(tensors, bytes):
            (folder / "adapter_model.safetensors").write_bytes(tensors)
        else:
            tensors = tensors or tensors_for(dict.fromkeys(MODULES, 2), seed)
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        if card is not None:
            (folder / "README.md").write_text(card)
        return folder

    return write


@pytest.fixture
def make_tensors() -> Callable[..., dict[str, torch.Tensor]]:
    """`tensors_for`, for tests that bend the factors before they are written."""
    return tensors_for
