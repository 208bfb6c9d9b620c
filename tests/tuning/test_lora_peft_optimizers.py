"""PEFT's optimizers: that what is asked for reaches them."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from support.plain import CLOSED_ROWS
from torch import Tensor

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import encode_examples
from recycle_cli.engine.forward import answer_loss, collate
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.lora_form import LoraForm, Setup, former_of
from recycle_cli.tuning.lora_optimizers.pairs import factor_pairs
from recycle_cli.tuning.target_lora import LoraRecipe

PLAN = TrainingPlan(steps=1, lr=0.01)
RECIPE = LoraRecipe(rank=3, alpha=6, dropout=0.0, target_modules=("q_proj", "down_proj"))


@contextlib.contextmanager
def moved_by(
    base: BaseModel, name: str, **own: float
) -> Iterator[tuple[LoraForm, torch.optim.Optimizer]]:
    """A form with gradients, B away from zero, and its optimizer before the first step."""
    settings = METHODS["lora"].settings({"optimizer": name, **own}, target=False)
    examples = encode_examples(base, CLOSED_ROWS)
    setup = Setup(base, RECIPE, PLAN, examples)
    with former_of(settings)(setup) as form:
        torch.manual_seed(5)
        for _, b in factor_pairs(form.parameters).values():
            torch.nn.init.normal_(b, std=0.3)
        optimizer = form.hooks.optimizer(form.parameters, PLAN)
        answer_loss(base, collate(base, examples)).backward()
        yield form, optimizer


@pytest.mark.parametrize("lr_ratio", [16.0, 3.0])
def test_loraplus_gives_b_a_multiple_of_the_rate_of_a(
    pico_base: BaseModel, lr_ratio: float
) -> None:
    with moved_by(pico_base, "loraplus", lr_ratio=lr_ratio) as (form, optimizer):
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert len(rates) == len(form.parameters)
        for a, b in factor_pairs(form.parameters).values():
            assert rates[id(a)] == PLAN.lr
            assert rates[id(b)] == pytest.approx(lr_ratio * PLAN.lr)


@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_a_riemannian_step_is_that_of_the_equations(pico_base: BaseModel, damping: float) -> None:
    """Adam's first step, of the gradients by the inverse Gram matrices."""
    with moved_by(pico_base, "riemannian", damping=damping) as (form, optimizer):
        pairs = factor_pairs(form.parameters).values()
        expected = []
        for a, b in pairs:
            assert a.grad is not None
            assert b.grad is not None
            held = damping * torch.eye(len(a))
            expected.append(after_adam(a, torch.linalg.solve(b.T @ b + held, a.grad)))
            expected.append(after_adam(b, torch.linalg.solve(a @ a.T + held, b.grad.T).T))
        optimizer.step()
        for found, wanted in zip(
            (factor for pair in pairs for factor in pair), expected, strict=True
        ):
            # Signs of what is next to nothing may differ.
            assert (found - wanted).abs().median() < 1e-6
            assert (found - wanted).norm() < 0.02 * PLAN.lr * found.numel() ** 0.5


def after_adam(factor: Tensor, gradient: Tensor) -> Tensor:
    """After a first step."""
    return (factor - PLAN.lr * gradient / (gradient.abs() + 1e-8)).detach()
