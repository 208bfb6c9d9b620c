"""Dual LoRA: its product, its gradients and its merge, against dense matrices in float64."""

import copy
from pathlib import Path

import pytest
import torch
from support.plain import CLOSED_ROWS, DOWN, Q0, DenseModel, logits
from torch import Tensor, nn

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.errors import InputError
from recycle_cli.lora.folder import read_adapter, write_adapter
from recycle_cli.lora.truncation import parse_rank_policy, truncate
from recycle_cli.progress import Silent
from recycle_cli.tuning.lora_architectures.dual import DualLora
from recycle_cli.tuning.target_lora import LoraRecipe
from recycle_cli.tuning.tuned import fit

TOKENS = list(range(3, 43))
PLAN = TrainingPlan(steps=8, lr=0.02, batch_size=3, eval_every=4, warmup=0.0)
RECIPE = LoraRecipe(rank=5, alpha=8, dropout=0.0, target_modules=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[:3])


@pytest.fixture
def dual(pico_base: BaseModel) -> DualLora:
    """At full weight, with factors large enough to matter."""
    made = DualLora(pico_base, RECIPE, steps=100, seed=1)
    made.weight.fill_(1)
    with torch.no_grad():
        for factor in made.parameters():
            factor.mul_(10)
    return made


def by_hand(dual: DualLora, path: str) -> Tensor:
    """c ReLU(B A) (.) Sign(D C) from the paper's formula, in float64, with r_1 = 3 and r_2 = 2."""
    a, b, c, d = (factor.detach().double() for factor in dual.pairs(path))
    assert (a.shape[0], c.shape[0]) == (3, 2)
    sign = torch.where(d @ c > 0, 1.0, -1.0).double()
    return 8 / 6**0.5 * torch.clamp(b @ a, min=0) * sign


@torch.no_grad()
def test_merged_into_the_weights_it_is_the_same_model(pico_base: BaseModel, dual: DualLora) -> None:
    """Which it is not where ReLU and Sign act on B A x instead of B A."""
    with dual.attached(pico_base):
        found = logits(pico_base.model, TOKENS)
    deltas = {path: by_hand(dual, path).float() for path in dual.targets}
    expected = logits(DenseModel(pico_base, deltas), TOKENS)
    assert float((expected - logits(pico_base.model, TOKENS)).abs().mean()) > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_which_entries_change_and_which_way(dual: DualLora) -> None:
    for path in dual.targets:
        a, b, c, d = (factor.detach() for factor in dual.pairs(path))
        delta = dual.delta(path)
        assert 0.3 < float((delta == 0).float().mean()) < 0.7
        assert torch.equal(delta == 0, b @ a <= 0)
        changed = delta != 0
        assert torch.equal(delta[changed] > 0, (d @ c > 0)[changed])
        assert torch.linalg.matrix_rank(delta.double()) == min(delta.shape)


def test_a_direction_of_zero_counts_as_negative(dual: DualLora) -> None:
    dual.pairs(Q0)[3].data.zero_()
    delta = dual.delta(Q0)
    assert float(delta.max()) == 0
    assert float(delta.min()) < -0.01


