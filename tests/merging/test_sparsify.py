"""Which entries the sparsifiers keep, and what they make of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.low_rank import SEEDS, Matrix, dense, pieces, random_piece
from torch import Tensor

from recycle_cli.lora.update import LowRankUpdate, row_blocks
from recycle_cli.merging.sparsify import (
    Sparsifier,
    band,
    drop,
    drop_by_rank,
    keep_all,
    largest_at,
    magnitudes_at,
    trim,
)

BLOCKS = random_piece(5, 3, (700, 600))
DENSITIES = st.floats(0.01, 1.0)


def sparse(sparsify: Sparsifier, piece: LowRankUpdate, seed: int = 0) -> Matrix:
    """All rows, filtered block by block."""
    keep = sparsify(piece, torch.Generator().manual_seed(seed))
    blocks = [keep(piece.rows(rows)) for rows in row_blocks(piece.shape)]
    return torch.cat(blocks).double().numpy()


def whole(entries: Tensor) -> LowRankUpdate:
    """An update with these entries."""
    return LowRankUpdate(torch.eye(entries.shape[1], dtype=entries.dtype), entries, 1.0)


def order(matrix: Matrix) -> Matrix:
    """Each entry's place among the magnitudes, from 0 for the largest."""
    places = np.argsort(np.argsort(-np.abs(matrix), axis=None))
    return places.reshape(matrix.shape)


