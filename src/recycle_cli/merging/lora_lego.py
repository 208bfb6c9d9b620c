"""LoRA-LEGO: updates taken apart into rank-1 units, which are clustered (arXiv 2409.16167)."""

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recycle_cli.lora.draws import generator_for
from recycle_cli.lora.update import LowRankUpdate, zero_update
from recycle_cli.merging.group import Group

ITERATIONS = 100


def lora_lego(group: Group, clusters: int | None) -> LowRankUpdate:
    """One rank-1 unit for each cluster of the adapters' units.

    A unit is a column of B_i and its row of A_i, one long vector; the scale s_i stands in both
    halves alike. Clusters are found by k-means. A cluster's centroid is stretched to the mean
    norm of its units, since averaging shrinks it, and the whole update by sqrt(r / k), r the mean
    rank of the adapters and k the number of clusters, since the spread of an output grows with
    the number of units.

    Args:
        group: the updates. Their weights are not used.
        clusters: how many, which is the rank of the result; None for the largest rank among the
            updates. There are never more than there are units.
    """
    group = group.present()
    units, ranks = _units(group)
    if not ranks:
        return zero_update(group.shape)
    wanted = min(clusters or max(ranks), len(units))
    members = _cluster(units, wanted, group.keys)
    centroids = np.stack([_centroid(units[members == label]) for label in np.unique(members)])
    stretch = (sum(ranks) / len(ranks) / len(centroids)) ** 0.5
    rows = group.shape[0]
    return LowRankUpdate(
        A=torch.from_numpy(centroids[:, rows:].copy()),
        B=torch.from_numpy(centroids[:, :rows].T.copy()) * stretch,
        scale=1.0,
    )


def _units(group: Group) -> tuple[NDArray[np.float64], list[int]]:
    """All units that are not zero, (units, out + in), and how many each adapter has."""
    units, ranks = [], []
    for piece in group.pieces:
        root = abs(piece.scale) ** 0.5
        sign = 1.0 if piece.scale >= 0 else -1.0
        halves = torch.cat([sign * piece.B.double().T, piece.A.double()], dim=1) * root
        there = _not_zero(piece)
        if there.any():
            units.append(halves[there].numpy())
            ranks.append(int(there.sum()))
    return (np.concatenate(units) if units else np.empty((0, 0))), ranks


def _not_zero(piece: LowRankUpdate) -> Tensor:
    """Which units change anything: both of their halves do."""
    return (piece.A != 0).any(dim=1) & (piece.B != 0).any(dim=0)


def _cluster(units: NDArray[np.float64], clusters: int, keys: tuple[str, ...]) -> NDArray[np.int32]:
    """The cluster of each unit, by k-means from a k-means++ start."""
    from scipy.cluster.vq import kmeans2

    if clusters == len(units):
        return np.arange(len(units), dtype=np.int32)
    seed = int(torch.randint(1 << 62, (1,), generator=generator_for(*sorted(keys))))
    with warnings.catch_warnings():
        # A cluster that ends up empty is dropped.
        warnings.simplefilter("ignore")
        _, members = kmeans2(units, clusters, iter=ITERATIONS, minit="++", rng=seed)
    labels: NDArray[np.int32] = members
    return labels


def _centroid(units: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of the units with their mean norm."""
    centre: NDArray[np.float64] = units.mean(axis=0)
    length = np.linalg.norm(centre)
    return centre * (np.linalg.norm(units, axis=1).mean() / length) if length > 0 else centre
