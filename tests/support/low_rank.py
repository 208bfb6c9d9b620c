"""Random low-rank updates, and what they are as plain matrices."""

from collections.abc import Mapping

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from recycle_cli.lora.update import LowRankUpdate, ModelUpdate

Matrix = NDArray[np.float64]

SEEDS = st.integers(0, 2**32 - 1)
SCALES = st.floats(0.01, 10.0) | st.floats(-10.0, -0.01)


def random_piece(
    seed: int, rank: int, shape: tuple[int, int], scale: float = 1.0, spread: float = 1.0
) -> LowRankUpdate:
    """Normal factors in float32; `shape` is (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    a = spread * torch.randn(rank, shape[1], generator=generator)
    return LowRankUpdate(a, torch.randn(shape[0], rank, generator=generator), scale)


def zero_piece(rank: int, shape: tuple[int, int]) -> LowRankUpdate:
    """What PEFT starts from: A is drawn, B is zero."""
    piece = random_piece(0, rank, shape)
    return LowRankUpdate(piece.A, torch.zeros_like(piece.B), 2.0)


def dense(piece: LowRankUpdate) -> Matrix:
    """scale * B A in float64, by numpy."""
    product: Matrix = piece.B.double().numpy() @ piece.A.double().numpy()
    return piece.scale * product


def dense_all(update: ModelUpdate) -> Mapping[str, Matrix]:
    """`dense` of every module."""
    return {module: dense(piece) for module, piece in update.items()}


def refactored(piece: LowRankUpdate, seed: int) -> LowRankUpdate:
    """The same update from other factors, (B G, G^-1 A), with a G of condition number 10."""
    rank = piece.rank
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, rank, rank, generator=generator, dtype=torch.float64)
    (one, two), stretch = torch.linalg.qr(drawn).Q, torch.logspace(-0.5, 0.5, rank).double()
    g = one * stretch @ two
    return LowRankUpdate(torch.linalg.solve(g, piece.A.double()), piece.B.double() @ g, piece.scale)


@st.composite
def pieces(draw: st.DrawFn, max_side: int = 9, max_rank: int = 11) -> LowRankUpdate:
    """Updates of any shape, wide, tall or square, of ranks below and above what it allows."""
    side = st.integers(1, max_side)
    return random_piece(
        draw(SEEDS), draw(st.integers(1, max_rank)), (draw(side), draw(side)), draw(SCALES)
    )
