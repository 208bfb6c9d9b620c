import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import low_rank, plain
from support.plain import CLOSED_ROWS, DOWN, HEAD, Q0, Q1, logits, mixed_updates, random_update
from torch import Tensor, nn
from torch.nn import functional

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.forward import answer_loss, collate
from recycle_cli.engine.routing import put_on, route
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.lora.routed import read_routed, write_routed
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.progress import Silent
from recycle_cli.records import AdapterRef
from recycle_cli.tuning.arrow import HEARD_ROWS, Router
from recycle_cli.tuning.mixture import parameter_name
from recycle_cli.tuning.tuned import Ingredients, fit

TOKENS = list(range(3, 43))
V0 = "model.layers.0.self_attn.v_proj"
PRESENT = {DOWN: [0, 2], HEAD: [0, 2], Q0: [0, 1], V0: [1], Q1: [1, 2]}
REFS = [AdapterRef(id=name, sha256=name * 64, path=name) for name in "abc"]


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS)


@pytest.fixture(scope="module")
def updates(pico_base: BaseModel) -> list[ModelUpdate]:
    """Three adapters whose ranks, modules and kinds of scale differ: alpha / sqrt(rank) as rsLoRA
    has it, alpha / rank, and one below zero."""
    rslora, usual, odd = mixed_updates(pico_base)
    return [
        {path: LowRankUpdate(p.A, p.B, 2 / math.sqrt(p.rank)) for path, p in rslora.items()},
        {
            path: LowRankUpdate(p.A, p.B, 2 / p.rank)
            for path, p in {**usual, **random_update(pico_base, {V0: 3}, seed=40)}.items()
        },
        {**odd, **random_update(pico_base, {HEAD: 3}, seed=50)},
    ]


def made(updates: list[ModelUpdate], top_k: int = 4, temperature: float = 1.0) -> Router:
    return Router(Ingredients(updates), top_k=top_k, temperature=temperature)


def of(router: Router, path: str) -> nn.Parameter:
    vectors: nn.Parameter = router.prototypes[parameter_name(path)]
    return vectors


def added_to(token: Tensor, pieces: list[LowRankUpdate], vectors: Tensor, by: Router) -> Tensor:
    """What the adapters add for one token, one adapter after the other."""
    scores = [(token @ vector).abs() / by.temperature for vector in vectors]
    order = sorted(range(len(scores)), key=lambda at: -scores[at].item())
    chosen = order[: by.top_k or len(scores)]
    highest = scores[chosen[0]].item()
    exps = {at: (scores[at] - highest).exp() for at in chosen}
    total = torch.stack([*exps.values()]).sum()
    parts = [
        exps[at] / total * pieces[at].scale * (pieces[at].B @ (pieces[at].A @ token))
        for at in chosen
    ]
    return torch.stack(parts).sum(0)


