"""Merge rules against PEFT's and mergekit's, number for number, on the updates multiplied out."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from support.adapters import write_peft_adapter
from support.low_rank import Matrix, dense
from support.merging import Case, distance, exact_pieces, group_of, matrix
from torch import Tensor

from recycle_cli.lora.folder import read_adapter
from recycle_cli.lora.truncation import parse_rank_policy, truncate_module
from recycle_cli.lora.update import LowRankUpdate, row_blocks
from recycle_cli.merging import elementwise, linear, sparsify, sphere
from recycle_cli.merging.catalog import METHODS
from recycle_cli.merging.group import Group
from recycle_cli.merging.sce import sce

ONE_BLOCK, SEVERAL_BLOCKS = (24, 18), (700, 600)
SHAPES = [ONE_BLOCK, SEVERAL_BLOCKS]
RANKS = (3, 2, 4)
WEIGHTS = (1.0, 0.5, 0.8)
MIXED = (1.0, -0.6, 0.35)
EXACT = 1e-10


def tensors(pieces: Sequence[LowRankUpdate]) -> list[Tensor]:
    return [torch.from_numpy(dense(piece)) for piece in pieces]


def group(shape: tuple[int, int], weights: Sequence[float] = (1.0, 1.0, 1.0)) -> Group:
    return group_of(exact_pieces(shape, RANKS), weights)


def column(weights: Sequence[float]) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64)


@contextlib.contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """What draws from torch's own generator gets the numbers of this one."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(generator.get_state())
        yield


def dropped(of: Group, density: float) -> list[Tensor]:
    """The updates with entries dropped by PEFT, each from its own draws."""
    pruned = []
    for index, update in enumerate(tensors(of.pieces)):
        with drawing_from(of.generator(index)):
            ones = torch.ones(update.shape)
            mask = merge_utils.prune(ones, density, method="random", rescale=False)
            pruned.append(update * mask / density)
    return pruned


def test_the_shapes_are_of_one_block_and_of_several() -> None:
    assert len(list(row_blocks(ONE_BLOCK))) == 1
    assert len(list(row_blocks(SEVERAL_BLOCKS))) > 1


@pytest.mark.parametrize("weights", [WEIGHTS, MIXED])
def test_linear_is_the_task_arithmetic_of_peft(weights: tuple[float, ...]) -> None:
    updates = group(ONE_BLOCK, weights)
    expected = merge_utils.task_arithmetic(tensors(updates.pieces), column(weights))
    assert distance(dense(linear.linear(updates)), expected.numpy()) < EXACT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.2, 0.55])
def test_ties_at_weights_of_one_is_that_of_peft(shape: tuple[int, int], density: float) -> None:
    updates = group(shape)
    expected = merge_utils.ties(tensors(updates.pieces), torch.ones(3).double(), density)
    for normalize in ("count", "weights"):
        found = elementwise.ties(updates, density, normalize)
        assert distance(found.numpy(), expected.numpy()) < EXACT


@pytest.mark.parametrize("shape", SHAPES)
def test_magnitude_prune_is_that_of_peft(shape: tuple[int, int]) -> None:
    updates = group(shape, MIXED)
    expected = merge_utils.magnitude_prune(tensors(updates.pieces), column(MIXED), 0.3)
    found = elementwise.magnitude_prune(updates, 0.3)
    assert distance(found.numpy(), expected.numpy()) < EXACT


@pytest.mark.parametrize("shape", SHAPES)
def test_dare_linear_is_that_of_peft_for_the_same_draws(shape: tuple[int, int]) -> None:
    updates = group(shape, MIXED)
    expected = merge_utils.task_arithmetic(dropped(updates, 0.4), column(MIXED))
    found = elementwise.dare_linear(updates, 0.4)
    assert distance(found.numpy(), expected.numpy()) < EXACT


@pytest.mark.parametrize("shape", SHAPES)
def test_dare_ties_is_that_of_peft_for_the_same_draws(shape: tuple[int, int]) -> None:
    updates = group(shape)
    stacked = torch.stack(dropped(updates, 0.4))
    signs = merge_utils.calculate_majority_sign_mask(stacked)
    expected = merge_utils.disjoint_merge(stacked, signs)
    found = elementwise.dare_ties(updates, 0.4, "count")
    assert distance(found.numpy(), expected.numpy()) < EXACT


