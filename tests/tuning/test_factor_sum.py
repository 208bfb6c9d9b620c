import numpy as np
import pytest
import torch
from support.plain import DOWN, HEAD, Q0, Q1, DenseModel, logits, mixed_updates
from torch import Tensor

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.search import SearchPlan
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.lora.update import ModelUpdate
from recycle_cli.progress import Silent
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.factor_sum import FactorSum, stack
from recycle_cli.tuning.tuned import Ingredients, fit

CPU = torch.device("cpu")
TOKENS = list(range(3, 43))
WEIGHTS = [0.7, -0.4, 1.3]


def ingredients_of(base: BaseModel, target: int | None = None) -> Ingredients:
    return Ingredients(mixed_updates(base), target, seed=2)


def by_numpy(updates: list[ModelUpdate], weights: list[float]) -> dict[str, Tensor]:
    """(sum_i w_i s_i B_i)(sum_i w_i A_i) in float64, ranks filled up with zeros."""
    deltas = {}
    for path in {path for update in updates for path in update}:
        own = [(w, u[path]) for w, u in zip(weights, updates, strict=True) if path in u]
        rank = max(piece.rank for _, piece in own)
        a = np.zeros((rank, own[0][1].shape[1]))
        b = np.zeros((own[0][1].shape[0], rank))
        for weight, piece in own:
            a[: piece.rank] += weight * piece.A.double().numpy()
            b[:, : piece.rank] += weight * piece.scale * piece.B.double().numpy()
        deltas[path] = torch.from_numpy(b @ a).float()
    return deltas


def weighted(base: BaseModel, weights: list[float]) -> FactorSum:
    summed = FactorSum(ingredients_of(base), init="one", l1=0.05)
    summed.weights.data.copy_(torch.tensor(weights))
    return summed


@torch.no_grad()
def of(base: BaseModel, summed: FactorSum) -> Tensor:
    with summed.attached(base):
        return logits(base.model, TOKENS)


def test_factors_are_summed_before_the_product(pico_base: BaseModel) -> None:
    summed = weighted(pico_base, WEIGHTS)
    deltas = by_numpy(mixed_updates(pico_base), WEIGHTS)
    with torch.no_grad():
        expected = logits(DenseModel(pico_base, deltas), TOKENS)
    torch.testing.assert_close(of(pico_base, summed), expected, rtol=0, atol=5e-5)
    for path, piece in summed.result().items():
        torch.testing.assert_close(piece.dense(), deltas[path], rtol=0, atol=1e-6)


