from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.low_rank import SCALES, SEEDS, Matrix, dense, random_piece
from support.merging import group_of

from recycle_cli.errors import InputError
from recycle_cli.lora.update import LowRankUpdate, zero_update
from recycle_cli.merging.linear import average, linear, weighted_sum

WEIGHTS = st.floats(-3.0, 3.0)
SHAPE = (5, 4)
Weighted = list[tuple[LowRankUpdate, float]]


@st.composite
def updates(draw: st.DrawFn) -> LowRankUpdate:
    """Updates of one shape, each of its own rank and scale."""
    return random_piece(draw(SEEDS), draw(st.integers(1, 7)), SHAPE, draw(SCALES))


def weighted(weights: st.SearchStrategy[float] = WEIGHTS) -> st.SearchStrategy[Weighted]:
    return st.lists(st.tuples(updates(), weights), min_size=1, max_size=4)


def split(several: Weighted) -> tuple[list[LowRankUpdate], list[float]]:
    return [update for update, _ in several], [weight for _, weight in several]


def total(pool: Sequence[LowRankUpdate], weights: Sequence[float]) -> Matrix:
    return np.sum([w * dense(piece) for piece, w in zip(pool, weights, strict=True)], axis=0)


def assert_same(found: LowRankUpdate, expected: Matrix) -> None:
    np.testing.assert_allclose(dense(found), expected, rtol=1e-9, atol=1e-10)


@given(weighted())
def test_linear_is_the_weighted_sum(several: Weighted) -> None:
    pool, weights = split(several)
    merged = linear(group_of(pool, weights))
    assert_same(merged, total(pool, weights))
    assert merged.rank == sum(piece.rank for piece in pool)
    assert merged.shape == SHAPE
    assert merged.A.dtype == merged.B.dtype == torch.float64


@given(weighted(st.floats(0.1, 3.0)), st.booleans())
def test_average_is_the_weighted_mean(several: Weighted, negative: bool) -> None:
    pool, weights = split(several)
    if negative:
        pool, weights = [*pool, pool[0]], [*weights, -sum(weights) / 2]
    shares = [weight / sum(weights) for weight in weights]
    assert_same(average(group_of(pool, weights)), total(pool, shares))


@given(weighted(st.floats(0.1, 3.0)), st.floats(0.01, 100.0))
def test_only_the_ratios_of_weights_count_in_an_average(several: Weighted, factor: float) -> None:
    pool, weights = split(several)
    larger = average(group_of(pool, [weight * factor for weight in weights]))
    assert_same(larger, dense(average(group_of(pool, weights))))


@given(updates(), st.lists(st.floats(0.1, 3.0), min_size=1, max_size=4))
def test_the_average_of_one_update_with_itself_is_that_update(
    update: LowRankUpdate, weights: list[float]
) -> None:
    assert_same(average(group_of([update] * len(weights), weights)), dense(update))


@given(st.lists(st.tuples(updates(), st.tuples(WEIGHTS, WEIGHTS)), min_size=1, max_size=4), WEIGHTS)
def test_the_sum_is_linear_in_the_weights(
    several: list[tuple[LowRankUpdate, tuple[float, float]]], factor: float
) -> None:
    pool = [update for update, _ in several]
    ones, others = ([pair[side] for _, pair in several] for side in (0, 1))
    both = [factor * one + other for one, other in zip(ones, others, strict=True)]
    parts = [weighted_sum(pool, ones), weighted_sum(pool, others)]
    assert_same(weighted_sum(pool, both), total(parts, [factor, 1.0]))


@given(weighted(), weighted())
def test_a_sum_of_sums_is_the_sum_of_all(some: Weighted, more: Weighted) -> None:
    nested = weighted_sum([weighted_sum(*split(some)), weighted_sum(*split(more))], [1.0, 1.0])
    assert_same(nested, dense(weighted_sum(*split(some + more))))


def test_an_update_taken_from_itself_leaves_nothing() -> None:
    piece = random_piece(0, 3, SHAPE, 0.7)
    assert not dense(weighted_sum([piece, piece], [1.0, -1.0])).round(12).any()


def test_updates_of_rank_0_add_nothing() -> None:
    piece = random_piece(0, 3, SHAPE, 0.7)
    merged = weighted_sum([zero_update(SHAPE), piece, zero_update(SHAPE)], [1.0, 2.0, 3.0])
    assert merged.rank == 3
    assert_same(merged, 2 * dense(piece))
    assert weighted_sum([zero_update(SHAPE)], [1.0]).rank == 0


def test_sums_are_kept_in_float64() -> None:
    # In float32 the second update would vanish beside the first.
    one = torch.ones(1, 1)
    large, small = LowRankUpdate(one, one, 1e8), LowRankUpdate(one, one, 1.0)
    assert dense(weighted_sum([large, small, large], [1.0, 1.0, -1.0])).item() == 1.0


def test_weights_are_not_rounded_to_float32() -> None:
    piece = random_piece(0, 3, SHAPE, 1 / 3)
    merged = weighted_sum([piece, replace(piece, scale=-1 / 3 * (1 + 1e-12))], [1.0, 1.0])
    size = np.linalg.norm(dense(merged)) / np.linalg.norm(dense(piece))
    assert size == pytest.approx(1e-12, rel=1e-3)


def test_there_is_one_weight_for_each_update() -> None:
    piece = random_piece(0, 3, SHAPE)
    with pytest.raises(ValueError, match="zip"):
        weighted_sum([piece, piece], [1.0])


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.5, -1.5], "the weights 1.5, -1.5 sum to 0"),
        ([0.0, 0.0], "the weights 0, 0 sum to 0"),
        # 5.6e-17 in floats.
        ([0.1, 0.2, -0.3], "the weights 0.1, 0.2, -0.3 sum to 0"),
    ],
)
def test_weights_that_sum_to_zero_have_no_average(weights: list[float], said: str) -> None:
    with pytest.raises(InputError) as caught:
        average(group_of([random_piece(0, 3, SHAPE)] * len(weights), weights))
    assert said in caught.value.message
    assert "--method linear" in caught.value.hint


def test_small_weights_are_not_taken_for_zero() -> None:
    piece = random_piece(0, 3, SHAPE)
    assert_same(average(group_of([piece, piece], [1e-200, 3e-200])), dense(piece))