@pytest.mark.parametrize("weights", [(0.7, 0.4), (1.0, -0.5)])
@pytest.mark.parametrize(("combination", "policy"), [("cat", "full"), ("svd", "5")])
def test_linear_is_what_peft_makes_of_whole_adapters(
    combination: str,
    policy: str,
    weights: tuple[float, float],
    pico_folder: Path,
    tmp_path: Path,
) -> None:
    one = write_peft_adapter(tmp_path / "one", pico_folder, seed=1)
    two = write_peft_adapter(tmp_path / "two", pico_folder, seed=2, r=6, lora_alpha=9)
    theirs = peft_merge([one, two], weights, combination, 5, pico_folder)
    updates = [read_adapter(folder).update for folder in (one, two)]
    assert theirs.keys() == updates[0].keys()
    for module, expected in theirs.items():
        merged = linear.linear(group_of([update[module] for update in updates], weights))
        found = truncate_module(merged, parse_rank_policy(policy)).update
        assert distance(dense(found), expected) < 1e-5


def peft_merge(
    folders: Sequence[Path],
    weights: Sequence[float],
    combination: str,
    rank: int,
    base_folder: Path,
) -> dict[str, Matrix]:
    """The updates of the adapter that PEFT's add_weighted_adapter makes, by module path."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        model: Any = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
        for number, folder in enumerate(folders[1:], 1):
            model.load_adapter(folder, adapter_name=str(number))
        names = [str(number) for number in range(len(folders))]
        extra = {"svd_rank": rank} if combination == "svd" else {}
        model.add_weighted_adapter(names, list(weights), "merged", combination, **extra)
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("merged").detach().numpy()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def consensus(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """mergekit's election, and the sum divided by the weights of those that agree."""
    theirs = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    spread = column(weights)[:, None, None]
    weighted = torch.stack(list(deltas)) * spread
    mask = theirs.get_mask(weighted, method="sum")
    divisor = (spread * mask).sum(0)
    divisor[divisor == 0] = 1
    return (weighted * mask).sum(0) / divisor


@pytest.mark.parametrize("weights", [WEIGHTS, MIXED])
@pytest.mark.parametrize("shape", SHAPES)
def test_ties_normalized_by_weights_is_that_of_mergekit(
    shape: tuple[int, int], weights: tuple[float, ...]
) -> None:
    theirs = pytest.importorskip("mergekit.sparsify")
    updates = group(shape, weights)
    trimmed = [theirs.magnitude(update, 0.3) for update in tensors(updates.pieces)]
    found = elementwise.ties(updates, 0.3, "weights")
    assert distance(found.numpy(), consensus(trimmed, weights).numpy()) < EXACT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("density", "gamma"), [(0.1, 0.01), (0.3, 0.25), (0.6, 0.7)])
def test_breadcrumbs_is_that_of_mergekit(
    shape: tuple[int, int], density: float, gamma: float
) -> None:
    theirs = pytest.importorskip("mergekit.sparsify")
    updates = group(shape, MIXED)
    expected = sum(
        weight * theirs.magnitude_outliers(update, density, gamma=gamma)
        for weight, update in zip(MIXED, tensors(updates.pieces), strict=True)
    )
    found = elementwise.breadcrumbs(updates, density, gamma)
    assert distance(found.numpy(), expected.numpy()) < EXACT


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.1), (0.3, 0.25)])
def test_della_keeps_what_mergekit_keeps_of_the_same_draws(
    shape: tuple[int, int], density: float, epsilon: float
) -> None:
    theirs = pytest.importorskip("mergekit.sparsify")
    # mergekit draws in float32 whatever it is given, and draws depend on the type.
    updates = group_of([piece.to(torch.float32) for piece in exact_pieces(shape, RANKS)], WEIGHTS)
    kept = []
    for index, piece in enumerate(updates.pieces):
        keep = sparsify.drop_by_rank(density, epsilon)(piece, updates.generator(index))
        blocks = [piece.rows(rows) for rows in row_blocks(shape)]
        update, found = torch.cat(blocks), torch.cat([keep(block) for block in blocks])
        with drawing_from(updates.generator(index)):
            masked = theirs.della_magprune(update, density, epsilon)
        assert torch.equal(found != 0, masked != 0)
        # A row's entries in rising order have evenly rising probabilities.
        place = update.abs().argsort(dim=1).argsort(dim=1).double()
        probability = density - epsilon + 2 * epsilon * place / (shape[1] - 1)
        expected = masked.double() / probability
        assert distance(matrix(found), matrix(expected)) < 1e-6
        kept.append(expected)
    merged = elementwise.della(updates, density, epsilon, "weights")
    assert distance(matrix(merged), consensus(kept, WEIGHTS).numpy()) < 1e-5


