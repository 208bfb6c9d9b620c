"""Frobenius norms and inner products of updates, from their factors alone, and a fingerprint built
on them."""

import hashlib
import math
from collections.abc import Mapping

import torch

from recycle_cli.lora.update import LowRankUpdate, ModelUpdate

FINGERPRINT_DIGITS = 16


def squared_norm(update: LowRankUpdate) -> float:
    """||scale * B A||_F^2 as scale^2 * tr(A A^T B^T B), without forming B A.

    Costs O(rank^2 * (in + out)) in float64. The result is >= 0; it is NaN or infinite only when
    a factor or the scale is, or when the square leaves the range of a float.
    """
    a, b = update.A.double(), update.B.double()
    overlap = float(torch.sum((a @ a.T) * (b.T @ b)))
    if overlap <= 0.0:  # rounding may leave a tiny negative number where B A is zero
        return 0.0
    # One scale at a time: its square alone may leave the range of a float.
    return update.scale * (update.scale * overlap)


def inner_product(one: LowRankUpdate, other: LowRankUpdate) -> float:
    """<dW_1, dW_2> = s_1 s_2 tr(A_2 A_1^T B_1^T B_2), without forming either; in float64."""
    rows = one.A.double() @ other.A.double().T
    columns = one.B.double().T @ other.B.double()
    return one.scale * (other.scale * float(torch.sum(rows * columns)))


def module_norms(update: ModelUpdate) -> dict[str, float]:
    """Module path -> Frobenius norm of its update, sorted by path."""
    return {module: math.sqrt(squared_norm(piece)) for module, piece in sorted(update.items())}


def total_norm(norms: Mapping[str, float]) -> float:
    """The Frobenius norm of a whole update, from its modules' norms."""
    return math.hypot(*norms.values())


def fingerprint(ranks: Mapping[str, int], norms: Mapping[str, float]) -> str:
    """16 hex digits that adapters with the same update share, whichever factors of its
    rank it has.

    A digest of the module paths, their ranks and their norms to four significant digits. Equal
    fingerprints make two adapters suspects, not twins: a norm does not tell directions apart.

    Args:
        ranks: module path -> rank.
        norms: the `module_norms` of the same modules.
    """
    lines = [f"{module} {ranks[module]} {norm:.3e}" for module, norm in norms.items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:FINGERPRINT_DIGITS]
