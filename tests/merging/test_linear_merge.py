from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.low_rank import SCALES, SEEDS, Matrix, dense, dense_all, random_piece

from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.merging.linear import average, linear

SHAPES = {"m.a": (5, 4), "m.b": (3, 6), "m.c": (2, 2)}
WEIGHTS = st.floats(-3.0, 3.0)
Weighted = list[tuple[ModelUpdate, float]]


@st.composite
def updates(draw: st.DrawFn) -> ModelUpdate:
    """Updates of some of the modules, in any order, each of its own rank and scale."""
    names = draw(st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, unique=True))
    return {
        name: random_piece(draw(SEEDS), draw(st.integers(1, 7)), SHAPES[name], draw(SCALES))
        for name in names
    }


def weighted(weights: st.SearchStrategy[float] = WEIGHTS) -> st.SearchStrategy[Weighted]:
    return st.lists(st.tuples(updates(), weights), min_size=1, max_size=4)


def total(pool: Sequence[ModelUpdate], weights: Sequence[float]) -> Mapping[str, Matrix]:
    """The weighted sum as plain matrices; a module that is not there is zero."""
    return {
        name: sum(
            (w * dense(u[name]) for u, w in zip(pool, weights, strict=True) if name in u),
            np.zeros(SHAPES[name]),
        )
        for name in {name for update in pool for name in update}
    }


def assert_same(found: Mapping[str, Matrix], expected: Mapping[str, Matrix]) -> None:
    assert found.keys() == expected.keys()
    for name, matrix in expected.items():
        np.testing.assert_allclose(found[name], matrix, rtol=1e-9, atol=1e-10, err_msg=name)


def split(several: Weighted) -> tuple[list[ModelUpdate], list[float]]:
    return [update for update, _ in several], [weight for _, weight in several]


@given(weighted())
def test_linear_is_the_weighted_sum(several: Weighted) -> None:
    pool, weights = split(several)
    merged = linear(pool, weights)
    assert_same(dense_all(merged), total(pool, weights))
    assert list(merged) == sorted(merged)
    for name, piece in merged.items():
        assert piece.rank == sum(update[name].rank for update in pool if name in update)
        assert piece.shape == SHAPES[name]
        assert piece.A.dtype == piece.B.dtype == torch.float64


@given(weighted(st.floats(0.1, 3.0)), st.booleans())
def test_average_is_the_weighted_mean_over_all_updates(several: Weighted, negative: bool) -> None:
    pool, weights = split(several)
    if negative:
        pool, weights = [*pool, pool[0]], [*weights, -sum(weights) / 2]
    shares = [weight / sum(weights) for weight in weights]
    assert_same(dense_all(average(pool, weights)), total(pool, shares))


@given(weighted(st.floats(0.1, 3.0)), st.floats(0.01, 100.0))
def test_only_the_ratios_of_weights_count_in_an_average(several: Weighted, factor: float) -> None:
    pool, weights = split(several)
    larger = average(pool, [weight * factor for weight in weights])
    assert_same(dense_all(average(pool, weights)), dense_all(larger))


@pytest.mark.parametrize("rule", [linear, average])
@given(several=weighted(st.floats(0.1, 3.0)), data=st.data())
def test_the_order_of_the_updates_does_not_matter(
    rule: "type[linear]", several: Weighted, data: st.DataObject
) -> None:
    other = data.draw(st.permutations(several))
    assert_same(dense_all(rule(*split(several))), dense_all(rule(*split(other))))


@given(updates(), st.lists(st.floats(0.1, 3.0), min_size=1, max_size=4))
def test_the_average_of_one_update_with_itself_is_that_update(
    update: ModelUpdate, weights: list[float]
) -> None:
    assert_same(dense_all(average([update] * len(weights), weights)), dense_all(update))


@given(st.lists(st.tuples(updates(), st.tuples(WEIGHTS, WEIGHTS)), min_size=1, max_size=4), WEIGHTS)
def test_the_sum_is_linear_in_the_weights(
    several: list[tuple[ModelUpdate, tuple[float, float]]], factor: float
) -> None:
    pool = [update for update, _ in several]
    ones, others = ([pair[side] for _, pair in several] for side in (0, 1))
    both = linear(pool, [factor * one + other for one, other in zip(ones, others, strict=True)])
    parts = [linear(pool, ones), linear(pool, others)]
    assert_same(dense_all(both), total(parts, [factor, 1.0]))


@given(weighted(), weighted())
def test_a_sum_of_sums_is_the_sum_of_all(some: Weighted, more: Weighted) -> None:
    nested = linear([linear(*split(some)), linear(*split(more))], [1.0, 1.0])
    assert_same(dense_all(nested), dense_all(linear(*split(some + more))))


def test_an_update_taken_from_itself_leaves_nothing() -> None:
    update = {"m.a": random_piece(0, 3, SHAPES["m.a"], 0.7)}
    assert not dense(linear([update, update], [1.0, -1.0])["m.a"]).round(12).any()


def test_sums_are_kept_in_float64() -> None:
    # In float32 the second update would vanish beside the first.
    one = torch.ones(1, 1)
    large, small = LowRankUpdate(one, one, 1e8), LowRankUpdate(one, one, 1.0)
    merged = linear([{"m": large}, {"m": small}, {"m": large}], [1.0, 1.0, -1.0])
    assert dense(merged["m"]).item() == 1.0


@pytest.mark.parametrize("rule", [linear, average])
def test_there_is_one_weight_for_each_update(rule: "type[linear]") -> None:
    update = {"m.a": random_piece(0, 3, SHAPES["m.a"])}
    with pytest.raises(ValueError, match="zip"):
        rule([update, update], [1.0])
