"""Merge rules against their definitions written out on dense matrices in float64."""

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.low_rank import Matrix, dense
from support.merging import distance, exact_pieces, group_of, matrix

from recycle_cli.errors import InputError
from recycle_cli.lora.update import LowRankUpdate, zero_update
from recycle_cli.merging import aligned, federated, sphere
from recycle_cli.merging.elementwise import ties
from recycle_cli.merging.group import Group
from recycle_cli.merging.linear import average, linear
from recycle_cli.merging.lora_lego import lora_lego
from recycle_cli.merging.sce import sce
from recycle_cli.merging.spectral import iso, tsv

WIDE, TALL, SMALL = (14, 31), (33, 16), (7, 6)
SHAPES = [WIDE, TALL, SMALL]
RANKS = (3, 2, 4)
WEIGHTS = (1.0, -0.6, 0.35)
EXACT = 1e-10


def updates(shape: tuple[int, int], weights: Sequence[float] = WEIGHTS) -> Group:
    return group_of(exact_pieces(shape, RANKS), weights)


def weighted(group: Group, blocks: Sequence[Matrix]) -> list[Matrix]:
    return [weight * block for weight, block in zip(group.weights, blocks, strict=True)]


def trimmed(block: Matrix, density: float) -> Matrix:
    least = np.sort(np.abs(block), axis=None)[-max(1, int(density * block.size))]
    return np.where(np.abs(block) >= least, block, 0.0)


def elected(blocks: Sequence[Matrix]) -> Matrix:
    """The mean of what has the sign of the sum."""
    stacked = np.stack(blocks)
    agree = np.sign(stacked) == np.where(stacked.sum(0) >= 0, 1, -1)
    mean: Matrix = (stacked * agree).sum(0) / np.maximum(agree.sum(0), 1)
    return mean


def dropped(group: Group, index: int, block: Matrix, density: float) -> Matrix:
    chances = torch.full(block.shape, density)
    kept = torch.bernoulli(chances, generator=group.generator(index)).double().numpy()
    return block * kept / density


def inner(group: Group, rule: str, blocks: Sequence[Matrix], density: float) -> Matrix:
    """linear, ties or dare-ties of some matrices."""
    if rule == "ties":
        return elected(weighted(group, [trimmed(block, density) for block in blocks]))
    if rule == "dare":
        drawn = [dropped(group, index, block, density) for index, block in enumerate(blocks)]
        return elected(weighted(group, drawn))
    return np.sum(weighted(group, blocks), axis=0)


def polar(vectors: Matrix) -> Matrix:
    left, _, right = np.linalg.svd(vectors, full_matrices=False)
    return left @ right


