"""Averages of factors, as federated learning takes them, and what they leave out.

The mean of the factors is not the mean of the products: (sum_i w_i B_i)(sum_i w_i A_i) has cross
terms. FedIT (arXiv 2305.05644) lives with them; FedEx-LoRA (arXiv 2410.09432) keeps the difference
beside, exactly. Scales s_i stand in the B_i, so that adapters of other scales can take part.
"""

import torch
from torch import Tensor

from recycle_cli.errors import InputError
from recycle_cli.lora.update import LowRankUpdate
from recycle_cli.merging.group import Group


def factor_average(group: Group) -> LowRankUpdate:
    """(sum_i w_i s_i B_i)(sum_i w_i A_i) / (sum_i w_i)^2, of the adapters' own rank.

    Raises:
        InputError: the ranks differ.
    """
    lefts, rights = _factors(group)
    return LowRankUpdate(_mean(rights, group.shares), _mean(lefts, group.shares), 1.0)


def residual(group: Group) -> LowRankUpdate:
    """What `factor_average` lacks to the exact weighted mean of the updates, of rank (n - 1) r.

    With weights that sum to 1 it is sum_i w_i (s_i B_i - B_mean)(A_i - A_mean). The differences
    of the B_i sum to zero under the weights, so the last one is put in terms of the others, which
    leaves sum_(i < n) w_i (s_i B_i - B_mean)(A_i - A_n).

    Raises:
        InputError: the ranks differ.
    """
    lefts, rights = _factors(group)
    mean = _mean(lefts, group.shares)
    if len(lefts) == 1:
        return LowRankUpdate(torch.zeros_like(rights[0][:1]), torch.zeros_like(mean[:, :1]), 1.0)
    shared = list(zip(lefts, rights, group.shares, strict=True))[:-1]
    return LowRankUpdate(
        A=torch.cat([right - rights[-1] for _, right, _ in shared]),
        B=torch.cat([share * (left - mean) for left, _, share in shared], dim=1),
        scale=1.0,
    )


def _factors(group: Group) -> tuple[list[Tensor], list[Tensor]]:
    """The s_i B_i and the A_i in float64; zeros for an adapter that lacks the module."""
    ranks = sorted({piece.rank for piece in group.pieces if piece.rank > 0})
    if len(ranks) > 1:
        raise InputError(
            f"factors of different ranks ({', '.join(map(str, ranks))}) have no average",
            "use --method average, which is exact for any ranks",
        )
    pieces = [piece if piece.rank else piece.padded(ranks[0]) for piece in group.pieces]
    return [p.B.double() * p.scale for p in pieces], [p.A.double() for p in pieces]


def _mean(factors: list[Tensor], shares: list[float]) -> Tensor:
    return torch.stack([share * f for share, f in zip(shares, factors, strict=True)]).sum(0)
