"""What adapters would do to a loss, to first order, from the gradient of the base model alone.

With an adapter's update dW_m scaled by c in every module, the loss L(c) has the slope
L'(0) = sum_m <G_m, dW_m> at c = 0, where G_m is the gradient with respect to the weights of module
m. So one forward and backward pass of the base model serves a whole pool.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from recycle_cli.lora.update import LowRankUpdate, ModelUpdate

TOGETHER = 512
"""Rank-1 components of one module that are multiplied at once, if no adapter has more: their
product then stays in a processor's cache."""


def slopes(
    gradients: Mapping[str, Tensor],
    updates: Sequence[ModelUpdate],
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """dL/dc at c = 0 for each adapter; negative where it lowers the loss.

    The products sum_m s_m <G_m, B_m A_m> are taken in factor form, s (G A^T) entry by entry with B,
    those of many adapters in one: no update is ever made dense.

    Args:
        gradients: module path -> (out, in) float32. What an adapter changes elsewhere counts
            nothing.
        updates: whose modules are taken one at a time.
        dtype: of the factors of G A^T, which is where the time goes. A gradient that was computed
            in bfloat16 has no more digits to lose.
    """
    found = torch.zeros(len(updates), dtype=torch.float64)
    for module, gradient in gradients.items():
        narrow = gradient.to(dtype)
        owned = ((at, update[module]) for at, update in enumerate(updates) if module in update)
        for owners, pieces in _together(owned):
            found[owners] += _products(narrow, pieces)
    return found.tolist()


def _together(
    owned: Iterable[tuple[int, LowRankUpdate]],
) -> Iterator[tuple[list[int], list[LowRankUpdate]]]:
    """Owners and their pieces, as many at a time as make up TOGETHER components."""
    owners: list[int] = []
    pieces: list[LowRankUpdate] = []
    components = 0
    for owner, piece in owned:
        if pieces and components + piece.rank > TOGETHER:
            yield owners, pieces
            owners, pieces, components = [], [], 0
        owners.append(owner)
        pieces.append(piece)
        components += piece.rank
    if pieces:
        yield owners, pieces


def _products(gradient: Tensor, pieces: Sequence[LowRankUpdate]) -> Tensor:
    """<G, s B A> of each, (pieces,) float64 on the CPU."""
    a = torch.cat([piece.A for piece in pieces]).to(gradient)
    b = torch.cat([piece.B for piece in pieces], dim=1).to(gradient.device)
    by_component = (gradient @ a.T).to(b.dtype).mul_(b).sum(dim=0).double().cpu()
    owner = torch.arange(len(pieces)).repeat_interleave(
        torch.tensor([piece.rank for piece in pieces])
    )
    scale = torch.tensor([piece.scale for piece in pieces], dtype=torch.float64)
    return scale * torch.zeros_like(scale).index_add_(0, owner, by_component)
