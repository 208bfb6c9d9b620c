"""The Frobenius norm of S^T X from its factors."""

import torch
from torch import Tensor

PROBES = 32
"""Random directions of an estimate."""


def squared_norm(x: Tensor, s: Tensor) -> Tensor:
    """|S^T X|_F^2, (), without the product.

    Up to a few times as many rows as there are probes it is exact: the sum of (X X^T) (.) (S S^T).
    Beyond, that would cost more than the backward pass; it is then estimated without bias as the
    mean of |S^T X v|^2 over random signs v. The relative error is at most sqrt(2 / probes), where
    S^T X has rank one, and falls with its rank.

    Args:
        x: (rows, in).
        s: (rows, out).
    """
    if len(x) <= 4 * PROBES:
        return ((x @ x.T) * (s @ s.T)).sum().clamp(min=0)
    # Drawn on the processor, whose random state a resumed run goes on with.
    signs = torch.randint(2, (x.shape[1], PROBES)).to(x) * 2 - 1
    return (s.T @ (x @ signs)).square().sum() / PROBES
