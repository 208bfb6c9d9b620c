"""pi-tuning: softmax shares per module over adapters whose factors are trained too."""

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.plain import CLOSED_ROWS, DOWN, HEAD, Q0, Q1, DenseModel, logits, mixed_updates
from torch import Tensor

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.lora.folder import read_adapter, write_adapter
from recycle_cli.lora.update import ModelUpdate
from recycle_cli.progress import Silent
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.mixture import Mixture
from recycle_cli.tuning.tuned import Ingredients, fit

TOKENS = list(range(3, 43))
PLAN = TrainingPlan(steps=6, lr=0.01, batch_size=3, eval_every=3)
PATHS = [HEAD, Q0, DOWN, Q1]
NEW_RANK = 5


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[:3])


@pytest.fixture
def updates(pico_base: BaseModel) -> list[ModelUpdate]:
    return mixed_updates(pico_base)


def pi_tuning(updates: Sequence[ModelUpdate], target: int | None = None, seed: int = 3) -> Mixture:
    given = {} if target is not None else {"new_rank": NEW_RANK}
    settings = METHODS["pi-tuning"].settings(given, target is not None)
    tuned = METHODS["pi-tuning"].build(Ingredients(updates, target, seed), settings)
    assert isinstance(tuned, Mixture)
    return tuned


@torch.no_grad()
def of(base: BaseModel, tuned: Mixture) -> Tensor:
    with tuned.attached(base):
        return logits(base.model, TOKENS)


def factors_of(tuned: Mixture, path: str, adapter: int) -> tuple[Tensor, Tensor]:
    """A and B of one adapter among those that are trained."""
    key, own = path.replace(".", "/"), tuned.owners[path] == adapter
    return tuned.lora_A[key].detach()[own], tuned.lora_B[key].detach()[:, own]


def test_a_new_lora_joins_where_there_is_no_target(updates: list[ModelUpdate]) -> None:
    """In every module that an adapter has: A is small noise, B is zero."""
    tuned = pi_tuning(updates)
    assert tuned.adapters == 4
    drawn = []
    for path in PATHS:
        a, b = factors_of(tuned, path, adapter=3)
        assert (a.shape[0], b.shape[1]) == (NEW_RANK, NEW_RANK)
        assert not b.any()
        drawn.append(a.ravel())
    drawn_all = torch.cat(drawn)
    assert float(drawn_all.std()) == pytest.approx(0.01, rel=0.1)
    assert abs(float(drawn_all.mean())) < 0.001
    same, other = pi_tuning(updates), pi_tuning(updates, seed=4)
    assert torch.equal(factors_of(same, Q0, 3)[0], factors_of(tuned, Q0, 3)[0])
    assert not torch.equal(factors_of(other, Q0, 3)[0], factors_of(tuned, Q0, 3)[0])


def test_beside_a_target_none_joins(updates: list[ModelUpdate]) -> None:
    tuned = pi_tuning(updates, target=2)
    assert tuned.adapters == 3
    for path in PATHS:
        for number, update in enumerate(updates):
            a, b = factors_of(tuned, path, number)
            rank = update[path].rank if path in update else 0
            assert (a.shape[0], b.shape[1]) == (rank, rank)
            if rank:
                assert torch.equal(a, update[path].A)
                assert torch.equal(b, update[path].B * update[path].scale)


@pytest.mark.parametrize("target", [None, 2])
def test_it_starts_at_equal_shares(
    pico_base: BaseModel, updates: list[ModelUpdate], target: int | None
) -> None:
    """Of the adapters that have a module, the new one included."""
    tuned = pi_tuning(updates, target)
    deltas = {}
    for path in PATHS:
        there = [update[path] for update in updates if path in update]
        share = 1 / (len(there) + (target is None))
        deltas[path] = share * torch.stack([piece.dense() for piece in there]).sum(0)
    with torch.no_grad():
        expected = logits(DenseModel(pico_base, deltas), TOKENS)
        before = logits(pico_base.model, TOKENS)
    assert float((expected - before).abs().mean()) > 0.1
    torch.testing.assert_close(of(pico_base, tuned), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("target", [None, 2])
def test_shares_and_factors_are_trained(
    pico_base: BaseModel, updates: list[ModelUpdate], examples: list[Example], target: int | None
) -> None:
    tuned = pi_tuning(updates, target)
    before = copy.deepcopy(tuned.state())
    trained, _ = fit(pico_base, tuned, examples, examples, PLAN, Silent())
    assert trained.best_step > 0
    assert trained.best_loss < trained.history[0][1] - 0.01
    for number, there in enumerate(tuned.layout.present):
        row = tuned.row(number).detach()
        assert float(row.sum()) == pytest.approx(1, abs=1e-6)
        assert not row[~there].any()
        now = tuned.coefficients[number].detach()
        moved = now != before[f"coefficients.{tuned.layout.groups[number]}"]
        # Where one adapter is alone, its share is 1 whatever its coefficient.
        assert moved.equal(there & (there.sum() > 1))
    for path in PATHS:
        for factor in (f"lora_A.{path}", f"lora_B.{path}"):
            assert (tuned.state()[factor] != before[factor]).float().mean() > 0.9, factor
    if target is None:
        assert all(factors_of(tuned, path, 3)[1].any() for path in PATHS)


@pytest.mark.parametrize("target", [None, 2])
def test_the_export_is_what_was_trained(
    pico_base: BaseModel,
    updates: list[ModelUpdate],
    examples: list[Example],
    tmp_path: Path,
    target: int | None,
) -> None:
    tuned = pi_tuning(updates, target)
    fit(pico_base, tuned, examples, examples, PLAN, Silent())
    expected = of(pico_base, tuned)
    write_adapter(tmp_path, tuned.folded(), pico_base.id)
    update = read_adapter(tmp_path).update
    for path, piece in update.items():
        whole = sum(one[path].rank for one in updates if path in one)
        assert piece.rank == whole + (NEW_RANK if target is None else 0)
    with with_adapter(pico_base, update), torch.no_grad():
        found = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_given_adapters_stay_as_they_are(
    pico_base: BaseModel, updates: list[ModelUpdate], examples: list[Example]
) -> None:
    """Their factors are copied, not trained in place."""
    before = copy.deepcopy(updates)
    fit(pico_base, pi_tuning(updates), examples, examples, PLAN, Silent())
    # One adapter alone, whose factors need no concatenation.
    fit(pico_base, pi_tuning(updates[:1], target=0), examples, examples, PLAN, Silent())
    for one, other in zip(updates, before, strict=True):
        for path, piece in one.items():
            assert torch.equal(piece.A, other[path].A)
            assert torch.equal(piece.B, other[path].B)
