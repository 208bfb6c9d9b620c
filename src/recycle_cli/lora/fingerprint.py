"""Random projections of an update: few numbers whose inner products are nearly those of updates."""

import functools

import torch
from torch import Tensor

from recycle_cli.lora.draws import generator_for
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate

SEED = "recycle.fingerprint/1"
SIZE = 8
"""Numbers a module."""


def project(update: ModelUpdate) -> dict[str, list[float]]:
    """Module path -> 8 numbers x_1 ... x_8 of its update dW = s B A, sorted by path.

    x_j = u_j^T dW v_j, where u_j and v_j hold standard normal numbers. They are drawn in float64 by
    `generator_for("recycle.fingerprint/1", side, dimension, j)` with the side `out` or `in` and j
    from 0 to 7, so they are the same for all adapters and on every machine; modules of one shape
    share them. The expectation of x_j y_j over all draws is <dW_x, dW_y>, so the mean over j,
    summed over modules, estimates inner products of whole updates, and of an update with itself its
    squared Frobenius norm. The cosine c of two updates of m modules, of about equal norms and not
    alike among themselves, is off by about (1 - c^2) / sqrt(8 m).

    Computed from the factors in float64, O(8 r (in + out)) a module; the update is never formed.

    Args:
        update: modules are asked for one at a time.
    """
    return {module: projections_of(update[module]) for module in sorted(update)}


def projections_of(piece: LowRankUpdate) -> list[float]:
    """The 8 numbers of one module; see `project`."""
    rows, columns = piece.shape
    left = _vectors("out", rows) @ piece.B.double()  # (SIZE, rank)
    right = _vectors("in", columns) @ piece.A.double().T  # (SIZE, rank)
    numbers: list[float] = (piece.scale * (left * right).sum(dim=1)).tolist()
    return numbers


@functools.cache
def _vectors(side: str, dimension: int) -> Tensor:
    """The vectors of one side of all modules with this dimension, (SIZE, dimension)."""
    draws = (
        torch.randn(
            dimension, generator=generator_for(SEED, side, dimension, j), dtype=torch.float64
        )
        for j in range(SIZE)
    )
    return torch.stack(list(draws))
