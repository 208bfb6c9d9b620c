import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.low_rank import SEEDS, dense, pieces, random_piece, refactored

from recycle_cli.lora.norm import (
    fingerprint,
    inner_product,
    module_norms,
    squared_norm,
    total_norm,
)
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate, zero_update


def fingerprint_of(update: ModelUpdate) -> str:
    return fingerprint(
        {module: piece.rank for module, piece in update.items()}, module_norms(update)
    )


@given(pieces(), st.integers(-9, 9))
def test_the_squared_norm_is_that_of_the_product(piece: LowRankUpdate, power: int) -> None:
    bent = replace(piece, A=piece.A * 10.0**power)
    expected = np.linalg.norm(dense(bent)) ** 2
    # What cancels in the product does not cancel in its factors.
    size = np.linalg.norm(bent.scale * bent.B.abs().double() @ bent.A.abs().double()) ** 2
    assert squared_norm(bent) == pytest.approx(expected, rel=1e-12, abs=1e-13 * size)


@given(pieces(), SEEDS)
def test_the_squared_norm_does_not_depend_on_the_factors(piece: LowRankUpdate, seed: int) -> None:
    size = np.linalg.norm(piece.scale * piece.B.abs().double() @ piece.A.abs().double()) ** 2
    other = squared_norm(refactored(piece, seed))
    assert squared_norm(piece) == pytest.approx(other, rel=1e-9, abs=1e-12 * size)


@given(pieces(), SEEDS, st.integers(1, 9), st.sampled_from([1.0, -0.3, 7.0]))
def test_the_inner_product_is_that_of_the_products(
    piece: LowRankUpdate, seed: int, rank: int, scale: float
) -> None:
    other = random_piece(seed, rank, piece.shape, scale)
    one, two = (
        abs(p.scale) * (p.B.abs().double() @ p.A.abs().double()).numpy() for p in (piece, other)
    )
    slack = 1e-12 * float(np.sum(one * two))
    expected = float(np.sum(dense(piece) * dense(other)))
    assert inner_product(piece, other) == pytest.approx(expected, rel=1e-12, abs=slack)
    assert inner_product(other, piece) == pytest.approx(expected, rel=1e-12, abs=slack)
    size = float(np.sum(one * one))
    assert inner_product(piece, piece) == pytest.approx(
        squared_norm(piece), rel=1e-12, abs=1e-12 * size
    )


def test_the_inner_product_with_an_update_of_rank_0_is_0() -> None:
    assert inner_product(random_piece(0, 2, (4, 3)), zero_update((4, 3))) == 0.0


@given(st.lists(pieces(), min_size=1, max_size=4))
def test_the_total_is_the_norm_of_all_weights_together(several: list[LowRankUpdate]) -> None:
    update = {f"m.{9 - number}": piece for number, piece in enumerate(several)}
    norms = module_norms(update)
    assert list(norms) == sorted(update)
    everything = np.concatenate([dense(piece).ravel() for piece in several])
    assert total_norm(norms) == pytest.approx(np.linalg.norm(everything), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_factors_that_are_no_numbers_give_no_number(bad: float) -> None:
    piece = random_piece(0, 2, (4, 3))
    piece.A[1, 2] = bad
    assert not math.isfinite(squared_norm(piece))


@pytest.mark.parametrize(("scale", "factor"), [(1e160, 1e-30), (1e-170, 1e30)])
def test_a_norm_that_a_float_can_hold_is_found(scale: float, factor: float) -> None:
    one = torch.ones(1, 1)
    piece = LowRankUpdate(one * factor, one * factor, scale)
    assert squared_norm(piece) == pytest.approx((scale * factor**2) ** 2, rel=1e-5, abs=0.0)


def test_the_fingerprint_does_not_depend_on_the_order_of_the_modules() -> None:
    update = {f"m.{seed}": random_piece(seed, 2, (4, 3)) for seed in range(5)}
    backwards = dict(reversed(update.items()))
    assert fingerprint_of(update) == fingerprint_of(backwards)
    assert len(fingerprint_of(update)) == 16
    assert int(fingerprint_of(update), 16) >= 0


def test_the_fingerprint_sees_paths_ranks_and_norms() -> None:
    one, two = random_piece(0, 2, (6, 5)), random_piece(1, 3, (6, 5))
    padded = LowRankUpdate(
        torch.cat([one.A, torch.zeros(1, 5)]), torch.cat([one.B, torch.zeros(6, 1)], 1), one.scale
    )
    updates: list[ModelUpdate] = [
        {"a": one, "b": two},
        {"a": two, "b": one},
        {"a": one},
        {"a": one, "c": two},
        {"a": padded, "b": two},
        {"a": replace(one, scale=1.002), "b": two},
    ]
    assert len({fingerprint_of(update) for update in updates}) == len(updates)