def test_the_cross_terms_are_what_a_mixture_has_not(pico_base: BaseModel) -> None:
    updates = mixed_updates(pico_base)
    with_terms = by_numpy(updates, WEIGHTS)
    for path, there in {Q0: (0, 1), DOWN: (0, 2), Q1: (1, 2)}.items():
        plain = sum(WEIGHTS[at] * updates[at][path].dense() for at in there)
        assert torch.dist(with_terms[path], plain) > 0.1 * torch.linalg.norm(plain)
    # Where one adapter alone has a module, its weight counts twice.
    torch.testing.assert_close(
        with_terms[HEAD], WEIGHTS[0] ** 2 * updates[0][HEAD].dense(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_adapter_at_weight_one_is_itself(pico_base: BaseModel, at: int) -> None:
    update = mixed_updates(pico_base)[at]
    summed = weighted(pico_base, [float(at == one) for one in range(3)])
    with with_adapter(pico_base, update), torch.no_grad():
        expected = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(of(pico_base, summed), expected, rtol=0, atol=2e-5)


def test_the_result_is_one_lora_of_the_largest_rank(pico_base: BaseModel) -> None:
    summed = weighted(pico_base, WEIGHTS)
    result = summed.result()
    assert {p: u.rank for p, u in result.items()} == {Q0: 5, Q1: 4, DOWN: 7, HEAD: 2}
    with with_adapter(pico_base, result), torch.no_grad():
        found = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(found, of(pico_base, summed), rtol=0, atol=2e-5)


def test_from_zero_it_starts_as_the_base_and_has_no_slope(pico_base: BaseModel) -> None:
    with torch.no_grad():
        before = logits(pico_base.model, TOKENS)
    summed = FactorSum(ingredients_of(pico_base), init="zero", l1=0.0)
    assert torch.equal(of(pico_base, summed), before)
    with summed.attached(pico_base):
        logits(pico_base.model, TOKENS).square().sum().backward()
    assert summed.weights.grad is not None
    assert not summed.weights.grad.any()


def test_a_gradient_is_that_of_the_dense_product(pico_base: BaseModel) -> None:
    summed = weighted(pico_base, WEIGHTS)
    with summed.attached(pico_base):
        logits(pico_base.model, TOKENS)[-1].logsumexp(0).backward()
    weights = torch.tensor(WEIGHTS, requires_grad=True)
    deltas = {}
    for path, piece in stack(mixed_updates(pico_base), CPU).items():
        w = weights[piece.owners]
        deltas[path] = torch.einsum("k,kmr->mr", w, piece.B) @ torch.einsum("k,krn->rn", w, piece.A)
    logits(DenseModel(pico_base, deltas), TOKENS)[-1].logsumexp(0).backward()
    torch.testing.assert_close(summed.weights.grad, weights.grad, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def sampled(base: BaseModel, update: ModelUpdate, seed: int, rows: int = 64) -> list[Example]:
    """Answers of 20 tokens, drawn one by one from the base model with an adapter on it."""
    model = DenseModel(base, {path: piece.dense() for path, piece in update.items()})
    generator = torch.Generator().manual_seed(seed)
    prompt = (7, 50, 90)
    tokens = torch.tensor(prompt).repeat(rows, 1)
    for _ in range(20):
        scores = model(tokens, use_cache=False).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(scores, 1, generator=generator)], dim=1)
    return [Example(prompt, tuple(row[len(prompt) :])) for row in tokens.tolist()]


@pytest.mark.parametrize("optimizer", ["ngopt", "adamw"])
def test_the_adapter_that_rows_come_from_is_found(pico_base: BaseModel, optimizer: str) -> None:
    """Up to the sign of all weights, which the product does not tell apart."""
    updates = mixed_updates(pico_base)
    init = "zero" if optimizer == "ngopt" else "equal"
    summed = FactorSum(Ingredients(updates), init=init, l1=0.0)
    plan = (
        SearchPlan(steps=80, bound=1.5)
        if optimizer == "ngopt"
        else TrainingPlan(steps=60, lr=5e-2, batch_size=32, eval_every=10)
    )
    rows, valid = (sampled(pico_base, updates[0], seed) for seed in (1, 2))
    fit(pico_base, summed, rows, valid, plan, Silent())
    found = summed.weights.detach()
    torch.testing.assert_close(found * found[0].sign(), torch.tensor([1.0, 0, 0]), rtol=0, atol=0.2)


def test_starts_penalty_and_shares(pico_base: BaseModel) -> None:
    given = ingredients_of(pico_base, target=1)
    assert FactorSum(given, init="one-hot", l1=0.0).weights.tolist() == [0, 1, 0]
    equal = FactorSum(given, init="equal", l1=0.0)
    assert equal.weights.tolist() == pytest.approx([3**-0.5] * 3)
    assert equal.penalty() is None
    summed = weighted(pico_base, WEIGHTS)
    penalty = summed.penalty()
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.05 * 2.4 / 3)
    assert [s.mean for s in summed.shares()] == pytest.approx(WEIGHTS)
    assert [s.max_abs for s in summed.shares()] == pytest.approx([0.7, 0.4, 1.3])


def test_the_presets_differ_in_nothing_but_the_form() -> None:
    mine, other = METHODS["lorahub-factors"], METHODS["lorahub"]
    assert mine.pace == other.pace
    assert mine.defaults.items() <= other.defaults.items()
