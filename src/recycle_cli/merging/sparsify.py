"""Which entries of an update take part in a merge, decided for each update alone.

A sparsifier prepares an update once (a threshold, a stream of random numbers) and gives back a
filter, which is then applied to one block of rows after another, so that no dense update is ever
held as a whole. Blocks must come in the order of the rows.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from recycle_cli.lora.update import LowRankUpdate, row_blocks

Filter = Callable[[Tensor], Tensor]
"""A block of rows of dW in, the same with the entries that are left out at zero."""

Sparsifier = Callable[[LowRankUpdate, torch.Generator], Filter]


def keep_all() -> Sparsifier:
    """Leaves every entry as it is."""
    return lambda piece, generator: lambda block: block


def trim(density: float) -> Sparsifier:
    """Keeps the share `density` of the entries, the largest in magnitude (TIES, 2306.01708)."""
    if density >= 1:
        return keep_all()

    def prepare(piece: LowRankUpdate, _: torch.Generator) -> Filter:
        entries = piece.shape[0] * piece.shape[1]
        (least,) = magnitudes_at(piece, [max(1, int(density * entries))])
        return lambda block: torch.where(block.abs() >= least, block, 0)

    return prepare


def band(density: float, gamma: float) -> Sparsifier:
    """Leaves out the share `gamma` of the entries that is largest in magnitude, and keeps the
    share `density` that comes next (Model Breadcrumbs, 2312.06795). Where both do not fit, less is
    left out at the top."""

    def prepare(piece: LowRankUpdate, _: torch.Generator) -> Filter:
        entries = piece.shape[0] * piece.shape[1]
        kept = max(1, int(density * entries))
        top = min(int(gamma * entries), entries - kept)
        most, least = magnitudes_at(piece, [max(1, top), top + kept])

        def band_pass(block: Tensor) -> Tensor:
            size = block.abs()
            inside = size >= least
            if top > 0:
                inside &= size < most
            return torch.where(inside, block, 0)

        return band_pass

    return prepare


def drop(density: float) -> Sparsifier:
    """Keeps each entry with probability `density` and divides it by that, so that its
    expectation stays (DARE, 2311.03099)."""
    if density >= 1:
        return keep_all()

    def prepare(_: LowRankUpdate, generator: torch.Generator) -> Filter:
        def draw(block: Tensor) -> Tensor:
            return block * _draw(torch.full_like(block, density), generator) / density

        return draw

    return prepare


def drop_by_rank(density: float, epsilon: float) -> Sparsifier:
    """Keeps each entry with a probability that rises evenly with its place among the magnitudes
    of its row, from `density - epsilon` to `density + epsilon`, and divides it by that (MagPrune
    of DELLA, 2406.11617)."""
    if density >= 1:
        return keep_all()

    def prepare(_: LowRankUpdate, generator: torch.Generator) -> Filter:
        return functools.partial(
            _draw_by_rank, density=density, epsilon=epsilon, generator=generator
        )

    return prepare


def _draw_by_rank(
    block: Tensor, density: float, epsilon: float, generator: torch.Generator
) -> Tensor:
    place = block.abs().argsort(dim=1).argsort(dim=1).to(block.dtype)
    share = place / max(1, block.shape[1] - 1)
    probability = density - epsilon + 2 * epsilon * share
    return block * _draw(probability, generator) / probability


def _draw(probability: Tensor, generator: torch.Generator) -> Tensor:
    """1 with this probability, else 0. In float32, whatever the dtype: torch would draw other
    numbers in another."""
    return torch.bernoulli(probability.float(), generator=generator)


def magnitudes_at(piece: LowRankUpdate, places: Sequence[int]) -> list[float]:
    """The magnitudes of dW's entries at these places, counted from 1 for the largest.

    Costs one number for each entry of dW, for as long as it takes.
    """
    columns = piece.shape[1]
    sizes = torch.empty(piece.shape[0] * columns, dtype=piece.A.dtype)
    for rows in row_blocks(piece.shape):
        sizes[rows.start * columns : rows.stop * columns] = piece.rows(rows).abs_().view(-1)
    return largest_at(sizes, places)


def largest_at(values: Tensor, places: Sequence[int]) -> list[float]:
    """The values at these places, counted from 1 for the largest. Reorders `values`.

    numpy's selection, since torch's kthvalue and topk take 6 to 30 times as long on a CPU.
    """
    array = values.numpy()
    wanted = [len(array) - place for place in places]
    array.partition(np.array(sorted(set(wanted))))
    return [float(array[position]) for position in wanted]
