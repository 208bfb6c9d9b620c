"""Sums of factors before the product: dW = (sum_i w_i s_i B_i)(sum_i w_i A_i) in every module.

That is what LoraHub's own code does (arXiv 2307.13269), cross terms between the adapters included,
where a mixture has none. The scale of an adapter goes into its B, so that a single adapter at
weight 1 is itself. Ranks that differ are filled up with zero components; an adapter that lacks a
module adds nothing there. All weights may change their sign together without any effect, and at
weights of zero nothing has a slope.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recycle_cli.engine.adapted import Forward
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.products import trained_product
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.tuning.layout import INITS, Start
from recycle_cli.tuning.tuned import Ingredients, Share, Tuned


@dataclass(frozen=True)
class Stack:
    """The factors of the adapters that have a module, filled up to one rank.

    Args:
        A: (count, rank, in).
        B: (count, out, rank), with the scales in it.
        ranks: of each adapter, before it was filled up.
        owners: (count,) int64, which of the adapters these are.
    """

    A: Tensor
    B: Tensor
    ranks: tuple[int, ...]
    owners: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the module."""
        return self.B.shape[1], self.A.shape[2]

    @functools.cached_property
    def own(self) -> tuple[Tensor, Tensor]:
        """1 where an entry is an adapter's own, 0 where it fills up: (count, rank, 1) for A and
        (count, 1, rank) for B."""
        ranks = torch.tensor(self.ranks, device=self.A.device)[:, None]
        own = (torch.arange(self.A.shape[1], device=self.A.device) < ranks).float()
        return own[:, :, None], own[:, None, :]

    def own_part(self, at: int, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What is an adapter's own of a pair of the shapes of A and B, as views (rank, in) and
        (out, rank) of its own rank."""
        a, b = pair
        return a[at, : self.ranks[at]], b[at, :, : self.ranks[at]]

    def one(self, at: int) -> tuple[Tensor, Tensor]:
        """The factors of one adapter."""
        return self.own_part(at, (self.A, self.B))


def stack(updates: Sequence[ModelUpdate], device: torch.device) -> dict[str, Stack]:
    """The factors of several adapters, by module path, in float32."""
    modules = sorted({module for update in updates for module in update})
    return {module: _stack_module(module, updates, device) for module in modules}


def _stack_module(module: str, updates: Sequence[ModelUpdate], device: torch.device) -> Stack:
    pieces = {at: update[module] for at, update in enumerate(updates) if module in update}
    ranks = tuple(piece.rank for piece in pieces.values())
    padded = [piece.padded(max(ranks)) for piece in pieces.values()]
    return Stack(
        A=torch.stack([piece.A.float() for piece in padded]).to(device),
        B=torch.stack([piece.B.float() * piece.scale for piece in padded]).to(device),
        ranks=ranks,
        owners=torch.tensor(list(pieces), device=device),
    )


class FactorSum(Tuned):
    """One weight for each adapter, before both of its factors.

    Attributes:
        weights: (adapters,) float32.
    """

    def __init__(self, ingredients: Ingredients, *, init: str, l1: float) -> None:
        super().__init__()
        self.l1 = l1
        self.stacks = stack(ingredients.updates, ingredients.device)
        self.weights = nn.Parameter(_start(ingredients, init).to(ingredients.device))

    def forwards(self, base: BaseModel, tokens: float) -> Mapping[str, Forward]:
        """See `Tuned`."""
        return {path: self._forward(piece) for path, piece in self.stacks.items()}

    def _forward(self, piece: Stack) -> Forward:
        def forward(module: nn.Linear, x: Tensor) -> Tensor:
            a, b = self._sums(piece)
            return trained_product(a, b)(module, x)

        return forward

    def _sums(self, piece: Stack) -> tuple[Tensor, Tensor]:
        """sum_i w_i A_i (rank, in) and sum_i w_i B_i (out, rank)."""
        weights = self.weights[piece.owners]
        return torch.tensordot(weights, piece.A, 1), torch.tensordot(weights, piece.B, 1)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """See `Tuned`."""
        return {path: piece.shape for path, piece in self.stacks.items()}

    def shares(self) -> list[Share]:
        """See `Tuned`."""
        return [Share(float(w), abs(float(w))) for w in self.weights.detach()]

    def penalty(self) -> Tensor | None:
        """l1 times the mean of |w|."""
        return self.l1 * self.weights.abs().mean() if self.l1 else None

    def result(self) -> ModelUpdate:
        """See `Tuned`."""
        with torch.no_grad():
            sums = {path: self._sums(piece) for path, piece in self.stacks.items()}
        return {path: LowRankUpdate(a.cpu(), b.cpu(), 1.0) for path, (a, b) in sums.items()}

    def held(self) -> list[Tensor]:
        """See `Tuned`."""
        return [*super().held(), *(t for s in self.stacks.values() for t in (s.A, s.B))]


def _start(ingredients: Ingredients, init: str) -> Tensor:
    """The weights at one of the INITS, (adapters,)."""
    count = len(ingredients.updates)
    owner = torch.arange(count)[None]
    return INITS[init](Start(owner, count, ingredients.target, ingredients.seed))[0]
