"""What a merge rule is given: the updates of one module, with their weights."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from recycle_cli.errors import InputError
from recycle_cli.lora.draws import generator_for
from recycle_cli.lora.update import LowRankUpdate
from recycle_cli.merging.parameters import cancel


@dataclass(frozen=True)
class Group:
    """The updates of several adapters for one module.

    Args:
        pieces: at least one, all of one shape (out, in). An adapter that leaves the module as it
            is counts with an update of rank 0.
        weights: one for each piece.
        keys: what tells the pieces' draws apart, one for each; a rule that draws takes the
            numbers for a piece from its key alone, so that neither the order of the adapters nor
            that of the modules matters.
    """

    pieces: tuple[LowRankUpdate, ...]
    weights: tuple[float, ...]
    keys: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the module."""
        return self.pieces[0].shape

    @property
    def dtype(self) -> torch.dtype:
        """Of dense results: that of the factors, the widest where they differ."""
        found = [piece.A.dtype for piece in self.pieces if piece.rank > 0]
        return functools.reduce(torch.promote_types, found) if found else torch.float32

    @property
    def shares(self) -> list[float]:
        """The weights divided by their sum.

        Raises:
            InputError: the sum is 0 up to rounding.
        """
        total = sum(self.weights)
        if cancel(self.weights):
            raise InputError(
                f"the weights {', '.join(f'{w:g}' for w in self.weights)} sum to 0, which the "
                "rule divides by",
                "use other weights, or --method linear",
            )
        return [weight / total for weight in self.weights]

    def present(self) -> "Group":
        """The same without the pieces of rank 0; at least one is left."""
        kept = [row for row in self._rows() if row[0].rank > 0] or list(self._rows())[:1]
        pieces, weights, keys = zip(*kept, strict=True)
        return Group(pieces, weights, keys)

    def generator(self, index: int) -> torch.Generator:
        """The random numbers of one piece, from their beginning."""
        return generator_for(self.keys[index])

    def _rows(self) -> Iterator[tuple[LowRankUpdate, float, str]]:
        return zip(self.pieces, self.weights, self.keys, strict=True)


MergeRule = Callable[[Group], LowRankUpdate | Tensor]
"""A rule with its parameters bound: factors, or where it works on entries a dense matrix."""
