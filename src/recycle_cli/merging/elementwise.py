"""Rules that work on single entries of dW: sparsify each update, then sum or take a vote.

The result is dense, but it is all that is: updates are multiplied out block of rows by block of
rows and combined while they are in the cache, so memory does not grow with their number.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from recycle_cli.lora.update import row_blocks
from recycle_cli.merging.group import Group
from recycle_cli.merging.sparsify import (
    Sparsifier,
    band,
    drop,
    drop_by_rank,
    trim,
)

COUNT, WEIGHTS = "count", "weights"
NO_WEIGHT = 1e-8

Combine = Callable[[Iterable[tuple[float, Tensor]], Tensor], None]
"""Given (weight, block) of every update, fills the block of the merged update."""


def magnitude_prune(group: Group, density: float) -> Tensor:
    """sum_i w_i trim(dW_i), as in PEFT's magnitude_prune."""
    return merge_blocks(group, trim(density), add_up)


def breadcrumbs(group: Group, density: float, gamma: float) -> Tensor:
    """sum_i w_i band(dW_i) (arXiv 2312.06795)."""
    return merge_blocks(group, band(density, gamma), add_up)


def dare_linear(group: Group, density: float) -> Tensor:
    """sum_i w_i drop(dW_i) (arXiv 2311.03099)."""
    return merge_blocks(group, drop(density), add_up)


def ties(group: Group, density: float, normalize: str) -> Tensor:
    """The mean of the trimmed entries that agree with the elected sign (arXiv 2306.01708)."""
    return merge_blocks(group, trim(density), elect(normalize))


def dare_ties(group: Group, density: float, normalize: str) -> Tensor:
    """As `ties`, with entries dropped at random instead of trimmed (arXiv 2311.03099)."""
    return merge_blocks(group, drop(density), elect(normalize))


def della(group: Group, density: float, epsilon: float, normalize: str) -> Tensor:
    """As `ties`, with entries dropped the likelier the smaller they are (arXiv 2406.11617)."""
    return merge_blocks(group, drop_by_rank(density, epsilon), elect(normalize))


def merge_blocks(group: Group, sparsify: Sparsifier, combine: Combine) -> Tensor:
    """Sparsifies every update and combines them, (out, in), in the dtype of the factors."""
    group = group.present()
    filters = [sparsify(piece, group.generator(index)) for index, piece in enumerate(group.pieces)]
    merged = torch.empty(group.shape, dtype=group.dtype)
    for rows in row_blocks(group.shape):
        blocks = (
            (weight, keep(piece.rows(rows)))
            for piece, weight, keep in zip(group.pieces, group.weights, filters, strict=True)
        )
        combine(blocks, merged[rows])
    return merged


def add_up(blocks: Iterable[tuple[float, Tensor]], out: Tensor) -> None:
    """sum_i w_i x_i."""
    out.zero_()
    for weight, block in blocks:
        out.add_(block, alpha=weight)


def elect(normalize: str) -> Combine:
    """The mean of the w_i x_i whose sign is that of sum_i w_i x_i, zero counting as positive.

    One pass is enough: the positive and the negative ones are summed apart, and the election
    picks one of the two sums.

    Args:
        normalize: `count` divides by the number of those that agree, `weights` by the sum of
            their weights.
    """

    def combine(blocks: Iterable[tuple[float, Tensor]], out: Tensor) -> None:
        ups, downs, up_shares, down_shares = (torch.zeros_like(out) for _ in range(4))
        for weight, block in blocks:
            weighted = block * weight
            share = weight if normalize == WEIGHTS else 1.0
            up_shares.add_(weighted > 0, alpha=share)
            down_shares.add_(weighted < 0, alpha=share)
            ups += weighted.clamp(min=0)
            downs += weighted.clamp_(max=0)
        up = ups + downs >= 0
        share_of_all = torch.where(up, up_shares, down_shares)
        share_of_all[share_of_all.abs() < NO_WEIGHT] = 1
        torch.div(torch.where(up, ups, downs), share_of_all, out=out)

    return combine
