"""Rules that first move the updates into a common basis and merge what they are there.

A merge of single entries depends on the basis. These rules choose one from the updates, which is
small since they are of low rank: their coordinates there are merged by an inner rule and turned
back. Nothing of the size of dW is formed, but for the (rank x in) coordinates of KnOTS.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recycle_cli.lora.decomposition import column_basis, spectrum
from recycle_cli.lora.update import LowRankUpdate, zero_update
from recycle_cli.merging.elementwise import COUNT, add_up, elect, merge_blocks
from recycle_cli.merging.group import Group
from recycle_cli.merging.sparsify import Sparsifier, drop, keep_all, trim

LINEAR, TIES, DARE = "linear", "ties", "dare"


def knots_ties(group: Group, density: float, normalize: str) -> LowRankUpdate:
    """KnOTS with TIES inside (arXiv 2410.19735)."""
    return _knots(group, trim(density), normalize)


def knots_dare(group: Group, density: float, normalize: str) -> LowRankUpdate:
    """KnOTS with DARE-TIES inside (arXiv 2410.19735): dropped at random, then elected."""
    return _knots(group, drop(density), normalize)


def core_space(group: Group, inner: str, density: float) -> LowRankUpdate:
    """Core Space merging (arXiv 2509.17786): the updates as small cores U^T dW_i V.

    U spans the columns of all B_i and V the rows of all A_i, both by an SVD of the factors as
    they are, so nothing is lost before the inner rule. With `linear` inside it is the weighted
    sum; the others depend on the basis, and so on how dW_i is split into B_i and A_i.
    """
    group = group.present()
    left, _, _ = column_basis(torch.cat([piece.B for piece in group.pieces], dim=1))
    right, _, _ = column_basis(torch.cat([piece.A for piece in group.pieces]).T)
    return _merge_cores(group, left, right, inner, density)


def compress_then_merge(
    group: Group, shared_rank: int | None, inner: str, density: float
) -> LowRankUpdate:
    """Compress-then-Merge (arXiv 2606.03723): cores in shared subspaces of the final rank.

    The subspaces are those of the largest left singular vectors of the updates side by side and
    of the largest right ones of the updates stacked; each update is projected on both, and the
    (shared_rank x shared_rank) cores are merged. The rank needs no cut afterwards.

    Args:
        group: the updates.
        shared_rank: the rank of the result; None for the largest rank among the updates.
        inner: `linear`, `ties` or `dare`.
        density: of the last two.
    """
    group = group.present()
    rank = shared_rank or max(1, *(spectrum(piece).rank for piece in group.pieces))
    left, _, _ = column_basis(torch.cat(_columns(group.pieces)[0], dim=1))
    turned = [LowRankUpdate(piece.B.T, piece.A.T, piece.scale) for piece in group.pieces]
    right, _, _ = column_basis(torch.cat(_columns(turned)[0], dim=1))
    return _merge_cores(group, left[:, :rank], right[:, :rank], inner, density)


def _knots(group: Group, sparsify: Sparsifier, normalize: str) -> LowRankUpdate:
    """[dW_1 .. dW_K] = U S [V_1 .. V_K]; the S V_i are merged entry by entry, and U put before."""
    group = group.present()
    columns, bases = _columns(group.pieces)
    left, values, mixing = column_basis(torch.cat(columns, dim=1))
    if len(values) == 0:
        return zero_update(group.shape)
    parts = mixing.split([part.shape[1] for part in columns], dim=1)
    aligned = [
        LowRankUpdate(A=basis, B=values[:, None] * part, scale=1.0)
        for basis, part in zip(bases, parts, strict=True)
    ]
    merged = merge_blocks(_with_pieces(group, aligned), sparsify, elect(normalize))
    return LowRankUpdate(A=merged, B=left, scale=1.0)


def _columns(pieces: Sequence[LowRankUpdate]) -> tuple[list[Tensor], list[Tensor]]:
    """dW_i = C_i Q_i with orthonormal rows in Q_i (k_i, in), so that the C_i (out, k_i) side by
    side have the left singular vectors and the singular values of the dW_i side by side."""
    columns, bases = [], []
    for piece in pieces:
        basis, values, right = column_basis(piece.A.T)
        columns.append(piece.scale * (piece.B.double() @ (right.T * values)))
        bases.append(basis.T)
    return columns, bases


def _merge_cores(
    group: Group, left: Tensor, right: Tensor, inner: str, density: float
) -> LowRankUpdate:
    """U rule(U^T dW_i V) V^T, for orthonormal U (out, k) and V (in, l)."""
    if 0 in (left.shape[1], right.shape[1]):
        return zero_update(group.shape)
    cores = [
        LowRankUpdate(piece.A.double() @ right, left.T @ piece.B.double(), piece.scale)
        for piece in group.pieces
    ]
    merged = _INNER[inner](_with_pieces(group, cores), density)
    if left.shape[1] <= right.shape[1]:
        return LowRankUpdate(A=merged @ right.T, B=left, scale=1.0)
    return LowRankUpdate(A=right.T, B=left @ merged, scale=1.0)


_INNER: dict[str, Callable[[Group, float], Tensor]] = {
    LINEAR: lambda group, _: merge_blocks(group, keep_all(), add_up),
    TIES: lambda group, density: merge_blocks(group, trim(density), elect(COUNT)),
    DARE: lambda group, density: merge_blocks(group, drop(density), elect(COUNT)),
}


def _with_pieces(group: Group, pieces: list[LowRankUpdate]) -> Group:
    return Group(tuple(pieces), group.weights, group.keys)
