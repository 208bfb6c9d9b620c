import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.low_rank import (
    SEEDS,
    Matrix,
    dense,
    dense_all,
    pieces,
    random_piece,
    refactored,
    zero_piece,
)

from recycle_cli.errors import ExitCode, InputError
from recycle_cli.lora.decomposition import decompose
from recycle_cli.lora.truncation import Truncated, count_for_energy, parse_rank_policy, truncate
from recycle_cli.lora.update import LowRankUpdate

# Twice the rank is below, at and above the smaller side, and the rank above both sides.
SMALL, HALF, LARGE, OVER = (
    random_piece(number, rank, (9, 8), scale=-1.5) for number, rank in enumerate((2, 4, 5, 12))
)


def cut(piece: LowRankUpdate, policy: str) -> tuple[LowRankUpdate, Truncated]:
    truncated = truncate({"m": piece}, parse_rank_policy(policy))
    return truncated.update["m"], truncated


def best(matrix: Matrix, count: int) -> Matrix:
    """The best approximation of that rank in the Frobenius norm, by numpy's SVD."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left[:, :count] * values[:count] @ right[:count]


def close(found: Matrix, expected: Matrix, whole: Matrix) -> bool:
    """Equal to rounding, which grows with the size of what was taken apart."""
    return bool(np.linalg.norm(found - expected) <= 1e-12 * np.linalg.norm(whole))


def of_values(*values: float) -> LowRankUpdate:
    """An update with these singular values."""
    core = torch.diag(torch.tensor(values, dtype=torch.float64))
    turn = torch.linalg.qr(random_piece(0, len(values), (8, 1)).B.double()).Q
    return LowRankUpdate(core @ turn.T, turn, 1.0)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        *(("1", 1), ("3", 3), ("4", 4), ("900", 4)),
        *(("energy:0.01", 1), ("energy:.5", 1), ("energy:0.80", 2), ("energy:1.0", 4)),
    ],
)
def test_policies_and_how_many_they_keep(text: str, kept: int) -> None:
    policy = parse_rank_policy(text)
    assert policy.text == text
    assert policy.count is not None
    assert policy.count(torch.tensor([4.0, 3.0, 2.0, 1.0])) == kept


BAD = ["", "0", "-1", "+4", "1.5", "4 ", "4\n", "Full", "full ", "\u0664", "\u00b2", "1e2", "0x4"]
BAD_ENERGY = ["", "0", "0.0", "1.01", "-0.5", "nan", "inf", "1e-3", "0.5.5", ".", "0.9\n", "\u0661"]


@pytest.mark.parametrize("text", BAD + [f"energy:{share}" for share in BAD_ENERGY])
def test_policies_that_are_none(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_rank_policy(text)
    assert repr(text) in caught.value.message
    assert "energy:E" in caught.value.hint
    assert caught.value.exit_code is ExitCode.USAGE


def test_the_option_that_took_it_is_named() -> None:
    with pytest.raises(InputError, match=r"^--export-rank is 'energy:2'"):
        parse_rank_policy("energy:2", "--export-rank")


def test_a_number_of_any_length_is_a_policy_or_refused() -> None:
    try:
        policy = parse_rank_policy("9" * 5000)
    except InputError:
        return
    assert policy.count is not None
    assert policy.count(torch.ones(3)) == 3


@given(pieces(), st.integers(1, 12))
@example(SMALL, 1)
@example(HALF, 3)
@example(LARGE, 3)
@example(OVER, 7)
def test_a_number_gives_the_best_approximation_of_that_rank(
    piece: LowRankUpdate, count: int
) -> None:
    whole = dense(piece)
    found, truncated = cut(piece, str(count))
    assert found.rank == min(count, piece.rank, *piece.shape)
    assert found.shape == piece.shape
    assert close(dense(found), best(whole, count), whole)
    # Eckart and Young: the error is the norm of the singular values left out.
    left_out = np.linalg.svd(whole, compute_uv=False)[count:]
    error = np.linalg.norm(whole - dense(found))
    assert error == pytest.approx(np.linalg.norm(left_out), abs=1e-12 * np.linalg.norm(whole))
    kept = np.linalg.norm(dense(found)) ** 2 / np.linalg.norm(whole) ** 2
    assert truncated.energy_kept == pytest.approx(kept, rel=1e-12)


@given(pieces(), st.floats(0.001, 1.0))
@example(SMALL, 1.0)
@example(OVER, 1.0)
def test_energy_keeps_the_fewest_directions_that_hold_the_share(
    piece: LowRankUpdate, share: float
) -> None:
    text = f"energy:{share:.6f}"
    found, truncated = cut(piece, text)
    squares = np.linalg.svd(dense(piece), compute_uv=False) ** 2
    wanted, slack = float(text.removeprefix("energy:")), 2e-12
    assert squares[: found.rank].sum() / squares.sum() >= wanted - slack
    assert squares[: found.rank - 1].sum() / squares.sum() < wanted + slack
    assert close(dense(found), best(dense(piece), found.rank), dense(piece))
    assert truncated.energy_kept >= wanted - slack


@pytest.mark.parametrize(
    ("share", "kept"), [(0.639, 1), (0.64, 1), (0.641, 2), (0.999, 2), (1.0, 2)]
)
def test_a_share_that_is_met_exactly_needs_no_direction_more(share: float, kept: int) -> None:
    # 16 + 9 = 25, and 16 / 25 = 0.64.
    assert count_for_energy(torch.tensor([4.0, 3.0, 0.0]), share) == kept
    assert cut(of_values(4.0, 3.0), f"energy:{share}")[0].rank == kept


def test_full_leaves_the_factors_as_they_are() -> None:
    truncated = truncate({"a": SMALL, "b": OVER}, parse_rank_policy("full"))
    assert truncated.energy_kept == 1.0
    assert (truncated.update["a"], truncated.update["b"]) == (SMALL, OVER)


@pytest.mark.parametrize("piece", [SMALL, HALF, LARGE, OVER])
@pytest.mark.parametrize("policy", ["12", "4096", "energy:1"])
def test_a_rank_that_is_enough_loses_nothing(piece: LowRankUpdate, policy: str) -> None:
    found, truncated = cut(piece, policy)
    assert found.rank == min(piece.rank, *piece.shape)
    assert close(dense(found), dense(piece), dense(piece))
    assert truncated.energy_kept == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("piece", [SMALL, HALF, LARGE, OVER])
def test_singular_values_are_shared_evenly_by_the_factors(piece: LowRankUpdate) -> None:
    found, _ = cut(piece, "3")
    values = np.diag(np.linalg.svd(dense(piece), compute_uv=False)[: found.rank])
    assert found.scale == 1.0
    for gram in (found.A @ found.A.T, found.B.T @ found.B):
        np.testing.assert_allclose(gram.numpy(), values, rtol=0, atol=1e-12 * values.max())


@given(pieces(), st.sampled_from(["1", "2", "5", "energy:0.9"]), SEEDS)
@example(SMALL, "1", 0)
def test_what_is_kept_does_not_depend_on_the_factors(
    piece: LowRankUpdate, policy: str, seed: int
) -> None:
    one, kept_of_one = cut(piece, policy)
    other, kept_of_other = cut(refactored(piece, seed), policy)
    assert one.rank == other.rank
    assert kept_of_one.energy_kept == pytest.approx(kept_of_other.energy_kept, rel=1e-9)
    np.testing.assert_allclose(
        dense(one), dense(other), rtol=0, atol=1e-9 * np.linalg.norm(dense(piece))
    )


@pytest.mark.parametrize("policy", ["full", "1", "3", "energy:0.5", "energy:1"])
@pytest.mark.parametrize("shape", [(9, 8), (3, 2)])
def test_nothing_stays_nothing(policy: str, shape: tuple[int, int]) -> None:
    found, truncated = cut(zero_piece(3, shape), policy)
    assert truncated.energy_kept == 1.0
    rank = min(3, *shape)
    assert found.rank == {"full": 3, "1": 1, "3": rank}.get(policy, 1)
    assert not dense(found).any()


@pytest.mark.parametrize("shape", [(20, 15), (5, 4)])
def test_the_same_update_side_by_side_shrinks_to_its_own_rank(shape: tuple[int, int]) -> None:
    piece = random_piece(3, 2, shape, scale=2.0)
    twice = LowRankUpdate(torch.cat([piece.A, piece.A]), torch.cat([piece.B, piece.B], 1), 1.0)
    for policy in ("2", "energy:1"):
        found, truncated = cut(twice, policy)
        assert found.rank == 2
        assert close(dense(found), dense(piece), dense(piece))
        assert truncated.energy_kept == pytest.approx(1.0, abs=1e-12)


def test_the_energy_kept_is_that_of_all_modules_together() -> None:
    update = {"a": of_values(4.0, 3.0), "b": of_values(12.0, 5.0, 1.0), "c": zero_piece(2, (4, 3))}
    truncated = truncate(update, parse_rank_policy("1"))
    assert truncated.energy_kept == pytest.approx((16 + 144) / (25 + 170), rel=1e-12)
    assert set(truncated.update) == set(update)
    assert {piece.rank for piece in truncated.update.values()} == {1}
    assert all(np.isfinite(matrix).all() for matrix in dense_all(truncated.update).values())


@given(pieces())
@example(SMALL)
@example(HALF)
@example(LARGE)
@example(OVER)
def test_the_thin_svd(piece: LowRankUpdate) -> None:
    left, values, right = (part.numpy() for part in decompose(piece))
    k = min(piece.rank, *piece.shape)
    assert (left.shape, values.shape) == ((piece.shape[0], k), (k,))
    assert right.shape == (k, piece.shape[1])
    whole = dense(piece)
    expected = np.linalg.svd(whole, compute_uv=False)[:k]
    np.testing.assert_allclose(values, expected, rtol=0, atol=1e-12 * expected[0])
    assert close(left * values @ right, whole, whole)
    np.testing.assert_allclose(left.T @ left, np.eye(k), atol=1e-12)
    np.testing.assert_allclose(right @ right.T, np.eye(k), atol=1e-12)


def test_small_singular_values_are_not_lost_beside_large_ones() -> None:
    wide = of_values(1.0, 1e-6, 1e-12)
    _, values, _ = decompose(wide)
    np.testing.assert_allclose(values.numpy(), [1.0, 1e-6, 1e-12], rtol=1e-3)
    assert math.isclose(cut(wide, "1")[1].energy_kept, 1.0, rel_tol=1e-11)
