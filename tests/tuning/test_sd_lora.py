"""SD-LoRA: magnitudes of unit directions and a new direction, against dense matrices."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.plain import CLOSED_ROWS, DOWN, HEAD, Q0, Q1, DenseModel, logits, mixed_updates
from torch import Tensor

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.training import TrainingPlan, validation_loss
from recycle_cli.lora.folder import read_adapter, write_adapter
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.progress import Silent
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.sd_lora import SDLora, reduced_rank
from recycle_cli.tuning.tuned import Ingredients, fit

TOKENS = list(range(3, 43))
PLAN = TrainingPlan(steps=6, lr=0.02, batch_size=3, eval_every=3)
PATHS = [HEAD, Q0, DOWN, Q1]


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[:3])


@pytest.fixture
def earlier(pico_base: BaseModel) -> list[ModelUpdate]:
    """Three directions whose modules and ranks differ."""
    return mixed_updates(pico_base)


def sd_lora(updates: Sequence[ModelUpdate], rank: int = 4, distill: float = 0.0) -> SDLora:
    settings = METHODS["sd-lora"].settings({"new_rank": rank, "distill": distill}, target=False)
    tuned = METHODS["sd-lora"].build(Ingredients(updates, seed=7), settings)
    assert isinstance(tuned, SDLora)
    return tuned


@torch.no_grad()
def of(base: BaseModel, tuned: SDLora) -> Tensor:
    with tuned.attached(base):
        return logits(base.model, TOKENS)


def unit(piece: LowRankUpdate) -> Tensor:
    """B A at Frobenius norm 1, dense; the scale goes with the norm."""
    dense = piece.scale * piece.B.double() @ piece.A.double()
    return dense / dense.norm()


def by_hand(tuned: SDLora, earlier: Sequence[ModelUpdate]) -> dict[str, Tensor]:
    """sum_k a_k N_k + a_t B_t A_t by module, in float64."""
    *old, new = tuned.coefficients[0].detach().double()
    deltas = {}
    for path in PATHS:
        key = path.replace(".", "/")
        delta = new * tuned.lora_B[key].detach().double() @ tuned.lora_A[key].detach().double()
        for magnitude, update in zip(old, earlier, strict=True):
            if path in update:
                delta = delta + magnitude * unit(update[path])
        deltas[path] = delta.float()
    return deltas


def plant(tuned: SDLora, parts: dict[int, float], earlier: Sequence[ModelUpdate]) -> None:
    """Makes the new direction the sum of these earlier unit directions, by their factors."""
    for path in PATHS:
        key = path.replace(".", "/")
        a, b = tuned.lora_A[key].data, tuned.lora_B[key].data
        a.zero_(), b.zero_()
        at = 0
        for number, weight in parts.items():
            if path not in earlier[number]:
                continue
            piece = earlier[number][path]
            size = piece.dense().double().norm().item()
            a[at : at + piece.rank] = piece.A
            b[:, at : at + piece.rank] = weight * piece.scale / size * piece.B
            at += piece.rank


def test_it_starts_with_all_magnitudes_at_one_and_no_new_direction(
    earlier: list[ModelUpdate],
) -> None:
    tuned = sd_lora(earlier)
    assert [row.tolist() for row in tuned.coefficients] == [[1.0] * 4]
    assert not any(b.any() for b in tuned.lora_B.values())
    for path in PATHS:
        a = tuned.lora_A[path.replace(".", "/")]
        # PEFT's own: Kaiming with a = sqrt(5), uniform within 1 / sqrt(in).
        assert float(a.detach().abs().max()) <= a.shape[1] ** -0.5
        assert float(a.detach().std()) == pytest.approx((3 * a.shape[1]) ** -0.5, rel=0.2)
    again = sd_lora(earlier).state()
    assert all(torch.equal(again[name], tensor) for name, tensor in tuned.state().items())


def test_it_is_the_sum_of_unit_directions_and_the_new_one(
    pico_base: BaseModel, earlier: list[ModelUpdate]
) -> None:
    tuned = sd_lora(earlier)
    generator = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    with torch.no_grad():
        expected = logits(DenseModel(pico_base, by_hand(tuned, earlier)), TOKENS)
        before = logits(pico_base.model, TOKENS)
    assert float((expected - before).abs().mean()) > 0.1
    torch.testing.assert_close(of(pico_base, tuned), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("stretch", "shrink"), [(4.0, 0.5), (-3.0, 7.0), (1e-3, 1e4)])
def test_neither_the_size_of_factors_nor_their_scale_matters(
    pico_base: BaseModel, earlier: list[ModelUpdate], stretch: float, shrink: float
) -> None:
    scaled = [
        {
            path: LowRankUpdate(stretch * p.A, p.B / shrink, math.copysign(2.5, stretch * p.scale))
            for path, p in update.items()
        }
        for update in earlier
    ]
    expected = of(pico_base, sd_lora(earlier))
    torch.testing.assert_close(of(pico_base, sd_lora(scaled)), expected, rtol=0, atol=2e-5)


def test_with_no_new_direction_training_changes_the_magnitudes_alone(
    pico_base: BaseModel, earlier: list[ModelUpdate], examples: list[Example]
) -> None:
    """With A_t and B_t at zero nothing of the new direction has a slope, its magnitude included."""
    tuned = sd_lora(earlier)
    for factor in (*tuned.lora_A.values(), *tuned.lora_B.values()):
        factor.data.zero_()
    before = copy.deepcopy(tuned.state())
    fit(pico_base, tuned, examples, examples, PLAN, Silent())
    changed = {
        name: int((tensor != before[name]).sum())
        for name, tensor in tuned.state().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {"coefficients.model": len(earlier)}


def test_training_leaves_the_earlier_directions_as_they_are(
    pico_base: BaseModel, earlier: list[ModelUpdate], examples: list[Example]
) -> None:
    tuned = sd_lora(earlier)
    frozen = copy.deepcopy(tuned.components)
    before = copy.deepcopy(tuned.state())
    trained, _ = fit(pico_base, tuned, examples, examples, PLAN, Silent())
    assert trained.best_loss < trained.history[0][1] - 0.01
    for path, piece in frozen.items():
        assert torch.equal(tuned.components[path].A, piece.A)
        assert torch.equal(tuned.components[path].B, piece.B)
    # All else is trained, in every module.
    after = tuned.state()
    assert len(after) == 1 + 2 * len(PATHS)
    assert all((after[name] != before[name]).float().mean() > 0.9 for name in after)
    # The sum as it was trained still is the sum of unit directions.
    with torch.no_grad():
        expected = logits(DenseModel(pico_base, by_hand(tuned, earlier)), TOKENS)
    torch.testing.assert_close(of(pico_base, tuned), expected, rtol=0, atol=1e-4)


def test_the_export_is_what_was_trained(
    pico_base: BaseModel, earlier: list[ModelUpdate], examples: list[Example], tmp_path: Path
) -> None:
    tuned = sd_lora(earlier, rank=4)
    fit(pico_base, tuned, examples, examples, PLAN, Silent())
    expected = of(pico_base, tuned)
    write_adapter(tmp_path, tuned.folded(), pico_base.id)
    update = read_adapter(tmp_path).update
    for path, piece in update.items():
        assert piece.rank == 4 + sum(one[path].rank for one in earlier if path in one)
    with with_adapter(pico_base, update), torch.no_grad():
        found = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def wide_enough(earlier: Sequence[ModelUpdate]) -> int:
    """A rank that holds any sum of the earlier directions."""
    return max(sum(u[path].rank for u in earlier if path in u) for path in PATHS)


@pytest.mark.parametrize("magnitude", [1.0, -2.5])
def test_distillation_absorbs_what_the_others_can_express(
    pico_base: BaseModel, earlier: list[ModelUpdate], magnitude: float
) -> None:
    """0.7 N_1 - 0.2 N_3 at a magnitude of its own, which goes with it."""
    tuned = sd_lora(earlier, wide_enough(earlier), distill=1e-9)
    plant(tuned, {0: 0.7, 2: -0.2}, earlier)
    tuned.coefficients[0].data.copy_(torch.tensor([0.5, 1.5, -1.0, magnitude]))
    before = of(pico_base, tuned)
    figures = tuned.finish()
    assert figures["absorbed"] == 1
    assert figures["unexpressed"] < 1e-12
    expected = [0.5 + 0.7 * magnitude, 1.5, -1.0 - 0.2 * magnitude, 0.0]
    assert tuned.coefficients[0].tolist() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(of(pico_base, tuned), before, rtol=0, atol=5e-5)
    # It no longer takes any rank.
    folded = tuned.folded()
    assert {path: p.rank for path, p in folded.items()} == {
        path: sum(u[path].rank for u in earlier if path in u) for path in folded
    }


def test_distillation_leaves_a_direction_of_its_own(
    pico_base: BaseModel, earlier: list[ModelUpdate]
) -> None:
    tuned = sd_lora(earlier, distill=0.5)
    generator = torch.Generator().manual_seed(0)
    for factor in (*tuned.lora_A.values(), *tuned.lora_B.values()):
        factor.data.copy_(torch.randn(factor.shape, generator=generator))
    before, state = of(pico_base, tuned), copy.deepcopy(tuned.state())
    figures = tuned.finish()
    assert figures["absorbed"] == 0
    assert figures["unexpressed"] > 0.9
    assert all(torch.equal(tensor, state[name]) for name, tensor in tuned.state().items())
    assert torch.equal(of(pico_base, tuned), before)


def test_the_unexpressed_share_is_that_of_least_squares(
    pico_base: BaseModel, earlier: list[ModelUpdate]
) -> None:
    """On all modules together, and at the threshold of the share of the squared norm."""
    tuned = sd_lora(earlier, wide_enough(earlier) + 4, distill=0.999)
    plant(tuned, {0: 0.5, 1: 0.5}, earlier)
    generator = torch.Generator().manual_seed(0)
    for factor in (*tuned.lora_A.values(), *tuned.lora_B.values()):
        part = factor.data[-4:] if factor in set(tuned.lora_A.values()) else factor.data[:, -4:]
        part.copy_(0.1 * torch.randn(part.shape, generator=generator))
    columns = torch.stack(
        [
            torch.cat(
                [
                    (unit(u[p]) if p in u else torch.zeros(pico_base.shapes[p])).double().ravel()
                    for p in PATHS
                ]
            )
            for u in earlier
        ],
        dim=1,
    )
    new = torch.cat(
        [
            (tuned.lora_B[k].detach().double() @ tuned.lora_A[k].detach().double()).ravel()
            for k in (p.replace(".", "/") for p in PATHS)
        ]
    )
    weights = torch.linalg.lstsq(columns, new[:, None]).solution[:, 0]
    left = float((new - columns @ weights).square().sum() / new.square().sum())
    figures = tuned.finish()
    assert 0.01 < left < 0.99
    assert figures == {"unexpressed": pytest.approx(left, abs=1e-9), "absorbed": 1.0}
    assert tuned.coefficients[0].tolist() == pytest.approx([*(1 + weights).tolist(), 0.0], abs=1e-6)


def test_the_loss_told_is_that_of_what_is_left(
    pico_base: BaseModel, earlier: list[ModelUpdate], examples: list[Example]
) -> None:
    tuned = sd_lora(earlier, distill=1.0)
    trained, figures = fit(pico_base, tuned, examples, examples, PLAN, Silent())
    assert figures["absorbed"] == 1
    with tuned.attached(pico_base):
        assert trained.best_loss == validation_loss(pico_base, examples, examples)
    assert trained.best_loss > dict(trained.history)[trained.best_step]


def test_without_distillation_nothing_is_absorbed(earlier: list[ModelUpdate]) -> None:
    tuned = sd_lora(earlier, wide_enough(earlier))
    plant(tuned, {0: 1.0}, earlier)
    assert tuned.finish() == {}
    assert tuned.coefficients[0].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("earlier", "rank"),
    [(1, 10), (3, 10), (4, 8), (7, 8), (8, 6), (30, 6)],
)
def test_the_rank_falls_with_the_number_of_directions(
    pico_base: BaseModel, earlier: int, rank: int
) -> None:
    assert reduced_rank(earlier) == rank
    updates = [mixed_updates(pico_base)[0]] * earlier
    settings = METHODS["sd-lora"].settings({"reduce_rank": True}, target=False)
    tuned = METHODS["sd-lora"].build(Ingredients(updates), settings)
    assert isinstance(tuned, SDLora)
    assert {a.shape[0] for a in tuned.lora_A.values()} == {rank}


def test_an_adapter_without_a_module_or_with_a_zero_one(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    """A zero has no direction: it stays zero, and nothing becomes NaN."""
    first, *others = mixed_updates(pico_base)
    zero = replace(first[Q0], B=torch.zeros_like(first[Q0].B))
    tuned = sd_lora([{**first, Q0: zero}, *others])
    without = sd_lora([{p: piece for p, piece in first.items() if p != Q0}, *others])
    torch.testing.assert_close(of(pico_base, tuned), of(pico_base, without), rtol=0, atol=1e-6)
    trained, _ = fit(pico_base, tuned, examples, examples, PLAN, Silent())
    assert math.isfinite(trained.best_loss)
