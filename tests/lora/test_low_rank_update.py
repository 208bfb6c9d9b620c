import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.low_rank import dense, pieces, random_piece

from recycle_cli.lora.update import (
    BLOCK_ENTRIES,
    LowRankUpdate,
    largest_rank,
    row_blocks,
    zero_update,
)


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


@given(pieces(), st.integers(0, 10), st.integers(0, 10))
def test_some_rows_are_those_of_the_whole(piece: LowRankUpdate, start: int, stop: int) -> None:
    exact = piece.to(torch.float64)
    before = exact.B.clone()
    some = exact.rows(slice(start, stop)).numpy()
    np.testing.assert_allclose(some, dense(piece)[start:stop], rtol=0, atol=1e-12)
    assert torch.equal(exact.B, before)


@given(pieces(), st.integers(0, 5))
def test_padding_adds_components_and_changes_nothing(piece: LowRankUpdate, more: int) -> None:
    padded = piece.padded(piece.rank + more)
    assert padded.rank == piece.rank + more
    assert (padded.shape, padded.scale) == (piece.shape, piece.scale)
    assert padded.A.dtype == padded.B.dtype == piece.A.dtype
    np.testing.assert_allclose(dense(padded), dense(piece), rtol=0, atol=1e-12)
    assert torch.equal(padded.A[: piece.rank], piece.A)
    assert torch.equal(padded.B[:, : piece.rank], piece.B)


@pytest.mark.parametrize("shape", [(5, 4), (1, 9)])
def test_the_update_of_rank_0_is_zero(shape: tuple[int, int]) -> None:
    nothing = zero_update(shape)
    assert (nothing.rank, nothing.shape) == (0, shape)
    assert not nothing.dense().any()
    assert tuple(nothing.dense().shape) == shape
    assert tuple(nothing.rows(slice(1, 3)).shape) == (
        len(range(*slice(1, 3).indices(shape[0]))),
        shape[1],
    )
    assert not dense(nothing.padded(2)).any()


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (700, 600), (2, BLOCK_ENTRIES), (3, BLOCK_ENTRIES + 1), (BLOCK_ENTRIES + 1, 1)],
)
def test_blocks_of_rows_cover_the_matrix_once_and_in_order(shape: tuple[int, int]) -> None:
    rows, columns = shape
    blocks = list(row_blocks(shape))
    assert [row for block in blocks for row in range(rows)[block]] == list(range(rows))
    assert all(block.stop <= rows for block in blocks)
    for block in blocks:
        assert (block.stop - block.start) * columns <= max(BLOCK_ENTRIES, columns)
    assert len(blocks) <= 2 * rows * columns / BLOCK_ENTRIES + 1


def test_a_matrix_without_entries_has_blocks_of_none() -> None:
    assert list(row_blocks((0, 5))) == []
    assert list(row_blocks((3, 0))) == [slice(0, 3)]
