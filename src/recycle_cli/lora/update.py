"""The low-rank update of one linear module, and of a whole model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


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

    def to(self, dtype: torch.dtype) -> "LowRankUpdate":
        """The same update with factors of another dtype."""
        return LowRankUpdate(self.A.to(dtype), self.B.to(dtype), self.scale)


ModelUpdate = Mapping[str, LowRankUpdate]
"""An update of several modules, keyed by module path in the base model, as in
`model.layers.0.self_attn.q_proj`. A module that is not a key is left as it is."""


def largest_rank(update: ModelUpdate) -> int:
    """The largest inner dimension among the modules."""
    return max(module.rank for module in update.values())
