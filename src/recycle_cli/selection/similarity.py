"""How like an adapter is to another, by their updates dW (arXiv 2602.12323 and its released code).

Each measure is made of three sums in every module, <c, t>, <c, c> and <t, t>, of a product that the
measure defines; a module that an adapter lacks counts as zero. `macro` adds the sums up over the
modules before it divides, `micro` takes the mean of the modules' quotients.

cosine, clamp-pm and l2 need the products of factors alone, O(r^2 (in + out)) a module. clamp, abs
and quasi-fim look at every entry of dW, which is made a block of rows at a time and never whole.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from recycle_cli.lora.norm import inner_product, squared_norm
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate, row_blocks

Aggregate = Literal["macro", "micro"]
EPSILON = 1e-6
"""Beside the product of the norms, as the authors have it."""


@dataclass(frozen=True)
class Sums:
    """The sums of one module: of candidate with target, of either with itself."""

    both: float
    candidate: float
    target: float


class Target:
    """The adapter to be close to, with what every candidate needs of it.

    Args:
        update: its update; its factors are held in float64.
    """

    def __init__(self, update: ModelUpdate) -> None:
        self.update = {module: Piece(update[module]) for module in update}


class Piece:
    """One module's update, its factors in float64, and its squared norm, taken once."""

    def __init__(self, update: LowRankUpdate) -> None:
        self.update = update.to(torch.float64)

    @cached_property
    def squared_norm(self) -> float:
        """||dW||_F^2."""
        return squared_norm(self.update)


def similarity(
    candidate: ModelUpdate, target: Target, method: str, aggregate: Aggregate = "macro"
) -> float:
    """A score of a candidate, higher for closer.

    Args:
        candidate: the adapter to score; its modules are taken one at a time.
        target: the adapter to be close to.
        method: a key of MEASURES, or `l2`.
        aggregate: how modules are put together; `l2` is a sum over them in any case.
    """
    modules = sorted({*candidate, *target.update})
    measure = gram if method == "l2" else MEASURES[method]
    sums = []
    for module in modules:
        own = Piece(candidate[module]) if module in candidate else None
        sums.append(measure(own, target.update.get(module)))
    if method == "l2":
        return -math.log1p(sum(one.candidate + one.target - 2 * one.both for one in sums))
    score = _macro(sums) if aggregate == "macro" else _micro(sums)
    return math.sqrt(score) if method == "quasi-fim" else score


def _macro(sums: Sequence[Sums]) -> float:
    whole = Sums(
        math.fsum(one.both for one in sums),
        math.fsum(one.candidate for one in sums),
        math.fsum(one.target for one in sums),
    )
    return _quotient(whole)


def _micro(sums: Sequence[Sums]) -> float:
    return math.fsum(map(_quotient, sums)) / len(sums)


def _quotient(sums: Sums) -> float:
    return sums.both / math.sqrt(sums.candidate * sums.target + EPSILON)


Measure = Callable[[Piece | None, Piece | None], Sums]
"""The sums of one module; None for an update that lacks it. Not both are None."""


def gram(candidate: Piece | None, target: Piece | None) -> Sums:
    """The sums of the entries' products, from r x r products of the factors."""
    both = inner_product(candidate.update, target.update) if candidate and target else 0.0
    return Sums(
        both,
        candidate.squared_norm if candidate else 0.0,
        target.squared_norm if target else 0.0,
    )


def _clamp_pm(candidate: Piece | None, target: Piece | None) -> Sums:
    sums = gram(candidate, target)
    return Sums(max(0.0, sums.both), sums.candidate, sums.target)


def _entrywise(product: Callable[[Tensor, Tensor], Tensor], square: bool = False) -> Measure:
    """A measure that looks at every entry of both updates, or of their squares."""

    def measure(candidate: Piece | None, target: Piece | None) -> Sums:
        there = candidate or target
        assert there is not None
        both = own = other = 0.0
        for rows in row_blocks(there.update.shape):
            c, t = (
                None if piece is None else _block(piece.update, rows, square)
                for piece in (candidate, target)
            )
            both += 0.0 if c is None or t is None else float(product(c, t).sum())
            own += 0.0 if c is None else float(c.square().sum())
            other += 0.0 if t is None else float(t.square().sum())
        return Sums(both, own, other)

    return measure


def _block(update: LowRankUpdate, rows: slice, square: bool) -> Tensor:
    entries = update.rows(rows)
    return entries.square() if square else entries


MEASURES: Mapping[str, Measure] = {
    "cosine": gram,
    "clamp-pm": _clamp_pm,
    "clamp": _entrywise(lambda c, t: (c * t).clamp(min=0)),
    "abs": _entrywise(lambda c, t: (c * t).abs()),
    "quasi-fim": _entrywise(lambda c, t: c * t, square=True),
}
"""What each method sums up in a module, by its name."""
