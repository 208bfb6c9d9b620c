"""Rules on singular values and vectors: TSV-M and isotropic merging, from factors alone."""

import torch
from torch import Tensor

from recycle_cli.lora.decomposition import column_basis, spectrum
from recycle_cli.lora.update import LowRankUpdate, zero_update
from recycle_cli.merging.group import Group
from recycle_cli.merging.linear import weighted_sum


def tsv(group: Group, components: int | None) -> LowRankUpdate:
    """Task singular vectors, TSV-M (arXiv 2412.00081).

    Each update gives its largest singular triplets; their singular vectors, side by side, are
    replaced by the nearest orthonormal ones, so that the updates no longer interfere. An update
    never gives more than its rank, nor more than its share of the smaller side: beyond the
    rank there are only arbitrary vectors.

    Args:
        group: the updates; weights multiply the singular values.
        components: the most that one update may give; None for no limit but those.
    """
    share = max(1, min(group.shape) // len(group.pieces))
    lefts, values, rights = [], [], []
    for piece, weight in zip(group.pieces, group.weights, strict=True):
        found = spectrum(piece)
        count = min(found.rank, share, components or share)
        if count > 0:
            left, right = found.leading(count)
            lefts.append(left)
            values.append(found.values[:count] * weight)
            rights.append(right)
    if not values:
        return zero_update(group.shape)
    left, right = _orthonormal(torch.cat(lefts, dim=1)), _orthonormal(torch.cat(rights).T).T
    return LowRankUpdate(A=right, B=left * torch.cat(values), scale=1.0)


def iso(group: Group) -> LowRankUpdate:
    """Isotropic merging, Iso-C (arXiv 2502.04959): the weighted sum of the updates with every
    singular value replaced by their mean.

    The mean is over the values that are not zero: beyond the rank of the sum there are only
    arbitrary directions.
    """
    found = spectrum(weighted_sum(group.pieces, group.weights))
    left, right = found.leading(found.rank)
    return LowRankUpdate(A=right, B=left * found.values[: found.rank].mean(), scale=1.0)


def _orthonormal(vectors: Tensor) -> Tensor:
    """The nearest orthonormal columns, the polar factor P Q of U = P S Q.

    Where the vectors are linearly dependent that factor is not unique; this is the one that adds
    no direction of its own.
    """
    left, _, right = column_basis(vectors)
    return left @ right
