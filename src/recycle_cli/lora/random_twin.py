"""Random adapters that look like real ones: the control of arXiv 2602.12323.

If adapters of noise help a mixture as much as real ones, the gain is no transfer from what
strangers trained.
"""

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from recycle_cli.lora.draws import generator_for
from recycle_cli.lora.norm import squared_norm
from recycle_cli.lora.update import Lazy, LowRankUpdate, ModelUpdate

Kept = Literal["spread", "norm"]


def random_twin(update: ModelUpdate, name: str, seed: int, keep: Kept = "spread") -> ModelUpdate:
    """The update with both factors redrawn, module by module, from a normal distribution of mean
    zero with the standard deviation of the factor they replace. Modules, ranks and scales stay.

    Modules are redrawn when they are asked for.

    Args:
        update: the adapter to imitate.
        name: what tells this adapter from the others, such as its sha256; it makes its draws
            independent of theirs.
        seed: the same seed and name give the same twin on every machine.
        keep: `spread` for no more than that; `norm` also gives each module the Frobenius norm of
            the one it replaces, which redrawn factors have only where the real ones are as
            unrelated to each other.
    """

    def redraw(module: str) -> LowRankUpdate:
        piece = update[module]
        twin = LowRankUpdate(
            A=_redraw(piece.A, generator_for(seed, name, module, "A")),
            B=_redraw(piece.B, generator_for(seed, name, module, "B")),
            scale=piece.scale,
        )
        return twin if keep == "spread" else _with_norm_of(piece, twin)

    return Lazy(update.keys(), redraw)


def _with_norm_of(piece: LowRankUpdate, twin: LowRankUpdate) -> LowRankUpdate:
    wanted, there = squared_norm(piece), squared_norm(twin)
    return replace(twin, B=twin.B * math.sqrt(wanted / there)) if there > 0 else twin


def _redraw(factor: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(factor.shape, generator=generator, dtype=torch.float32)
    # One number (rank 1 and width 1) has no spread to imitate; its size does as well.
    spread = factor.float().std(correction=0) if factor.numel() > 1 else factor.float().abs().mean()
    return noise * spread