class Straight(torch.autograd.Function):
    """Sign, whose gradient passes on clipped: the paper's estimator, written out for autograd."""

    seen: Tensor

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return torch.where(x > 0, 1.0, -1.0).to(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        Straight.seen = grad
        return grad.clamp(-1, 1)


@pytest.mark.parametrize("size", [0.1, 50.0])
def test_gradients_are_those_of_the_formula(dual: DualLora, size: float) -> None:
    """Those of autograd through ReLU and the straight-through sign, in float64; with outputs whose
    gradients are small, and so large that they are clipped."""
    dual.double()
    module = nn.Linear(32, 32, bias=False).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 32, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = size * torch.randn(2, 7, 32, generator=generator, dtype=torch.float64)
    factors = dual.pairs(Q0)
    forward = dual.forwards(None, 0)[Q0]  # type: ignore[arg-type]  # of no use to it
    y = forward(module, x)
    found = torch.autograd.grad(y, [x, *factors], upstream)

    a, b, c, d = factors
    delta = dual.scales[Q0] * torch.relu(b @ a) * Straight.apply(d @ c)  # type: ignore[no-untyped-call]
    expected_y = x @ (module.weight + delta).T
    expected = torch.autograd.grad(expected_y, [x, *factors], upstream)
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    assert bool((Straight.seen.abs() > 1).any()) == (size > 1)
    for one, two in zip(found, expected, strict=True):
        assert float(two.abs().max()) > 0
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_factors_of_zero_would_have_no_gradient(dual: DualLora) -> None:
    """Why it cannot start as an ordinary LoRA does."""
    a, b, c, d = dual.pairs(Q0)
    b.data.zero_()
    module = nn.Linear(32, 32, bias=False)
    forward = dual.forwards(None, 0)[Q0]  # type: ignore[arg-type]  # of no use to it
    forward(module, torch.randn(5, 32)).square().sum().backward()
    assert all(factor.grad is not None and not factor.grad.any() for factor in (a, b, c, d))


def test_it_starts_as_the_base_and_warms_up(pico_base: BaseModel) -> None:
    fresh = DualLora(pico_base, RECIPE, steps=1000, seed=1)
    with torch.no_grad():
        before = logits(pico_base.model, TOKENS)
        with fresh.attached(pico_base):
            assert torch.equal(logits(pico_base.model, TOKENS), before)
    spreads = torch.cat([factor.detach().flatten() for factor in fresh.parameters()])
    assert float(spreads.std()) == pytest.approx(0.02, rel=0.1)
    weights = []
    for _ in range(60):
        fresh.after_step()
        weights.append(float(fresh.weight))
    assert weights[:49] == pytest.approx([step / 50 for step in range(1, 50)], abs=1e-9)
    assert weights[50:] == [1.0] * 10
    # A short training has a short warm-up.
    assert DualLora(pico_base, RECIPE, steps=10, seed=1).warmup == 5


def test_training_ends_at_the_weight_of_its_best_step(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    before = copy.deepcopy(pico_base.model.state_dict())
    dual = DualLora(pico_base, RECIPE, steps=PLAN.steps, seed=1)
    with torch.no_grad():
        for factor in dual.parameters():
            factor.mul_(5)
    trained, _ = fit(pico_base, dual, examples, examples, PLAN, Silent())
    assert trained.best_loss < trained.history[0][1] - 0.05
    assert float(dual.weight) == pytest.approx(min(1, trained.best_step / 4))
    after = pico_base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_export_is_exact_or_tells_what_it_lost(
    pico_base: BaseModel, dual: DualLora, tmp_path: Path
) -> None:
    with torch.no_grad(), dual.attached(pico_base):
        expected = logits(pico_base.model, TOKENS)
    write_adapter(tmp_path, truncate(dual.result(), parse_rank_policy("full")).update, "pico")
    update = read_adapter(tmp_path).update
    assert {piece.rank for piece in update.values()} == {32}
    with torch.no_grad(), with_adapter(pico_base, update):
        found = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    cut = truncate(dual.result(), parse_rank_policy("6"))
    error = sum(
        float((dual.delta(path).double() - piece.dense()).square().sum())
        for path, piece in cut.update.items()
    )
    tail = whole = 0.0
    for path in dual.targets:
        values = torch.linalg.svdvals(dual.delta(path).double())
        tail += float(values[6:].square().sum())
        whole += float(values.square().sum())
    assert error == pytest.approx(tail, rel=1e-6)
    assert 1 - cut.energy_kept == pytest.approx(tail / whole, rel=1e-6)


def test_it_takes_as_many_numbers_as_a_lora(dual: DualLora) -> None:
    assert DOWN in dual.targets
    lora = sum(5 * sum(target.shape) for target in dual.targets.values())
    assert sum(factor.numel() for factor in dual.parameters()) == lora


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (LoraRecipe(rank=1), "halves its rank"),
        (LoraRecipe(rank=4, rank_pattern={"q_proj": 1}), "q_proj is 1"),
        (LoraRecipe(rank=4, use_rslora=True), "a scale of its own"),
    ],
)
def test_what_it_cannot_do_is_refused(
    pico_base: BaseModel, recipe: LoraRecipe, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        DualLora(pico_base, recipe, steps=10, seed=0)
