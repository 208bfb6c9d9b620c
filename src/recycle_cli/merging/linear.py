"""Weighted sums of updates, exact in factor space.

sum_i w_i s_i B_i A_i is the product of the B_i side by side (with w_i s_i in them) and the A_i
stacked, so the sum of updates of any ranks is one update whose rank is the sum of theirs.
"""

from collections.abc import Sequence

import torch

from recycle_cli.lora.update import LowRankUpdate
from recycle_cli.merging.group import Group


def linear(group: Group) -> LowRankUpdate:
    """sum_i w_i dW_i: task arithmetic (arXiv 2212.04089) on low-rank updates."""
    return weighted_sum(group.pieces, group.weights)


def average(group: Group) -> LowRankUpdate:
    """sum_i w_i dW_i / sum_i w_i; with equal weights, the mean (arXiv 2203.05482)."""
    return weighted_sum(group.pieces, group.shares)


def weighted_sum(pieces: Sequence[LowRankUpdate], weights: Sequence[float]) -> LowRankUpdate:
    """sum_i w_i dW_i as one update in float64, whose rank is the sum of the ranks.

    Args:
        pieces: at least one, of one shape.
        weights: one for each.
    """
    rows, columns = pieces[0].shape
    rank = sum(piece.rank for piece in pieces)
    a = torch.empty(rank, columns, dtype=torch.float64)
    b = torch.empty(rows, rank, dtype=torch.float64)
    end = 0
    for piece, weight in zip(pieces, weights, strict=True):
        start, end = end, end + piece.rank
        a[start:end] = piece.A
        # Into its place first: in float32 the product would round.
        b[:, start:end] = piece.B
        b[:, start:end] *= piece.scale * weight
    return LowRankUpdate(a, b, 1.0)
