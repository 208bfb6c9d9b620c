"""SCE, select, calculate, erase (FuseChat-3.0, arXiv 2408.07990), as mergekit computes it, but
without its floor of 1e-6 under the energies, which the small updates of a LoRA may not reach.

It takes three passes over the updates, each multiplied out block of rows by block of rows: the
variance of every entry, the energy of every update on the selected entries, the fusion.
"""

import torch
from torch import Tensor

from recycle_cli.lora.update import row_blocks
from recycle_cli.merging.group import Group
from recycle_cli.merging.sparsify import largest_at


def sce(group: Group, density: float) -> Tensor:
    """Merges the entries that vary most between the updates.

    Select: the share `density` of the entries with the largest variance over the updates.
    Calculate: each update weighs as much as its squared norm on those entries. Erase: entries
    whose sign is not that of the sum are left out. The result is the weighted mean of the rest.
    Updates that do not differ at all are selected whole.
    """
    sums, selected = _select(group, density)
    weights = _energies(group, selected)
    merged = torch.zeros_like(sums)
    for rows in row_blocks(group.shape):
        up, mask = sums[rows] >= 0, selected[rows]
        total, share = torch.zeros_like(merged[rows]), torch.zeros_like(merged[rows])
        for piece, weight in zip(group.pieces, weights, strict=True):
            block = piece.rows(rows)
            agrees = mask & torch.where(up, block > 0, block < 0)
            total += weight * block * agrees
            share.add_(agrees, alpha=weight)
        merged[rows] = total / torch.where(share > 0, share, 1)
    return merged


def _select(group: Group, density: float) -> tuple[Tensor, Tensor]:
    """The sum of the updates, and which entries are selected, both (out, in)."""
    count = len(group.pieces)
    sums = torch.empty(group.shape, dtype=group.dtype)
    variance = torch.empty_like(sums)
    for rows in row_blocks(group.shape):
        blocks = torch.stack([piece.rows(rows).to(group.dtype) for piece in group.pieces])
        sums[rows] = blocks.sum(0)
        # Around the first one, so that equal entries have no variance, not even of rounding.
        apart = blocks - blocks[0]
        variance[rows] = (apart - apart.mean(0)).square().sum(0) / count
    varied = int(torch.count_nonzero(variance))
    if density >= 1 or varied == 0:
        return sums, torch.ones_like(sums, dtype=torch.bool)
    (least,) = largest_at(variance.flatten().clone(), [max(1, int(density * varied))])
    return sums, variance >= least


def _energies(group: Group, selected: Tensor) -> list[float]:
    """The share of each update in the squared norm on the selected entries."""
    energies = [0.0] * len(group.pieces)
    for rows in row_blocks(group.shape):
        for index, piece in enumerate(group.pieces):
            energies[index] += float(piece.rows(rows)[selected[rows]].square().sum())
    total = sum(energies)
    if total == 0:
        return [1.0 / len(energies)] * len(energies)
    return [energy / total for energy in energies]
