"""The low-rank update of one linear module, and of a whole model."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK_ENTRIES = 1 << 18
"""As many numbers as a processor's cache holds."""


@dataclass(frozen=True)
class LowRankUpdate:
    """The update dW = scale * B @ A, what a LoRA adds to one weight W of shape (out, in).

    Args:
        A: (rank, in), float32 or float64.
        B: (out, rank), the dtype of A.
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The inner dimension; the rank of dW is at most this."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of dW."""
        return self.B.shape[0], self.A.shape[1]

    def dense(self) -> Tensor:
        """The update dW itself, (out, in). It costs out * in numbers."""
        return self.scale * (self.B @ self.A)

    def rows(self, rows: slice) -> Tensor:
        """Some rows of dW."""
        return (self.B[rows] * self.scale) @ self.A

    def padded(self, rank: int) -> "LowRankUpdate":
        """The same update with zero components added, up to a rank no smaller than its own."""
        more = rank - self.rank
        a = torch.cat([self.A, self.A.new_zeros(more, self.A.shape[1])])
        b = torch.cat([self.B, self.B.new_zeros(self.B.shape[0], more)], dim=1)
        return LowRankUpdate(a, b, self.scale)

    def to(self, dtype: torch.dtype) -> "LowRankUpdate":
        """The same update with factors of another dtype."""
        return LowRankUpdate(self.A.to(dtype), self.B.to(dtype), self.scale)


ModelUpdate = Mapping[str, LowRankUpdate]
"""An update of several modules, keyed by module path in the base model, as in
`model.layers.0.self_attn.q_proj`. A module that is not a key is left as it is."""


class Lazy(Mapping[str, LowRankUpdate]):
    """An update whose modules are made when they are asked for, each time anew.

    Args:
        modules: their paths.
        make: gives the update of one.
    """

    def __init__(self, modules: Collection[str], make: Callable[[str], LowRankUpdate]) -> None:
        self._modules, self._make = modules, make

    def __getitem__(self, module: str) -> LowRankUpdate:
        if module not in self._modules:
            raise KeyError(module)
        return self._make(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, module: object) -> bool:
        return module in self._modules


def zero_update(shape: tuple[int, int]) -> LowRankUpdate:
    """The update of rank 0 that an adapter has where it leaves a module of this shape as it is."""
    return LowRankUpdate(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0), 1.0)


def largest_rank(update: ModelUpdate) -> int:
    """The largest inner dimension among the modules."""
    return max(module.rank for module in update.values())


def row_blocks(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices that cover the rows of a matrix in blocks of about BLOCK_ENTRIES numbers, in order."""
    rows, columns = shape
    step = max(1, BLOCK_ENTRIES // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