@contextmanager
def by_hand(
    base: BaseModel, updates: list[ModelUpdate], vectors: Mapping[str, Tensor], router: Router
) -> Iterator[None]:
    """The model with the adapters on it, token by token and adapter by adapter."""

    def hook(path: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        pieces = [updates[at][path] for at in PRESENT[path]]

        def add(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            tokens = inputs[0].flatten(0, -2)
            added = [added_to(token, pieces, vectors[path], router) for token in tokens]
            return output + torch.stack(added).view_as(output)

        return add

    hooks = [base.model.get_submodule(p).register_forward_hook(hook(p)) for p in PRESENT]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


# --- prototypes ----------------------------------------------------------------------------------


def test_a_prototype_is_the_top_right_singular_vector(updates: list[ModelUpdate]) -> None:
    router = made(updates)
    for path, present in PRESENT.items():
        assert router.modules_of[path].present.tolist() == present
        for vector, at in zip(of(router, path).detach(), present, strict=True):
            _, values, right = np.linalg.svd(low_rank.dense(updates[at][path]))
            assert values[0] > 1.01 * values[1], "else it is not one direction"
            assert abs(float(vector.double().numpy() @ right[0])) == pytest.approx(1, abs=1e-6)


def test_a_prototype_does_not_change_with_the_size_of_an_adapter(
    updates: list[ModelUpdate],
) -> None:
    larger: list[ModelUpdate] = [
        {p: LowRankUpdate(3 * u.A, u.B / 7, -5 * u.scale) for p, u in one.items()}
        for one in updates
    ]
    for one, other in zip(made(updates).parameters(), made(larger).parameters(), strict=True):
        overlap = (one * other).sum(1).abs()
        torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-5)


def test_an_adapter_that_does_nothing_points_nowhere() -> None:
    update = {Q0: LowRankUpdate(torch.randn(2, 32), torch.zeros(32, 2), 1.0)}
    assert not next(made([update]).parameters()).any()


def test_prototypes_and_their_products_are_float32_on_a_narrow_model(
    updates: list[ModelUpdate],
) -> None:
    narrow = Ingredients(updates, dtype=torch.bfloat16)
    router = Router(narrow, top_k=2, temperature=1.0)
    assert {p.dtype for p in router.parameters()} == {torch.float32}
    assert router.modules_of[Q0].A.dtype == torch.bfloat16
    for one, other in zip(router.parameters(), made(updates).parameters(), strict=True):
        assert torch.equal(one, other)
    x = torch.randn(5, 32).bfloat16()
    shares = route(x, of(router, Q0), 2, 1.0)
    assert shares.dtype == torch.float32
    assert torch.equal(shares, route(x.float(), of(router, Q0), 2, 1.0))


# --- routing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 1, 3, 5, 9])
def test_shares_sum_to_one_over_so_many(top_k: int) -> None:
    x, prototypes = torch.randn(7, 8), torch.randn(5, 8)
    shares = route(x, prototypes, top_k, 1.0)
    torch.testing.assert_close(shares.sum(-1), torch.ones(7))
    assert ((shares > 0).sum(-1) == min(top_k or 5, 5)).all()
    assert shares.argmax(-1).equal(functional.linear(x, prototypes).abs().argmax(-1))


@pytest.mark.parametrize("top_k", [0, 2])
def test_a_temperature_near_zero_takes_the_nearest(top_k: int) -> None:
    x, prototypes = 100 * torch.randn(7, 8), torch.randn(5, 8)
    shares = route(x, prototypes, top_k, 1e-37)
    assert shares.equal(route(x, prototypes, 1, 1.0))


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (0, 3.0), (9, 1.0)])
def test_tokens_are_routed_as_by_hand(
    pico_base: BaseModel, updates: list[ModelUpdate], top_k: int, temperature: float
) -> None:
    router = made(updates, top_k, temperature)
    generator = torch.Generator().manual_seed(4)
    for path, forward in router.forwards(pico_base, 0).items():
        linear = pico_base.model.get_submodule(path)
        x = torch.randn(2, 6, linear.in_features, generator=generator)
        pieces = [updates[at][path] for at in PRESENT[path]]
        with torch.no_grad():
            added = [added_to(t, pieces, of(router, path), router) for t in x.flatten(0, 1)]
            expected = functional.linear(x, linear.weight) + torch.stack(added).view(2, 6, -1)
            torch.testing.assert_close(forward(linear, x), expected, rtol=0, atol=1e-5)


def test_rows_beside_a_row_have_no_say(pico_base: BaseModel, updates: list[ModelUpdate]) -> None:
    rows = torch.tensor([TOKENS, TOKENS[::-1]])
    with torch.no_grad(), made(updates, top_k=1).attached(pico_base):
        together = pico_base.model(rows, use_cache=False).logits
        for row, found in zip(rows, together, strict=True):
            torch.testing.assert_close(logits(pico_base.model, row), found, rtol=0, atol=1e-5)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 0])