@pytest.mark.parametrize("components", [None, 1, 2, 50])
@pytest.mark.parametrize("shape", SHAPES)
def test_tsv(shape: tuple[int, int], components: int | None) -> None:
    group = updates(shape)
    lefts, values, rights = [], [], []
    for piece, weight in zip(group.pieces, group.weights, strict=True):
        left, sizes, right = np.linalg.svd(dense(piece), full_matrices=False)
        count = min(piece.rank, min(shape) // len(group.pieces), components or 50)
        lefts.append(left[:, :count])
        values.append(weight * sizes[:count])
        rights.append(right[:count])
    expected = polar(np.hstack(lefts)) * np.concatenate(values) @ polar(np.vstack(rights))
    assert distance(dense(tsv(group, components)), expected) < EXACT


def test_tsv_of_more_updates_than_the_smaller_side_takes_one_of_each() -> None:
    group = group_of(exact_pieces((3, 20), (2, 2, 2, 2)))
    found = dense(tsv(group, None))
    lefts, values, rights = [], [], []
    for piece in group.pieces:
        left, sizes, right = np.linalg.svd(dense(piece))
        lefts.append(left[:, :1])
        values.append(sizes[0])
        rights.append(right[:1])
    expected = polar(np.hstack(lefts)) * np.array(values) @ polar(np.vstack(rights))
    assert distance(found, expected) < EXACT


def test_tsv_of_updates_apart_from_each_other_is_their_sum() -> None:
    one, two = exact_pieces((20, 20), (2, 3))
    one.A[:, 10:], one.B[10:], two.A[:, :10], two.B[:10] = 0, 0, 0, 0
    assert distance(dense(tsv(group_of([one, two]), None)), dense(one) + dense(two)) < EXACT


def test_tsv_of_one_update_twice_doubles_nothing_but_its_values() -> None:
    (piece,) = exact_pieces((20, 15), (3,))
    assert distance(dense(tsv(group_of([piece, piece]), None)), dense(piece)) < EXACT


@pytest.mark.parametrize("shape", SHAPES)
def test_iso(shape: tuple[int, int]) -> None:
    group = updates(shape)
    left, values, right = np.linalg.svd(dense(linear(group)), full_matrices=False)
    count = min(sum(RANKS), *shape)
    expected = values[:count].mean() * left[:, :count] @ right[:count]
    assert distance(dense(iso(group)), expected) < EXACT


@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", ["ties", "dare"])
def test_knots(shape: tuple[int, int], density: float, rule: str) -> None:
    group = updates(shape)
    both = np.hstack([dense(piece) for piece in group.pieces])
    left, values, right = np.linalg.svd(both, full_matrices=False)
    there = values > 1e-9
    parts = np.hsplit(values[there, None] * right[there], len(group.pieces))
    merge = {"ties": aligned.knots_ties, "dare": aligned.knots_dare}[rule]
    expected = left[:, there] @ inner(group, rule, parts, density)
    assert distance(dense(merge(group, density, "count")), expected) < EXACT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", ["linear", "ties", "dare"])
def test_core_space(shape: tuple[int, int], rule: str) -> None:
    group = updates(shape)
    columns = np.hstack([piece.B.numpy() for piece in group.pieces])
    rows = np.vstack([piece.A.numpy() for piece in group.pieces])
    left = np.linalg.svd(columns, full_matrices=False)[0]
    right = np.linalg.svd(rows, full_matrices=False)[2]
    cores = [left.T @ dense(piece) @ right.T for piece in group.pieces]
    expected = left @ inner(group, rule, cores, 0.4) @ right
    assert distance(dense(aligned.core_space(group, rule, 0.4)), expected) < EXACT


def test_core_space_with_linear_inside_is_the_weighted_sum() -> None:
    for shape in SHAPES:
        group = updates(shape)
        found = dense(aligned.core_space(group, "linear", 0.2))
        assert distance(found, dense(linear(group))) < EXACT


@pytest.mark.parametrize("shared_rank", [None, 1, 3, 40])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", ["linear", "ties", "dare"])
def test_compress_then_merge(shape: tuple[int, int], rule: str, shared_rank: int | None) -> None:
    group = updates(shape)
    whole = [dense(piece) for piece in group.pieces]
    rank = min(shared_rank or max(RANKS), sum(RANKS))
    left = np.linalg.svd(np.hstack(whole), full_matrices=False)[0][:, :rank]
    right = np.linalg.svd(np.vstack(whole), full_matrices=False)[2][:rank]
    cores = [left.T @ block @ right.T for block in whole]
    expected = left @ inner(group, rule, cores, 0.4) @ right
    found = aligned.compress_then_merge(group, shared_rank, rule, 0.4)
    assert distance(dense(found), expected) < EXACT
    assert found.rank == min(rank, *shape)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_slerp(shape: tuple[int, int], share: float) -> None:
    group = group_of(exact_pieces(shape, (3, 2)), (2 * (1 - share), 2 * share))
    one, two = (dense(piece).ravel() for piece in group.pieces)
    angle = np.arccos(one @ two / np.linalg.norm(one) / np.linalg.norm(two))
    expected = (np.sin((1 - share) * angle) * one + np.sin(share * angle) * two) / np.sin(angle)
    assert distance(dense(sphere.slerp(group)), expected.reshape(shape)) < EXACT


@pytest.mark.parametrize("turn", [1.0, -1.0])
def test_slerp_of_parallel_updates_is_their_mean(turn: float) -> None:
    (one,) = exact_pieces(WIDE, (3,))
    group = group_of([one, replace(one, scale=turn * 3 * one.scale)], (1.0, 3.0))
    assert distance(dense(sphere.slerp(group)), (0.25 + turn * 0.75 * 3) * dense(one)) < EXACT


def test_slerp_with_an_update_of_nothing_is_the_mean() -> None:
    (one,) = exact_pieces(WIDE, (3,))
    nothing = replace(one, B=torch.zeros_like(one.B))
    for pieces in ([one, nothing], [nothing, one]):
        assert distance(dense(sphere.slerp(group_of(pieces))), dense(one) / 2) < EXACT


def test_karcher_stands_where_all_pulls_cancel() -> None:
    group = updates(WIDE, (1.0, 0.6, 0.35))
    mean = dense(sphere.karcher(group)).ravel()
    whole = [dense(piece).ravel() for piece in group.pieces]
    lengths = [float(np.linalg.norm(update)) for update in whole]
    assert np.linalg.norm(mean) == pytest.approx(np.dot(group.shares, lengths), rel=1e-12)
    mean /= np.linalg.norm(mean)
    pulls = np.zeros_like(mean)
    for share, update, length in zip(group.shares, whole, lengths, strict=True):
        cosine = update @ mean / length
        angle = np.arccos(cosine)
        pulls += share * angle / np.sin(angle) * (update / length - cosine * mean)
    assert np.linalg.norm(pulls) < 1e-12


def test_karcher_of_directions_that_cancel_is_refused() -> None:
    (one,) = exact_pieces(WIDE, (3,))
    with pytest.raises(InputError, match="cancel"):
        sphere.karcher(group_of([one, replace(one, scale=-2 * one.scale)]))


def test_karcher_of_opposite_directions_is_refused_or_takes_no_huge_multiples() -> None:
    (one,) = exact_pieces(WIDE, (3,))
    opposite = replace(one, scale=-0.5 * one.scale)
    for share in (0.1, 0.2, 0.3, 0.4, 0.45):
        with contextlib.suppress(InputError):
            found = sphere.karcher(group_of([one, opposite], (1 - share, share)))
            assert float(found.B.norm()) < 10 * abs(one.scale) * float(one.B.norm())


def test_an_opposite_update_of_weight_0_does_not_pull_in_karcher() -> None:
    (one,) = exact_pieces(WIDE, (3,))
    found = sphere.karcher(group_of([one, replace(one, scale=-one.scale)], (1.0, 0.0)))
    assert distance(dense(found), dense(one)) < EXACT


def test_the_two_parts_of_fedex_are_the_mean() -> None:
    group = group_of(exact_pieces(WIDE, (3, 3, 3)), (1.0, -0.2, 0.7))
    first, rest = federated.factor_average(group), federated.residual(group)
    assert distance(dense(first) + dense(rest), dense(average(group))) < 1e-12
    lefts = [piece.scale * piece.B.numpy() for piece in group.pieces]
    rights = [piece.A.numpy() for piece in group.pieces]
    left, right = (np.average(both, axis=0, weights=group.weights) for both in (lefts, rights))
    assert distance(dense(first), left @ right) < 1e-12
    expected = sum(
        share * (b - left) @ (a - right)
        for share, b, a in zip(group.shares, lefts, rights, strict=True)
    )
    assert distance(dense(rest), expected) < 1e-12
    assert rest.rank == 2 * 3
    assert np.linalg.matrix_rank(dense(rest)) == 2 * 3


def test_equal_adapters_leave_no_residual() -> None:
    (piece,) = exact_pieces(WIDE, (3,))
    for count in (1, 2, 3, 5):
        group = group_of([piece] * count)
        assert np.abs(dense(federated.residual(group))).max() < 1e-14
        assert distance(dense(federated.factor_average(group)), dense(piece)) < 1e-14


def test_an_adapter_that_lacks_the_module_has_factors_of_zero() -> None:
    one, two = exact_pieces(WIDE, (3, 3))
    nothing = zero_update(WIDE)
    explicit = LowRankUpdate(torch.zeros_like(one.A), torch.zeros_like(one.B), 1.0)
    for rule in (federated.factor_average, federated.residual):
        found = rule(group_of([nothing, one, two]))
        assert distance(dense(found), dense(rule(group_of([explicit, one, two])))) < EXACT


def test_factors_of_different_ranks_have_no_average() -> None:
    for rule in (federated.factor_average, federated.residual):
        with pytest.raises(InputError) as caught:
            rule(updates(WIDE))
        assert "2, 3, 4" in caught.value.message
        assert "--method average" in caught.value.hint


ROWS = WIDE[0]


def lego(units: Sequence[Matrix], clusters: Sequence[Sequence[int]], mean_rank: float) -> Matrix:
    """The update of the clusters of units (left, right), both in one vector of left and right."""
    total = np.zeros_like(np.outer(units[0][:ROWS], units[0][ROWS:]))
    for members in clusters:
        inside = np.stack([units[member] for member in members])
        centre = inside.mean(axis=0)
        centre *= np.linalg.norm(inside, axis=1).mean() / np.linalg.norm(centre)
        total += np.outer(centre[:ROWS], centre[ROWS:])
    return total * np.sqrt(mean_rank / len(clusters))


def units_of(group: Group) -> list[Matrix]:
    """The columns and rows, with the root of the scale in both and its sign on the left."""
    return [
        np.sqrt(abs(piece.scale)) * np.concatenate([np.sign(piece.scale) * left, right])
        for piece in group.pieces
        for left, right in zip(piece.B.T.numpy(), piece.A.numpy(), strict=True)
    ]


@pytest.mark.parametrize("clusters", [9, 12])
def test_as_many_clusters_as_units_lose_nothing_but_size(clusters: int) -> None:
    group = updates(WIDE)
    found = lora_lego(group, clusters)
    expected = np.sum([dense(piece) for piece in group.pieces], axis=0)
    assert found.rank == 9
    assert distance(dense(found), np.sqrt(3 / 9) * expected) < EXACT
    apart = lego(units_of(group), [[unit] for unit in range(9)], 3)
    assert distance(dense(found), apart) < EXACT


def test_one_cluster_is_the_mean_unit_at_the_mean_norm() -> None:
    group = updates(WIDE)
    assert distance(dense(lora_lego(group, 1)), lego(units_of(group), [range(9)], 3)) < EXACT


@pytest.mark.parametrize("seed", range(5))
def test_units_that_are_near_each_other_are_one_cluster(seed: int) -> None:
    (common,) = exact_pieces(WIDE, (4,), (-2.0,), seed=100 * seed)
    shifts = exact_pieces(WIDE, (4, 4, 4), seed=100 * seed + 1)
    orders = [[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]]
    group = group_of(
        [
            LowRankUpdate(
                common.A[order] + 1e-4 * shift.A, common.B[:, order] + 1e-4 * shift.B, -2.0
            )
            for shift, order in zip(shifts, orders, strict=True)
        ]
    )
    clusters = [
        [4 * adapter + order.index(unit) for adapter, order in enumerate(orders)]
        for unit in range(4)
    ]
    expected = lego(units_of(group), clusters, 4)
    for wanted in (None, 4):
        assert distance(dense(lora_lego(group, wanted)), expected) < EXACT


@pytest.mark.parametrize("clusters", [1, 2, 3, 4, 9])
def test_more_clusters_than_there_are_different_units(clusters: int) -> None:
    (piece,) = exact_pieces(WIDE, (2,))
    found = lora_lego(group_of([piece, piece]), clusters)
    assert np.isfinite(dense(found)).all()
    if clusters in (2, 3):
        assert distance(dense(found), dense(piece)) < EXACT


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7])
def test_sce_of_updates_that_do_not_differ_is_that_update(count: int) -> None:
    (piece,) = exact_pieces(WIDE, (3,))
    assert distance(matrix(sce(group_of([piece] * count), 0.1)), dense(piece)) < 1e-7


