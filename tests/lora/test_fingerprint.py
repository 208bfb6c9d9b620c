import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.low_rank import SEEDS, Matrix, dense, pieces, random_piece, refactored

from recycle_cli.lora.draws import generator_for
from recycle_cli.lora.fingerprint import SEED, SIZE, project
from recycle_cli.lora.norm import inner_product, squared_norm
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate


def vectors(side: str, dimension: int) -> Matrix:
    """As the documentation says that they are drawn."""
    drawn = [
        torch.randn(
            dimension,
            generator=generator_for("recycle.fingerprint/1", side, dimension, j),
            dtype=torch.float64,
        )
        for j in range(8)
    ]
    return torch.stack(drawn).numpy()


@given(st.lists(pieces(), min_size=1, max_size=4))
def test_the_numbers_are_those_of_the_dense_update(several: list[LowRankUpdate]) -> None:
    update = {f"m.{9 - number}": piece for number, piece in enumerate(several)}
    projections = project(update)
    assert list(projections) == sorted(update)
    for module, numbers in projections.items():
        matrix = dense(update[module])
        u, v = vectors("out", matrix.shape[0]), vectors("in", matrix.shape[1])
        expected = np.einsum("jo,oi,ji->j", u, matrix, v)
        size = np.abs(u) @ np.abs(matrix) @ np.abs(v).T
        assert len(numbers) == SIZE
        np.testing.assert_allclose(numbers, expected, rtol=1e-10, atol=1e-12 * size.max())


@given(pieces(), SEEDS)
def test_the_numbers_do_not_depend_on_the_factors(piece: LowRankUpdate, seed: int) -> None:
    one, other = project({"m": piece})["m"], project({"m": refactored(piece, seed)})["m"]
    size = piece.scale * float(piece.B.abs().double().sum() * piece.A.abs().double().sum())
    np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9 * abs(size))


def test_the_seed_is_the_one_that_is_told() -> None:
    assert SEED == "recycle.fingerprint/1"
    assert SEED in (project.__doc__ or "")


def many_modules(seed: int, count: int, differ: bool) -> dict[str, LowRankUpdate]:
    """Modules of different shapes, so that every one has vectors of its own, or of the same."""
    return {
        f"m.{n}": random_piece(seed + n, 3, (5 + n, 300 - n) if differ else (60, 80))
        for n in range(count)
    }


def products(one: ModelUpdate, other: ModelUpdate) -> float:
    x, y = project(one), project(other)
    return sum(float(np.mean(np.multiply(x[module], y[module]))) for module in x)


@pytest.mark.parametrize("differ", [True, False])
def test_products_estimate_inner_products(differ: bool) -> None:
    one = many_modules(0, 200, differ)
    noise = many_modules(1000, 200, differ)
    other = {
        module: LowRankUpdate(
            torch.cat([piece.A, 0.5 * noise[module].A]),
            torch.cat([piece.B, noise[module].B], dim=1),
            1.0,
        )
        for module, piece in one.items()
    }
    square = sum(map(squared_norm, one.values()))
    assert products(one, one) == pytest.approx(square, rel=0.2)
    exact = sum(inner_product(one[module], other[module]) for module in one)
    assert products(one, other) == pytest.approx(exact, rel=0.2)
    size = math.sqrt(square * sum(map(squared_norm, other.values())))
    estimated = math.sqrt(products(one, one) * products(other, other))
    cosine = exact / size
    error = 4 * (1 - cosine**2) / math.sqrt(8 * len(one))
    assert products(one, other) / estimated == pytest.approx(cosine, abs=error)
    assert abs(products(one, noise)) < 0.1 * size


def test_scaling_scales_them() -> None:
    piece = random_piece(0, 2, (4, 3))
    doubled = project({"m": replace(piece, scale=2.0)})["m"]
    assert doubled == pytest.approx([2 * number for number in project({"m": piece})["m"]])


def test_modules_are_read_one_at_a_time() -> None:
    asked: list[str] = []

    class Watched(dict[str, LowRankUpdate]):
        def __getitem__(self, module: str) -> LowRankUpdate:
            asked.append(module)
            return super().__getitem__(module)

    project(Watched(b=random_piece(0, 2, (4, 3)), a=random_piece(1, 2, (4, 3))))
    assert asked == ["a", "b"]