def test_gradients_are_those_of_plain_autograd(
    pico_base: BaseModel, updates: list[ModelUpdate], examples: list[Example], top_k: int
) -> None:
    router = made(updates, top_k, temperature=0.7)
    rows = examples[:3]
    vectors = {path: of(router, path).detach().clone().requires_grad_() for path in PRESENT}
    with by_hand(pico_base, updates, vectors, router):
        expected = plain.loss(pico_base.model, rows)
        expected.backward()
    with router.attached(pico_base):
        found = answer_loss(pico_base, collate(pico_base, rows))
        found.backward()
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    for path in PRESENT:
        grad = of(router, path).grad
        assert grad is not None
        # One adapter has it all, however it points.
        alone = top_k == 1 or len(PRESENT[path]) == 1
        assert (float(grad.abs().max()) > 1e-3) is not alone
        torch.testing.assert_close(grad, vectors[path].grad, rtol=1e-3, atol=1e-6)


def test_training_lowers_the_loss_and_the_file_holds_what_was_trained(
    pico_base: BaseModel, updates: list[ModelUpdate], examples: list[Example], tmp_path: Path
) -> None:
    router = made(updates, top_k=2)

    @torch.no_grad()
    def now() -> Tensor:
        with router.attached(pico_base):
            return logits(pico_base.model, TOKENS)

    start = now()
    plan = TrainingPlan(steps=12, lr=0.1, batch_size=3, eval_every=3)
    trained, _ = fit(pico_base, router, examples[:3], examples[:3], plan, Silent())
    assert trained.best_loss < trained.history[0][1]
    expected = now()
    assert (expected - start).abs().max() > 1e-3
    write_routed(tmp_path, router.result(), pico_base.id, REFS)
    adapter, base_name = read_routed(tmp_path)
    assert base_name == pico_base.id
    with put_on(pico_base, adapter), torch.no_grad():
        found = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# --- shares --------------------------------------------------------------------------------------


@torch.no_grad()
def inputs_of(base: BaseModel, router: Router, example: Example) -> dict[str, Tensor]:
    """What each module reads, (tokens, in), when a whole row goes through the model by itself."""
    seen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, inputs: seen.update({path: inputs[0][0]})

    hooks = [base.model.get_submodule(p).register_forward_pre_hook(keep(p)) for p in PRESENT]
    with router.attached(base):
        logits(base.model, example.prompt + example.answer)
    for hook in hooks:
        hook.remove()
    return seen


def test_shares_are_means_over_the_tokens_of_each_row(
    pico_base: BaseModel, updates: list[ModelUpdate], examples: list[Example]
) -> None:
    router = made(updates, top_k=1, temperature=0.5)
    rows = examples * 2
    assert len(rows) > HEARD_ROWS
    counts = {path: torch.zeros(len(present)) for path, present in PRESENT.items()}

    def count(path: str, x: Tensor) -> None:
        nearest = (x @ of(router, path).detach().T).abs().argmax(-1)
        counts[path] += functional.one_hot(nearest, len(counts[path])).sum(0)

    for example in rows[:HEARD_ROWS]:
        seen = inputs_of(pico_base, router, example)
        # Only the positions that an answer is read from go through the head.
        seen[HEAD] = seen[HEAD][len(example.prompt) - 1 : -1]
        for path, x in seen.items():
            count(path, x)

    assert [share.mean for share in router.shares()] == [0, 0, 0]
    router.prepare(pico_base, rows)
    shares = router.shares()
    for at, share in enumerate(shares):
        own = [
            float(counts[path][present.index(at)] / counts[path].sum())
            for path, present in PRESENT.items()
            if at in present
        ]
        assert share.mean == pytest.approx(sum(own) / len(own), abs=1e-6)
        assert share.max_abs == pytest.approx(max(own), abs=1e-6)
    assert shares[1].max_abs == 1  # alone in one module
    assert 0 < shares[0].mean < 1
