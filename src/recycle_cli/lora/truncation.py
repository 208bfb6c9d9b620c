"""Lower the rank of an update, and say how much of it is left.

The best rank-r approximation of dW = s B A (Eckart and Young 1936) is found without forming dW:
B = Q_B R_B and A^T = Q_A R_A, and the SVD of the small core s R_B R_A^T (rank x rank) gives the
singular values of dW. All of it is float64, which costs little here and makes it exact.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_cli.errors import InputError
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate

NUMBER = re.compile(r"0*[1-9][0-9]{0,8}")
ENERGY = re.compile(r"energy:([0-9.]+)")


@dataclass(frozen=True)
class RankPolicy:
    """How many singular directions of each module to keep.

    Args:
        text: as the user wrote it: `full`, a number, or `energy:0.99`.
        count: given the singular values in falling order, how many to keep; None for `full`.
    """

    text: str
    count: Callable[[Tensor], int] | None


@dataclass(frozen=True)
class Truncated:
    """A truncated update and the share of the squared norm that it kept, in [0, 1]."""

    update: ModelUpdate
    energy_kept: float


def parse_rank_policy(text: str) -> RankPolicy:
    """Reads `full`, `N` (at most N in every module) or `energy:E` (the fewest directions that
    hold the share E of a module's squared Frobenius norm, 0 < E <= 1).

    Raises:
        InputError: it is none of these.
    """
    if text == "full":
        return RankPolicy(text, None)
    if NUMBER.fullmatch(text):
        return RankPolicy(text, lambda values: min(int(text), len(values)))
    match = ENERGY.fullmatch(text)
    share = _number(match[1]) if match else None
    if share is not None and 0 < share <= 1:
        return RankPolicy(text, lambda values: count_for_energy(values, share))
    raise InputError(
        f"--rank is {text!r}", "use full, a whole number from 1, or energy:E with 0 < E <= 1"
    )


def count_for_energy(values: Tensor, share: float) -> int:
    """The fewest leading singular values whose squares sum to `share` of the whole; at least 1."""
    squares = values.double().square().cumsum(0)
    # Rounding may leave the last partial sum a little below the whole.
    wanted = share * squares[-1] * (1 - 1e-12)
    return min(int((squares < wanted).sum()) + 1, len(values))


def truncate(update: ModelUpdate, policy: RankPolicy) -> Truncated:
    """Lowers the rank of every module by the policy. Singular values are shared evenly by the
    two factors."""
    if policy.count is None:
        return Truncated(update, 1.0)
    kept, whole, pieces = 0.0, 0.0, {}
    for module, piece in update.items():
        left, values, right = decompose(piece)
        count = policy.count(values)
        root = values[:count].sqrt()
        pieces[module] = LowRankUpdate(
            A=root[:, None] * right[:count], B=left[:, :count] * root, scale=1.0
        )
        kept += float(values[:count].square().sum())
        whole += float(values.square().sum())
    return Truncated(pieces, kept / whole if whole > 0 else 1.0)


def decompose(update: LowRankUpdate) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of dW, in float64.

    Returns:
        U (out, k), singular values (k,) in falling order, V^T (k, in), with
        k = min(rank, out, in).
    """
    a, b = update.A.double(), update.B.double() * update.scale
    if 2 * update.rank > min(update.shape):
        # Past half the smaller side the two QRs cost more than one SVD of the product itself.
        left, values, right = torch.linalg.svd(b @ a, full_matrices=False)
        k = min(update.rank, *update.shape)
        return left[:, :k], values[:k], right[:k]
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T)
    return q_b @ left, values, right @ q_a.T


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
