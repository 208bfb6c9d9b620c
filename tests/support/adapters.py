"""Adapters for the pico model, made and saved by PEFT itself."""

import warnings
from pathlib import Path
from typing import Any

SPREAD = 0.3


def write_peft_adapter(folder: Path, base_folder: Path, seed: int = 0, **config: Any) -> Path:
    """Saves a LoRA whose factors are all random, so that no part of its update is zero.

    Args:
        folder: where to.
        base_folder: the pico model.
        seed: of the factors.
        config: for `peft.LoraConfig`; rank 4 on q_proj and v_proj unless it says otherwise.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    usual: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base_folder)
        peft_model: Any = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", **{**usual, **config})
        )
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(peft_model.named_parameters()):
            if "lora_" in name:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(SPREAD * drawn)
        peft_model.save_pretrained(folder)
    license_of = {0: "mit", 1: "apache-2.0"}.get(seed % 3)
    card = f"---\nlicense: {license_of}\n---\n" if license_of else "No licence is stated.\n"
    (folder / "README.md").write_text(card)
    return folder
