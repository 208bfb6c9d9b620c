"""LoRSum (arXiv 2602.16456): the LoRA nearest to a sum of low-rank products, without the sum.

It minimises |B' A' - sum_i c_i B_i A_i|_F^2 + lam (|A' - A|_F^2 + |B' - B|_F^2) by turns, A' first,
from the factors (A, B) of the first term. With diagonal metrics L and R, distances are measured as
|L^1/2 . R^1/2|_F, and all terms but the first are preconditioned: L^-1 B_i A_i R^-1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

JITTER = 1e-6
"""What is added to lam where rounding leaves no Cholesky factor, in units of the Gram matrix."""


@dataclass(frozen=True)
class Term:
    """c B A.

    Args:
        c: its weight.
        A: (rank, in).
        B: (out, rank).
        seen: B_1^T B A with the B_1 of the first term of a sum, (rank of B_1, in), where that is
            at hand; None where it is to be computed.
    """

    c: float
    A: Tensor
    B: Tensor
    seen: Tensor | None = None


@dataclass(frozen=True)
class Metric:
    """Diagonal metrics, above 0.

    Args:
        out: (out,), L.
        width: (in,), R.
    """

    out: Tensor
    width: Tensor


def low_rank_sum(
    terms: Sequence[Term], proximal: float, inner_steps: int, metric: Metric | None = None
) -> tuple[Tensor, Tensor]:
    """The factors of the sum, A' (rank, in) and B' (out, rank), of the first term's rank.

    Memory and time are linear in (in + out); the sum itself is never formed. It is fastest where
    the transpose of each B lies in memory row by row, as recorded gradients do.

    Args:
        terms: the first is where it starts from and stays near.
        proximal: lam, from 0.
        inner_steps: how often A' and B' are solved for in turn; 0 solves for both at once, each
            from the other's old value, which is a preconditioned gradient step.
        metric: L and R; None for the identity.
    """
    a, b = terms[0].A, terms[0].B
    if inner_steps == 0:
        return _solve_a(b, terms, proximal, metric), _solve_b(a, terms, proximal, metric)
    for _ in range(inner_steps):
        a = _solve_a(b, terms, proximal, metric)
        b = _solve_b(a, terms, proximal, metric)
    return a, b


def _solve_a(b: Tensor, terms: Sequence[Term], proximal: float, metric: Metric | None) -> Tensor:
    """A' for a given B'."""
    start, *others = terms
    weighted = b.T * metric.out if metric else b.T
    factor, held = _factored(weighted @ b, proximal)
    right = held * start.A + (start.c * weighted @ start.B) @ start.A
    for term in others:
        product = term.seen if b is start.B else None
        if product is None:
            product = (term.B.T @ b).T @ term.A
        right.add_(product / metric.width if metric else product, alpha=term.c)
    return torch.cholesky_solve(right, factor)


def _solve_b(a: Tensor, terms: Sequence[Term], proximal: float, metric: Metric | None) -> Tensor:
    """B' for a given A'."""
    start, *others = terms
    weighted = a * metric.width if metric else a
    factor, held = _factored(weighted @ a.T, proximal)
    right = held * start.B + start.B @ (start.c * start.A @ weighted.T)
    for term in others:
        product = ((term.A @ a.T).T @ term.B.T).T
        right.add_(product / metric.out[:, None] if metric else product, alpha=term.c)
    return torch.cholesky_solve(right.T, factor).T


def _factored(gram: Tensor, proximal: float) -> tuple[Tensor, float]:
    """The Cholesky factor of gram + lam I, and lam: as given, or a little more where it has to be.

    The same lam holds A' and B' at their start, so that more of it never shrinks them.
    """
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + proximal * one)
    if failed:
        proximal += JITTER * max(float(gram.diagonal().amax()), JITTER)
        factor = torch.linalg.cholesky(gram + proximal * one)
    return factor, proximal
