"""The target LoRA: an ordinary LoRA trained from scratch on the task's own examples.

It is PEFT's own wrapper; the result is what PEFT saves.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, TaskType, get_peft_model

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.errors import InputError
from recycle_cli.lora.folder import WEIGHTS_FILE, save_tensors


@dataclass(frozen=True)
class LoraRecipe:
    """The shape of the LoRA to train.

    The defaults are those of arXiv 2602.12323.

    Args:
        rank: inner dimension.
        alpha: numerator of the scale.
        dropout: probability of dropping an input of A.
        use_rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
        target_modules: module names to adapt, or all linear ones but the head when empty.
        rank_pattern: other ranks for modules whose path ends in the key.
        alpha_pattern: other alphas for modules whose path ends in the key.
    """

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.1
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


@contextlib.contextmanager
def target_lora(base: BaseModel, recipe: LoraRecipe, seed: int) -> Iterator[Any]:
    """The base model wrapped by PEFT with a fresh LoRA, unwrapped again at the end.

    Yields:
        The PeftModel; its LoRA starts as the zero update.

    Raises:
        InputError: no module has one of the names in the recipe.
    """
    check_target_modules(base, recipe)
    with wrapped(base, LoraConfig(r=recipe.rank, **config_fields(recipe)), seed) as peft_model:
        yield peft_model


def config_fields(recipe: LoraRecipe) -> dict[str, Any]:
    """What PEFT's configuration calls the fields of a recipe; all but the rank, of which its forms
    of LoRA have several."""
    return {
        "lora_alpha": recipe.alpha,
        "lora_dropout": recipe.dropout,
        "use_rslora": recipe.use_rslora,
        "target_modules": list(recipe.target_modules) or "all-linear",
        "rank_pattern": dict(recipe.rank_pattern),
        "alpha_pattern": dict(recipe.alpha_pattern),
    }


@contextlib.contextmanager
def wrapped(base: BaseModel, config: PeftConfig, seed: int) -> Iterator[Any]:
    """The base model wrapped by PEFT with a fresh adapter, unwrapped again at the end.

    Args:
        base: the model.
        config: of the adapter; its task and base model are filled in.
        seed: of what is drawn.

    Yields:
        The PeftModel.
    """
    torch.manual_seed(seed)
    config.task_type = TaskType.CAUSAL_LM
    with warnings.catch_warnings():
        # PEFT warns that the model came from a folder; the next line sets that right.
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(base.model, config)
    peft_model.peft_config["default"].base_model_name_or_path = base.id
    peft_model.eval()
    try:
        yield peft_model
    finally:
        peft_model.unload()
        base.model.requires_grad_(False).eval()


def check_target_modules(base: BaseModel, recipe: LoraRecipe) -> None:
    """Checks that each target is the end of some linear module's path, and that each key of a
    pattern is that of a target.

    Raises:
        InputError: one is not.
    """
    paths = list(base.shapes)
    for name in recipe.target_modules:
        if not _ending_in(name, paths):
            raise InputError(
                f"{base.id} has no linear module {name!r}", f"its modules: {_last_names(paths)}"
            )
    if recipe.target_modules:
        paths = [path for name in recipe.target_modules for path in _ending_in(name, paths)]
    for name in (*recipe.rank_pattern, *recipe.alpha_pattern):
        if not _ending_in(name, paths):
            raise InputError(
                f"a pattern names {name!r}, which the LoRA does not adapt",
                f"it adapts: {_last_names(paths)}",
            )


def _ending_in(name: str, paths: Sequence[str]) -> list[str]:
    return [path for path in paths if path == name or path.endswith("." + name)]


def _last_names(paths: Sequence[str]) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in paths}))


def save_target_lora(peft_model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Writes the LoRA as PEFT does, with the factors in `dtype`."""
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        # PEFT warns that it cannot ask the Hub whether the vocabulary was changed; it was not.
        warnings.simplefilter("ignore")
        peft_model.save_pretrained(folder, save_embedding_layers=False)
    path = folder / WEIGHTS_FILE
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(path).items()}
    save_tensors(tensors, path, {"format": "pt"})
