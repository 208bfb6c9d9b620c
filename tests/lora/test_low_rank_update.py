import numpy as np
import pytest
import torch
from hypothesis import given
from support.low_rank import dense, pieces, random_piece

from recycle_cli.lora.update import LowRankUpdate, largest_rank


@given(pieces())
def test_the_dense_update_is_the_scaled_product(piece: LowRankUpdate) -> None:
    exact = piece.to(torch.float64)
    assert (exact.A.dtype, exact.B.dtype, exact.scale) == (torch.float64,) * 2 + (piece.scale,)
    np.testing.assert_allclose(exact.dense().numpy(), dense(piece), rtol=0, atol=1e-12)
    assert tuple(exact.dense().shape) == piece.shape


@pytest.mark.parametrize("ranks", [(1,), (3, 9, 2), (9, 9)])
def test_the_largest_rank(ranks: tuple[int, ...]) -> None:
    update = {f"m.{n}": random_piece(n, rank, (4, 3)) for n, rank in enumerate(ranks)}
    assert largest_rank(update) == max(ranks)
