"""Weighted sums of updates, exact in factor space.

sum_i w_i s_i B_i A_i is the product of the B_i side by side (with w_i s_i in them) and the A_i
stacked, so the sum of updates of any ranks is one update whose rank is the sum of theirs. A module
that an adapter lacks counts as zero.
"""

from collections.abc import Sequence

import torch

from recycle_cli.lora.update import LowRankUpdate, ModelUpdate


def linear(updates: Sequence[ModelUpdate], weights: Sequence[float]) -> ModelUpdate:
    """sum_i w_i dW_i: task arithmetic (arXiv 2212.04089) on low-rank updates.

    Args:
        updates: at least one.
        weights: one for each update.
    """
    modules = sorted({module for update in updates for module in update})
    return {module: _sum_module(module, updates, weights) for module in modules}


def average(updates: Sequence[ModelUpdate], weights: Sequence[float]) -> ModelUpdate:
    """sum_i w_i dW_i / sum_i w_i; with equal weights, the mean (arXiv 2203.05482).

    Args:
        updates: at least one.
        weights: one for each update; their sum must not be 0.
    """
    total = sum(weights)
    return linear(updates, [weight / total for weight in weights])


def _sum_module(
    module: str, updates: Sequence[ModelUpdate], weights: Sequence[float]
) -> LowRankUpdate:
    there = [
        (update[module], weight)
        for update, weight in zip(updates, weights, strict=True)
        if module in update
    ]
    return LowRankUpdate(
        A=torch.cat([piece.A.double() for piece, _ in there]),
        B=torch.cat([piece.B.double() * (piece.scale * w) for piece, w in there], dim=1),
        scale=1.0,
    )