def test_sce_keeps_the_precision_of_float64() -> None:
    group = updates(WIDE)
    whole = np.stack([dense(piece) for piece in group.pieces])
    energies = np.square(whole).sum((1, 2))
    shares = (energies / energies.sum())[:, None, None]
    agree = np.sign(whole) == np.where(whole.sum(0) >= 0, 1, -1)
    expected = (shares * whole * agree).sum(0) / (shares * agree).sum(0)
    assert distance(matrix(sce(group, 1.0)), expected) < EXACT


def test_sce_keeps_the_precision_where_the_first_adapter_lacks_the_module() -> None:
    one, two = exact_pieces(WIDE, (3, 2))
    for pieces in ([one, two, zero_update(WIDE)], [zero_update(WIDE), one, two]):
        merged = sce(group_of(pieces), 1.0)
        assert merged.dtype == torch.float64


def of_entries(*rows: list[float]) -> LowRankUpdate:
    """An update with these entries."""
    entries = torch.tensor(rows, dtype=torch.float64)
    return LowRankUpdate(torch.eye(entries.shape[1], dtype=torch.float64), entries, 1.0)


@pytest.mark.parametrize(
    ("weights", "normalize", "expected"),
    [
        ((1.0, 1.0), "count", [1.0, 2.0, 0.0, 3.0, -5.0]),
        ((2.0, 1.0), "count", [2.0, -4.0, 0.0, 6.0, -6.0]),
        ((2.0, 1.0), "weights", [1.0, -2.0, 0.0, 3.0, -4.0]),
        ((1.0, -1.0), "count", [1.0, -2.0, 0.0, 3.0, 8.0]),
        ((1.0, -1.0), "weights", [2.0, -4.0, 0.0, 3.0, -8.0]),
    ],
)
def test_ties_by_hand(weights: tuple[float, float], normalize: str, expected: list[float]) -> None:
    # The second vote is even at equal weights, and an even vote is positive.
    group = group_of(
        [of_entries([1.0, -2.0, 0.0, 3.0, -2.0]), of_entries([-1.0, 2.0, 0.0, 0.0, -8.0])], weights
    )
    found = matrix(ties(group, 1.0, normalize))[0].tolist()
    assert found == expected


def test_entries_of_zero_have_no_say_in_sce() -> None:
    group = group_of([of_entries([2.0, 1.0, 4.0]), of_entries([0.0, 1.0, -4.0])])
    # Energies 21 and 17; the last vote is even, and so positive.
    np.testing.assert_allclose(matrix(sce(group, 1.0)), [[2.0, 1.0, 4.0]], rtol=1e-6)
