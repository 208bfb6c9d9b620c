"""Slopes of the loss, against dense products and against the loss itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.low_rank import SEEDS, dense, random_piece

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.forward import answer_loss, collate
from recycle_cli.engine.gradients import weight_gradients
from recycle_cli.lora.update import LowRankUpdate
from recycle_cli.selection import first_order
from recycle_cli.selection.first_order import slopes

SHAPES = {"q": (7, 5), "down": (4, 9)}
EXAMPLES = [
    Example((1, *range(10, 16 + length)), (20 + length, 30, 2)[: 1 + length % 3])
    for length in range(7)
]


@given(st.lists(st.lists(st.sampled_from(list(SHAPES)), unique=True), max_size=5), SEEDS)
def test_the_slope_is_the_dense_inner_product(modules: list[list[str]], seed: int) -> None:
    gradients = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(seed % 1000))
        for name, shape in SHAPES.items()
    }
    updates = [
        {name: random_piece(seed + at, 1 + at, SHAPES[name], 0.5 + at) for name in own}
        for at, own in enumerate(modules)
    ]
    expected = [
        sum(float((gradients[n].double().numpy() * dense(p)).sum()) for n, p in update.items())
        for update in updates
    ]
    assert slopes(gradients, updates) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_more_adapters_than_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = {"q": torch.randn(SHAPES["q"])}
    updates = [{"q": random_piece(at, 2, SHAPES["q"])} for at in range(10)]
    whole = slopes(gradients, updates)
    monkeypatch.setattr(first_order, "TOGETHER", 3)
    assert slopes(gradients, updates) == pytest.approx(whole, rel=1e-5, abs=1e-6)


def test_the_gradients_are_those_of_autograd(pico_base: BaseModel) -> None:
    """Whatever the batches, and with prompts that share their beginning."""
    found = weight_gradients(pico_base, EXAMPLES, list(pico_base.shapes), batch_size=3)
    modules = {path: pico_base.model.get_submodule(path) for path in pico_base.shapes}
    try:
        pico_base.model.requires_grad_(True)
        answer_loss(pico_base, collate(pico_base, EXAMPLES)).backward()
        for path, module in modules.items():
            torch.testing.assert_close(found[path], module.weight.grad, rtol=1e-4, atol=1e-6)
    finally:
        pico_base.model.zero_grad(set_to_none=True)
        pico_base.model.requires_grad_(False)


def test_nothing_is_left_on_the_model(pico_base: BaseModel) -> None:
    def state() -> list[object]:
        weights = [(p.requires_grad, p.grad) for p in pico_base.model.parameters()]
        return [weights, [len(module._forward_hooks) for module in pico_base.model.modules()]]

    pico_base.model.requires_grad_(False)
    before, was = answer_loss(pico_base, collate(pico_base, EXAMPLES)), state()
    weight_gradients(pico_base, EXAMPLES, list(pico_base.shapes))
    assert state() == was
    after = answer_loss(pico_base, collate(pico_base, EXAMPLES))
    assert after.requires_grad == before.requires_grad
    assert torch.equal(before, after)


def test_a_small_step_along_an_adapter_changes_the_loss_by_its_slope(pico_base: BaseModel) -> None:
    paths = [path for path in pico_base.shapes if "layers.0" in path]
    updates = [
        {path: random_piece(seed, 3, pico_base.shapes[path], 1.0, 0.1) for path in paths}
        for seed in (1, 2, 3)
    ]
    gradients = weight_gradients(pico_base, EXAMPLES, paths)
    batch = collate(pico_base, EXAMPLES)
    step = 1e-3

    def loss(update: dict[str, LowRankUpdate], scale: float) -> float:
        scaled = {p: LowRankUpdate(u.A, u.B, scale * u.scale) for p, u in update.items()}
        with with_adapter(pico_base, scaled), torch.no_grad():
            return float(answer_loss(pico_base, batch).double())

    for update, slope in zip(updates, slopes(gradients, updates), strict=True):
        difference = (loss(update, step) - loss(update, -step)) / (2 * step)
        assert slope == pytest.approx(difference, rel=0.05, abs=2e-3)
