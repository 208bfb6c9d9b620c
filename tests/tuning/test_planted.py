"""Coefficients that are known: rows sampled from the base model with adapters at fixed strengths,
from which training has to find those strengths again."""

from collections.abc import Sequence

import pytest
import torch
from support.plain import DOWN, HEAD, Q0, Q1, DenseModel, random_update, weighted_sum
from torch import Tensor

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.forward import collate, mean_loss
from recycle_cli.engine.search import SearchPlan
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.lora.update import ModelUpdate
from recycle_cli.progress import Silent
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.mixture import Mixture, MixtureRecipe
from recycle_cli.tuning.tuned import Ingredients, fit

ROWS, LENGTH, PROMPT = 96, 24, (7, 50, 90)


@pytest.fixture(scope="module")
def updates(pico_base: BaseModel) -> list[ModelUpdate]:
    """Two adapters, one in four modules, one in three of them: the head, layer 0's q, layer 1's
    down and q, in the order of the coefficients."""
    return [
        random_update(pico_base, {HEAD: 2, Q0: 4, DOWN: 4, Q1: 4}, seed=10),
        random_update(pico_base, {Q0: 3, DOWN: 5, Q1: 6}, seed=20),
    ]


@torch.no_grad()
def sample(
    base: BaseModel, updates: Sequence[ModelUpdate], weights: Tensor, seed: int
) -> list[Example]:
    """Answers drawn token by token from the planted model, written as dense matrices."""
    model = DenseModel(base, weighted_sum(updates, weights))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(PROMPT).repeat(ROWS, 1)
    for _ in range(LENGTH):
        scores = model(tokens, use_cache=False).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(scores, 1, generator=generator)], dim=1)
    return [Example(PROMPT, tuple(row[len(PROMPT) :])) for row in tokens.tolist()]


def found_again(
    base: BaseModel,
    updates: Sequence[ModelUpdate],
    planted: Tensor,
    method: str,
    plan: TrainingPlan | SearchPlan,
) -> Tensor:
    """The strengths, (modules, adapters), that a method of the catalog finds in sampled rows.

    On rows of its own it has to be as good as the planted model itself, to 0.01 nats.
    """
    row = METHODS[method]
    tuned = row.build(Ingredients(updates), row.settings({}, target=False))
    assert isinstance(tuned, Mixture)
    rows, valid = (sample(base, updates, planted, seed) for seed in (1, 2))
    trained, _ = fit(base, tuned, rows, valid, plan, Silent())
    exact = Mixture(updates, MixtureRecipe("linear"), base.compute.device)
    for numbers, strengths in zip(exact.coefficients, planted, strict=True):
        numbers.data.copy_(strengths)
    with exact.attached(base):
        possible = mean_loss(base, [collate(base, valid)])
    assert trained.history[0][1] > possible + 0.1
    assert trained.best_loss < possible + 0.01
    return tuned.activated()


def assert_near(found: Tensor, planted: Tensor) -> None:
    """Some 2300 sampled tokens tell a strength to about a tenth."""
    difference = (found - planted).abs()
    assert float(difference.max()) < 0.25
    assert float(difference.square().mean().sqrt()) < 0.1


def training_plan(method: str) -> TrainingPlan:
    """At the method's own rate."""
    return TrainingPlan(steps=60, lr=METHODS[method].pace.lr, batch_size=32, eval_every=5)


def test_recycle_finds_one_number_a_module(
    pico_base: BaseModel, updates: list[ModelUpdate]
) -> None:
    planted = torch.tensor([[0.9, 0.0], [0.5, 0.8], [1.0, 0.4], [0.6, 0.0]])
    found = found_again(pico_base, updates, planted, "recycle", training_plan("recycle"))
    assert_near(found, planted)


def test_adamerging_finds_negative_ones_too(
    pico_base: BaseModel, updates: list[ModelUpdate]
) -> None:
    planted = torch.tensor([[0.9, 0.0], [-0.5, 0.8], [1.0, -0.4], [0.6, 0.0]])
    found = found_again(pico_base, updates, planted, "adamerging", training_plan("adamerging"))
    assert_near(found, planted)


def test_lorahub_finds_one_number_an_adapter(
    pico_base: BaseModel, updates: list[ModelUpdate]
) -> None:
    """Its penalty on their size draws them a little towards zero."""
    planted = torch.tensor([[0.7, 0.0], [0.7, -0.5], [0.7, -0.5], [0.7, -0.5]])
    found = found_again(pico_base, updates, planted, "lorahub", SearchPlan(steps=60, bound=1.5))
    assert_near(found, planted)
