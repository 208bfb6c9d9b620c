"""The factors of LoRAs, paired by name."""

from collections.abc import Mapping

from torch import nn


def factor_pairs(
    parameters: Mapping[str, nn.Parameter],
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """A (rank, in) and B (out, rank) of each LoRA, by the name of its A.

    Args:
        parameters: by names that differ within a pair in `lora_A` and `lora_B` alone.
    """
    names = [name for name in parameters if "lora_A" in name]
    return {name: (parameters[name], parameters[_partner(name)]) for name in names}


def _partner(name: str) -> str:
    before, _, after = name.rpartition("lora_A")
    return f"{before}lora_B{after}"
