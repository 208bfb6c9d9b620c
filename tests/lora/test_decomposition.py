"""Bases, spectra and leading triplets against numpy's SVD of the matrix multiplied out."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.low_rank import Matrix, dense, pieces, random_piece, zero_piece

from recycle_cli.lora.decomposition import column_basis, leading_triplets, spectrum
from recycle_cli.lora.update import LowRankUpdate

# Tall enough for reflections, and not; of full rank, and not; and on both sides of WHOLE_SIDE.
SHAPES = [(40, 6), (9, 8), (6, 40), (1, 1), (1, 7), (7, 1)]


def of_rank(rank: int, shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A dense matrix multiplied out in that type, so that it is of that rank up to rounding."""
    return random_piece(rank, rank, shape).to(dtype).dense()


def assert_orthonormal(columns: Matrix) -> None:
    np.testing.assert_allclose(columns.T @ columns, np.eye(columns.shape[1]), atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 50])
def test_a_column_basis_spans_the_columns(shape: tuple[int, int], rank: int) -> None:
    matrix = of_rank(rank, shape)
    left, values, right = (part.numpy() for part in column_basis(matrix))
    count = min(rank, *shape)
    assert (left.shape, values.shape) == ((shape[0], count), (count,))
    assert right.shape == (count, shape[1])
    assert_orthonormal(left)
    assert_orthonormal(right.T)
    np.testing.assert_allclose(left * values @ right, matrix.numpy(), atol=1e-12 * values[0])
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)[:count]
    np.testing.assert_allclose(values, expected, atol=1e-12 * values[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_basis_of_nothing_is_empty(shape: tuple[int, int]) -> None:
    left, values, right = column_basis(torch.zeros(shape))
    assert (left.shape, values.shape, right.shape) == ((shape[0], 0), (0,), (0, shape[1]))


@pytest.mark.parametrize("rows", [40, 8])
def test_equal_columns_count_once(rows: int) -> None:
    columns = random_piece(0, 2, (rows, 1)).B.double()
    left, values, _ = column_basis(torch.cat([columns, columns, 3 * columns], dim=1))
    assert len(values) == 2
    assert left.dtype == values.dtype == torch.float64
    outside = columns - left @ (left.T @ columns)
    assert float(outside.abs().max()) < 1e-12


def test_small_directions_stay_in_a_basis() -> None:
    for rows in (40, 3):
        turn = torch.linalg.qr(random_piece(0, 3, (rows, 1)).B.double()).Q
        _, values, _ = column_basis(turn * torch.tensor([1.0, 1e-6, 1e-11]))
        np.testing.assert_allclose(values.numpy(), [1.0, 1e-6, 1e-11], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "shape"), [(1, (30, 20)), (5, (60, 80)), (20, (30, 20))])
def test_the_rank_of_a_dense_matrix_is_not_that_of_its_rounding(
    dtype: torch.dtype, rank: int, shape: tuple[int, int]
) -> None:
    matrix = of_rank(rank, shape, dtype)
    found = spectrum(matrix)
    assert found.rank == rank
    assert len(found.values) == min(shape)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(found.values.numpy(), expected, atol=1e-12 * expected[0])
    left, right = found.leading(rank)
    again = (left * found.values[:rank] @ right).numpy()
    np.testing.assert_allclose(again, matrix.numpy(), atol=1e-6 * expected[0])


@given(pieces())
def test_a_dense_matrix_and_its_factors_have_one_spectrum(piece: LowRankUpdate) -> None:
    exact = piece.to(torch.float64)
    of_factors, of_dense = spectrum(exact), spectrum(exact.dense())
    count = len(of_factors.values)
    top = float(of_dense.values[0])
    assert count == min(piece.rank, *piece.shape)
    np.testing.assert_allclose(of_factors.values, of_dense.values[:count], atol=1e-12 * top)
    assert of_factors.rank == of_dense.rank == np.linalg.matrix_rank(dense(piece))
    assert (of_dense.values[count:] <= 1e-12 * top).all()


@pytest.mark.parametrize("shape", [(20, 15), (3, 2)])
def test_nothing_has_rank_0(shape: tuple[int, int]) -> None:
    for update in (zero_piece(2, shape), torch.zeros(shape), random_piece(0, 3, shape, scale=0.0)):
        found = spectrum(update)
        assert found.rank == 0
        assert not found.values.any()
        assert [tuple(part.shape) for part in found.leading(0)] == [(shape[0], 0), (0, shape[1])]


@pytest.mark.parametrize("shape", [(20, 15), (5, 4)])
def test_the_rank_is_that_of_the_update_not_of_its_factors(shape: tuple[int, int]) -> None:
    piece = random_piece(3, 2, shape).to(torch.float64)
    assert spectrum(piece.padded(4)).rank == 2
    twice = LowRankUpdate(torch.cat([piece.A, piece.A]), torch.cat([piece.B, piece.B], 1), 1.0)
    assert spectrum(twice).rank == 2


@given(pieces(), st.integers(1, 5), st.booleans())
@example(random_piece(0, 150, (310, 320)), 5, False)
@example(random_piece(0, 150, (310, 140)), 70, True)
@example(random_piece(0, 3, (200, 140)), 3, True)
def test_leading_triplets(piece: LowRankUpdate, count: int, multiplied: bool) -> None:
    exact = piece.to(torch.float64)
    count = min(count, piece.rank, *piece.shape)
    left, values, right, energy = leading_triplets(exact.dense() if multiplied else exact, count)
    whole = np.linalg.svd(dense(piece), full_matrices=False)
    size = np.linalg.norm(whole[1])
    assert energy == pytest.approx(size**2, rel=1e-12)
    assert len(values) == count
    np.testing.assert_allclose(values, whole[1][:count], atol=1e-7 * size)
    # What counts is how near the product is, and that is as near as any of that rank.
    best = whole[0][:, :count] * whole[1][:count] @ whole[2][:count]
    found = (left * values @ right).numpy()
    errors = [np.linalg.norm(near - dense(piece)) for near in (found, best)]
    assert errors[0] == pytest.approx(errors[1], abs=1e-10 * size)


def test_triplets_that_squaring_does_not_resolve_are_left_out() -> None:
    piece = random_piece(0, 3, (200, 140)).to(torch.float64)
    for update in (piece.dense(), piece.padded(60)):
        left, values, right, _ = leading_triplets(update, 10)
        assert len(values) == left.shape[1] == len(right) == 3
    left, values, right, energy = leading_triplets(torch.zeros(9, 8), 2)
    assert (len(values), energy) == (1, 0.0)
    assert not (left * values @ right).any()