def sce_of_mergekit(updates: Group, density: float) -> Matrix:
    theirs = pytest.importorskip("mergekit.merge_methods.sce")
    signs = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic")
    stacked = torch.stack(tensors(updates.pieces))
    stacked = stacked * theirs.sce_mask(stacked, density, torch.float64)
    shares = theirs.sce_weight(stacked)[:, None, None] * signs.get_mask(stacked, method="sum")
    return matrix((stacked * shares).sum(0) / shares.sum(0).clamp(min=1e-6))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_sce_is_that_of_mergekit(shape: tuple[int, int], density: float) -> None:
    updates = group(shape)
    assert distance(matrix(sce(updates, density)), sce_of_mergekit(updates, density)) < EXACT


def test_sce_takes_a_share_of_the_entries_that_vary() -> None:
    updates = group(ONE_BLOCK)
    for piece in updates.pieces:
        piece.A[:, 5:] = 0
    assert distance(matrix(sce(updates, 0.4)), sce_of_mergekit(updates, 0.4)) < EXACT


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS, (0.0, 3.0, 1.0)])
def test_karcher_is_that_of_mergekit_when_it_goes_on_to_the_end(
    weights: tuple[float, ...],
) -> None:
    theirs = pytest.importorskip("mergekit.merge_methods.karcher")
    updates = group(ONE_BLOCK, weights)
    expected = theirs.karcher_merge_tensors(
        tensors(updates.pieces), updates.shares, max_iter=2000, tol=1e-14
    )
    assert distance(dense(sphere.karcher(updates)), expected.numpy()) < EXACT


@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.3])
def test_karcher_of_updates_that_are_near_each_other(spread: float) -> None:
    theirs = pytest.importorskip("mergekit.merge_methods.karcher")
    common, *others = exact_pieces(ONE_BLOCK, (3, 2, 2, 2))
    near = [linear.weighted_sum([common, other], [1.0, spread]) for other in others]
    updates = group_of(near, WEIGHTS)
    expected = theirs.karcher_merge_tensors(
        tensors(updates.pieces), updates.shares, max_iter=2000, tol=1e-14
    )
    # Theirs leaves out angles below its tolerance, and arccos knows none between 0 and 1e-8.
    assert distance(dense(sphere.karcher(updates)), expected.numpy()) < 1e-8


def test_karcher_with_an_update_of_nothing_is_that_of_mergekit() -> None:
    theirs = pytest.importorskip("mergekit.merge_methods.karcher")
    one, two = exact_pieces(ONE_BLOCK, (3, 2))
    nothing = LowRankUpdate(one.A, torch.zeros_like(one.B), 1.0)
    updates = group_of([one, nothing, two], WEIGHTS)
    expected = theirs.karcher_merge_tensors(
        tensors(updates.pieces), updates.shares, max_iter=2000, tol=1e-14
    )
    assert distance(dense(sphere.karcher(updates)), expected.numpy()) < EXACT


def test_rules_of_the_catalog_are_those_that_were_compared() -> None:
    pieces = exact_pieces(ONE_BLOCK, RANKS)
    found = Case(METHODS["ties"], {"density": 0.55}).matrix(pieces)
    expected = merge_utils.ties(tensors(pieces), torch.ones(3).double(), 0.55)
    assert distance(found, expected.numpy()) < EXACT