@given(st.integers(1, 200), st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_the_largest_are_found(count: int, data: st.DataObject, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    # Of 60 values, so that some are equal.
    values = torch.randint(60, (count,), generator=generator).to(dtype)
    places = data.draw(st.lists(st.integers(1, count), min_size=1, max_size=4))
    falling = values.sort(descending=True).values
    found = largest_at(values.clone(), places)
    assert found == [float(falling[place - 1]) for place in places]
    assert found == [float(values.topk(place).values[-1]) for place in places]


@given(pieces(), st.data())
def test_the_magnitudes_of_an_update_are_found(piece: LowRankUpdate, data: st.DataObject) -> None:
    exact = piece.to(torch.float64)
    before = exact.A.clone(), exact.B.clone()
    entries = piece.shape[0] * piece.shape[1]
    place = data.draw(st.integers(1, entries))
    expected = np.sort(np.abs(dense(piece)), axis=None)[entries - place]
    assert magnitudes_at(exact, [place]) == [pytest.approx(expected, rel=1e-9, abs=1e-14)]
    assert torch.equal(exact.A, before[0])
    assert torch.equal(exact.B, before[1])


@given(pieces(), DENSITIES)
def test_trim_keeps_the_largest_and_just_as_many(piece: LowRankUpdate, density: float) -> None:
    exact = piece.to(torch.float64)
    entries = exact.dense().numpy()
    found = sparse(trim(density), exact)
    kept = max(1, int(density * entries.size))
    assert np.count_nonzero(found) == kept
    np.testing.assert_allclose(found, np.where(order(entries) < kept, entries, 0), rtol=1e-12)


def test_trim_of_several_blocks() -> None:
    entries = sparse(keep_all(), BLOCKS)
    found = sparse(trim(0.3), BLOCKS)
    # Some magnitudes are equal in float32.
    assert np.count_nonzero(found) == pytest.approx(0.3 * entries.size, abs=5)
    kept = found != 0
    np.testing.assert_array_equal(found[kept], entries[kept])
    assert np.abs(entries[~kept]).max() < np.abs(entries[kept]).min()


def test_entries_as_large_as_the_smallest_one_kept_stay() -> None:
    piece = whole(torch.tensor([[3.0, -2.0, 2.0], [2.0, 1.0, -1.0]]))
    assert sparse(trim(0.4), piece).tolist() == [[3, -2, 2], [2, 0, 0]]
    assert sparse(trim(0.01), piece).tolist() == [[3, 0, 0], [0, 0, 0]]


@given(pieces(), DENSITIES, st.floats(0.0, 1.0))
def test_a_band_leaves_out_the_largest_and_keeps_those_that_come_next(
    piece: LowRankUpdate, density: float, gamma: float
) -> None:
    exact = piece.to(torch.float64)
    entries = exact.dense().numpy()
    found = sparse(band(density, gamma), exact)
    kept = max(1, int(density * entries.size))
    top = min(int(gamma * entries.size), entries.size - kept)
    assert np.count_nonzero(found) == kept
    place = order(entries)
    inside = (place >= top) & (place < top + kept)
    np.testing.assert_allclose(found, np.where(inside, entries, 0), rtol=1e-12)


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [
        (0.3, 0.0, [10, 9, 8]),
        (0.3, 0.2, [8, 7, 6]),
        (0.3, 0.7, [3, 2, 1]),
        (0.3, 1.0, [3, 2, 1]),
        (0.8, 0.5, [8, 7, 6, 5, 4, 3, 2, 1]),
        (0.01, 0.5, [5]),
        (1.0, 0.5, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
    ],
)
def test_what_a_band_keeps_of_ten(density: float, gamma: float, kept: list[int]) -> None:
    ten = torch.tensor([[-1.0, 10, 3, -8, 5], [6, -7, 4, 9, -2]])
    found = sparse(band(density, gamma), whole(ten))
    assert sorted(np.abs(found[found != 0]).tolist(), reverse=True) == kept
    assert ((found == 0) | (found == ten.numpy())).all()


@given(pieces())
def test_a_density_of_1_keeps_all(piece: LowRankUpdate) -> None:
    entries = sparse(keep_all(), piece)
    for sparsify in (trim(1.0), band(1.0, 0.3), drop(1.0), drop_by_rank(1.0, 0.1)):
        np.testing.assert_array_equal(sparse(sparsify, piece), entries)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_what_is_dropped_at_random_leaves_the_expectation(density: float) -> None:
    piece = whole(torch.full((700, 600), 2.0, dtype=torch.float64))
    found = sparse(drop(density), piece)
    assert set(np.unique(found)) == {0.0, 2.0 / density}
    deviation = ((1 - density) / density / found.size) ** 0.5
    assert found.mean() / 2 == pytest.approx(1, abs=4 * deviation)
    # Rows and columns alike.
    for axis, count in ((0, 700), (1, 600)):
        spread = (found.mean(axis) / 2).std()
        assert spread == pytest.approx(((1 - density) / density / count) ** 0.5, rel=0.15)


@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.1), (0.3, 0.29), (0.5, 0.0)])
def test_the_larger_an_entry_in_its_row_the_likelier_it_stays(
    density: float, epsilon: float
) -> None:
    magnitudes = torch.tensor([[3.0, -1.0, 4.0, 2.0, -5.0]], dtype=torch.float64)
    # Rows of other sizes: only the place within the row counts.
    sizes = torch.logspace(-3, 3, 20000, dtype=torch.float64)[:, None]
    found = sparse(drop_by_rank(density, epsilon), whole(magnitudes * sizes))
    probability = density - epsilon + 2 * epsilon * np.array([2, 0, 3, 1, 4]) / 4
    kept = found != 0
    deviation = np.sqrt(probability * (1 - probability) / len(found))
    assert (np.abs(kept.mean(0) - probability) < 4 * deviation).all()
    expected = (magnitudes * sizes).numpy() / probability
    np.testing.assert_allclose(found, np.where(kept, expected, 0), rtol=1e-12)


def test_a_row_of_one_entry_has_the_lowest_probability() -> None:
    found = sparse(drop_by_rank(0.5, 0.25), whole(torch.ones(20000, 1)))
    assert set(np.unique(found)) == {0.0, 4.0}
    assert (found != 0).mean() == pytest.approx(0.25, abs=0.013)


@pytest.mark.parametrize("sparsify", [drop(0.4), drop_by_rank(0.4, 0.2)])
def test_blocks_of_rows_draw_what_the_whole_draws(sparsify: Sparsifier) -> None:
    assert len(list(row_blocks(BLOCKS.shape))) > 1
    generator = torch.Generator().manual_seed(7)
    everything = sparsify(BLOCKS, generator)(BLOCKS.dense()).double().numpy()
    found = sparse(sparsify, BLOCKS, seed=7)
    assert ((found != 0) == (everything != 0)).all()
    assert ((found != 0) != (sparse(sparsify, BLOCKS, seed=8) != 0)).any()
