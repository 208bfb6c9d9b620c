"""DoRA (arXiv 2402.09353), by PEFT: each row of the adapted weight has a trained length.

W' = m (W + s B A) / |W + s B A|, row by row, with the norms taken as constants in the gradients.
The rows of W itself are stretched, so that W' - W has full rank and no small LoRA equals it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.lora.update import ModelUpdate
from recycle_cli.tuning.lora_architectures.fresh import dense_update
from recycle_cli.tuning.lora_form import Former, LoraForm, Setup, of_peft
from recycle_cli.tuning.peft_layers import ADAPTER, factor_pair, peft_layers
from recycle_cli.tuning.target_lora import LoraRecipe, check_target_modules, config_fields, wrapped


@contextlib.contextmanager
def dora(setup: Setup, within: Former) -> Iterator[LoraForm]:
    """DoRA in the place of the ordinary LoRA: see `lora_form`."""
    check_target_modules(setup.base, setup.recipe)
    with wrapped(setup.base, dora_config(setup.recipe), setup.plan.seed) as peft_model:
        form = of_peft(setup.base, peft_model)
        yield replace(form, update=lambda: dora_update(setup.base))


def dora_config(recipe: LoraRecipe) -> LoraConfig:
    """PEFT's configuration."""
    return LoraConfig(r=recipe.rank, use_dora=True, **config_fields(recipe))


def dora_update(base: BaseModel) -> ModelUpdate:
    """W' - W of the modules that DoRA is on, of their smaller side as rank; exact."""
    layers = peft_layers(base)
    shapes = {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}
    return dense_update(shapes, lambda path: _delta(layers[path]))


@torch.no_grad()
def _delta(layer: Any) -> Tensor:
    a, b = (factor.double() for factor in factor_pair(layer))
    weight = layer.get_base_layer().weight.double()
    moved = weight + layer.scaling[ADAPTER] * (b @ a)
    lengths = layer.lora_magnitude_vector[ADAPTER].weight.double()
    delta: Tensor = (lengths / moved.norm(dim=1))[:, None] * moved - weight
    return delta
