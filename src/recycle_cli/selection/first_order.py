"""What adapters would do to a loss, to first order, from the gradient of the base model alone.

With an adapter's update dW_m scaled by c in every module, the loss L(c) has the slope
L'(0) = sum_m <G_m, dW_m> at c = 0, where G_m is the gradient with respect to the weights of module
m. So one forward and backward pass of the base model serves a whole pool.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from recycle_cli.lora.update import LowRankUpdate, ModelUpdate

TOGETHER = 64
"""Adapters whose factors of one module are in memory at once."""


def slopes(gradients: Mapping[str, Tensor], updates: Sequence[ModelUpdate]) -> list[float]:
    """dL/dc at c = 0 for each adapter; negative where it lowers the loss.

    The products sum_m s_m <G_m, B_m A_m> are taken in factor form, (s B^T G) entry by entry with A,
    those of many adapters in one: no update is ever made dense.

    Args:
        gradients: module path -> (out, in) float32. What an adapter changes elsewhere counts
            nothing.
        updates: whose modules are taken one at a time.
    """
    found = torch.zeros(len(updates), dtype=torch.float64)
    for module, gradient in gradients.items():
        there = [at for at, update in enumerate(updates) if module in update]
        for start in range(0, len(there), TOGETHER):
            owners = there[start : start + TOGETHER]
            pieces = [updates[at][module] for at in owners]
            found[owners] += _products(gradient, pieces).cpu()
    return found.tolist()


def _products(gradient: Tensor, pieces: Sequence[LowRankUpdate]) -> Tensor:
    """<G, s B A> of each, (pieces,) float64."""
    device = gradient.device
    a = torch.cat([piece.A for piece in pieces]).to(device, gradient.dtype)
    b = torch.cat([piece.B * piece.scale for piece in pieces], dim=1).to(device, gradient.dtype)
    by_component = ((b.T @ gradient) * a).sum(dim=1, dtype=torch.float64)
    ranks = [piece.rank for piece in pieces]
    return torch.stack([part.sum() for part in by_component.split(ranks)])
