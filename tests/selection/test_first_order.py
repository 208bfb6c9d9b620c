"""Slopes of the loss, against dense products and against the loss itself."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.low_rank import SEEDS, dense, random_piece

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.forward import answer_loss, collate
from recycle_cli.engine.gradients import weight_gradients
from recycle_cli.lora.update import LowRankUpdate
from recycle_cli.selection import first_order
from recycle_cli.selection.first_order import slopes
from recycle_cli.settings import Settings

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
    monkeypatch.setattr(first_order, "TOGETHER", 7)
    assert slopes(gradients, updates) == pytest.approx(whole, rel=1e-5, abs=1e-6)


def test_the_gradients_are_those_of_autograd(
    pico_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the batches, and with prompts that share their beginning."""
    monkeypatch.setattr("recycle_cli.engine.gradients.TOKENS_A_PASS", 20)
    found = weight_gradients(pico_base, EXAMPLES, list(pico_base.shapes))
    modules = {path: pico_base.model.get_submodule(path) for path in pico_base.shapes}
    try:
        pico_base.model.requires_grad_(True)
        answer_loss(pico_base, collate(pico_base, EXAMPLES)).backward()
        for path, module in modules.items():
            torch.testing.assert_close(found[path], module.weight.grad, rtol=1e-4, atol=1e-6)
    finally:
        pico_base.model.zero_grad(set_to_none=True)
        pico_base.model.requires_grad_(False)


def test_the_pass_back_ends_at_the_first_module_that_is_asked_for(pico_base: BaseModel) -> None:
    pico_base.model.requires_grad_(False)
    last = [path for path in pico_base.shapes if "layers.1.mlp" in path]
    whole = weight_gradients(pico_base, EXAMPLES, list(pico_base.shapes))
    reached = []
    first = pico_base.model.get_submodule("model.layers.0.self_attn.q_proj")
    handle = first.register_forward_hook(lambda *call: reached.append(call[2].requires_grad))
    try:
        found = weight_gradients(pico_base, EXAMPLES, last)
    finally:
        handle.remove()
    assert reached and not any(reached)
    assert sorted(found) == sorted(last)
    for path in last:
        torch.testing.assert_close(found[path], whole[path])


def test_lines_too_long_to_keep_their_scores(
    pico_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 on a CPU, where attention is computed in one of two ways."""
    base = load_base_model(str(pico_folder), Settings(tmp_path, True, "bfloat16", "cpu"))
    short = weight_gradients(base, EXAMPLES, list(base.shapes))
    monkeypatch.setattr("recycle_cli.engine.attention.SHORT_LINE", 0)
    long = weight_gradients(base, EXAMPLES, list(base.shapes))
    for path, gradient in short.items():
        assert (gradient - long[path]).norm() < 0.05 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slopes_have_the_digits_of_their_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    updates = [
        {name: random_piece(seed, 8, shape) for name, shape in SHAPES.items()} for seed in range(9)
    ]
    exact = [
        sum(float((gradients[name] * piece.dense()).sum()) for name, piece in update.items())
        for update in updates
    ]
    size = max(map(abs, exact))
    found = slopes(gradients, updates, dtype)
    assert found == pytest.approx(exact, abs=size * 4 * torch.finfo(dtype).eps)


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
