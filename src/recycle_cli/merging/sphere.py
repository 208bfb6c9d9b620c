"""Rules that treat each update as a direction with a length. The result is a weighted sum of the
updates, so it is exact in factor space; the weights come from their inner products alone."""

import math

import torch
from torch import Tensor

from recycle_cli.errors import InputError
from recycle_cli.lora.norm import inner_product
from recycle_cli.lora.update import LowRankUpdate
from recycle_cli.merging.group import Group
from recycle_cli.merging.linear import weighted_sum

PARALLEL = 0.9995
NO_LENGTH = 1e-6
SETTLED = 1e-15
MAX_STEPS = 200
OPPOSITE = -1 + 1e-8


def slerp(group: Group) -> LowRankUpdate:
    """Spherical interpolation between two updates (Shoemake 1985).

    With t the second one's share of the weights and the angle between the updates, each is
    taken sin(share * angle) / sin(angle) times; nearly parallel ones, and those with a zero
    update, share by share. One update alone stays as it is.
    """
    shares = group.shares
    if len(group.pieces) == 1:
        return weighted_sum(group.pieces, shares)
    gram = _gram(group)
    lengths = float(gram[0, 0] * gram[1, 1]) ** 0.5
    cosine = float(gram[0, 1]) / lengths if lengths > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return weighted_sum(group.pieces, shares)
    angle = math.acos(cosine)
    return weighted_sum(
        group.pieces, [math.sin(share * angle) / math.sin(angle) for share in shares]
    )


def karcher(group: Group) -> LowRankUpdate:
    """The mean direction on the sphere (Karcher 1977; as in mergekit, arXiv 2603.04972), with
    the mean length.

    Raises:
        InputError: the directions cancel, so that there is no mean.
    """
    gram = _gram(group)
    shares = torch.tensor(group.shares, dtype=torch.float64)
    lengths = gram.diagonal().clamp(min=0).sqrt()
    there = (lengths > 0) & (shares > 0)
    if not there.any():
        return weighted_sum(group.pieces, group.shares)
    cosines = gram[there][:, there] / torch.outer(lengths[there], lengths[there])
    mean = _mean_direction(cosines, shares[there] / shares[there].sum())
    weights = torch.zeros_like(shares)
    weights[there] = mean / lengths[there] * (shares @ lengths)
    return weighted_sum(group.pieces, weights.tolist())


def _mean_direction(cosines: Tensor, shares: Tensor) -> Tensor:
    """The coefficients c of the mean direction sum_i c_i u_i of unit vectors u_i.

    Args:
        cosines: (n, n), the inner products of the u_i.
        shares: (n,), their weights, which sum to 1.
    """
    mean = _unit(shares, cosines)
    toward = cosines @ mean
    for _ in range(MAX_STEPS):
        if float(toward.min()) < OPPOSITE:
            raise _no_mean()
        angles = toward.clamp(-1, 1).acos()
        pulls = shares * torch.where(angles > 0, angles / angles.sin(), 1)
        # The tangent sum_i p_i (u_i - <u_i, mean> mean), in coefficients of the u_i.
        tangent = pulls - (pulls @ toward) * mean
        length = _length(tangent, cosines)
        step = math.sin(length) / length if length > 0 else 1.0
        mean = _unit(math.cos(length) * mean + step * tangent, cosines)
        before, toward = toward, cosines @ mean
        # Not the tangent's own length, which cancellation keeps above 1e-8.
        if float((toward - before).abs().max()) < SETTLED:
            break
    return mean


def _unit(coefficients: Tensor, cosines: Tensor) -> Tensor:
    length = _length(coefficients, cosines)
    if length < NO_LENGTH:
        raise _no_mean()
    return coefficients / length


def _no_mean() -> InputError:
    return InputError(
        "the directions of the adapters cancel, so they have no mean on the sphere",
        "use --method average, or other weights",
    )


def _length(coefficients: Tensor, cosines: Tensor) -> float:
    return math.sqrt(max(0.0, float(coefficients @ cosines @ coefficients)))


def _gram(group: Group) -> Tensor:
    """(n, n), the Frobenius inner products of the updates."""
    rows = [[inner_product(one, other) for other in group.pieces] for one in group.pieces]
    return torch.tensor(rows, dtype=torch.float64)
