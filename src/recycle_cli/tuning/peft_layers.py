"""The LoRA layers that PEFT put into a base model."""

from collections.abc import Collection, Mapping
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate

ADAPTER = "default"


def peft_layers(base: BaseModel) -> dict[str, Any]:
    """By module path, in the order of the model."""
    named = base.model.named_modules()
    return {path: module for path, module in named if isinstance(module, LoraLayer)}


def switch(layers: Mapping[str, Any], on: Collection[str]) -> None:
    """Lets the layers of some paths act, and no others: those compute what the base model does, and
    their factors get no gradients.

    PEFT's own switches would also freeze the factors, and a scale of zero would leave gradients of
    zero, which an optimizer with momentum does not stand still for.
    """
    for path, layer in layers.items():
        layer._disable_adapters = path not in on


def factor_pair(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in) and B (out, rank) of a layer."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def lora_update(base: BaseModel, paths: Collection[str] | None = None) -> ModelUpdate:
    """The LoRA that the layers make as they stand, in all modules or in some of them."""
    layers = peft_layers(base)
    return {path: _piece(layers[path]) for path in (layers if paths is None else paths)}


def _piece(layer: Any) -> LowRankUpdate:
    a, b = (factor.detach().cpu() for factor in factor_pair(layer))
    return LowRankUpdate(a, b, layer.scaling[ADAPTER])
