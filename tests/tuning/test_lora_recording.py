"""What is recorded of a pass, against autograd's gradients of the weights themselves."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support.plain import CLOSED_ROWS
from torch import Tensor

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.checkpointing import gradient_checkpointing
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.forward import answer_loss, collate, mean_loss
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.progress import Silent
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.lora_form import Setup, form_budget, former_of, train_form
from recycle_cli.tuning.lora_optimizers.gradient_norm import EXACT_ROWS
from recycle_cli.tuning.lora_optimizers.low_rank_optimizer import Kfac, LowRankOptimizer, Rule
from recycle_cli.tuning.lora_optimizers.low_rank_sum import Metric, Term, low_rank_sum
from recycle_cli.tuning.lora_optimizers.recording import Recorder
from recycle_cli.tuning.peft_layers import ADAPTER, factor_pair, peft_layers
from recycle_cli.tuning.target_lora import LoraRecipe, target_lora

RECIPE = LoraRecipe(
    rank=3, alpha=9, dropout=0.0, alpha_pattern={"down_proj": 2}, rank_pattern={"q_proj": 5}
)
RULE = Rule(inner_steps=2, proximal=1e-2, momentum=0.0, averaged=False)


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS)


def fill(base: BaseModel) -> None:
    """Gives B numbers, so that gradients reach A and earlier layers through the LoRA."""
    torch.manual_seed(5)
    for layer in peft_layers(base).values():
        torch.nn.init.normal_(factor_pair(layer)[1], std=0.1)


def passes(base: BaseModel, parts: Sequence[Sequence[Example]], shared: int | None = None) -> None:
    for rows in parts:
        (answer_loss(base, collate(base, rows, shared)) / len(parts)).backward()


def weight_gradients(
    base: BaseModel, parts: Sequence[Sequence[Example]], shared: int | None = None
) -> dict[str, Tensor]:
    """(out, in) by module path, by autograd."""
    weights = {path: layer.get_base_layer().weight for path, layer in peft_layers(base).items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        passes(base, parts, shared)
        return {path: weight.grad.clone() for path, weight in weights.items()}
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("size", [6, 2])
def test_s_and_x_make_the_gradient_of_every_weight(
    pico_base: BaseModel, examples: list[Example], size: int, checkpointing: bool
) -> None:
    """Over passes that are padded, begin alike or not, and add up."""
    parts = [examples[at : at + size] for at in range(0, 6, size)]
    with target_lora(pico_base, RECIPE, 0):
        fill(pico_base)
        shared = 0 if checkpointing else None
        expected = weight_gradients(pico_base, parts, shared)
        recorder = Recorder(peft_layers(pico_base))
        with recorder.recording():
            if checkpointing:
                with gradient_checkpointing(pico_base):
                    passes(pico_base, parts, shared)
            else:
                passes(pico_base, parts, shared)
            assert len(expected) == 14
            for path, gradient in expected.items():
                rows = recorder.take(path)
                assert rows is not None
                x, s, c = rows
                assert gradient.norm() > 1e-4
                torch.testing.assert_close(c * s.T @ x, gradient, rtol=1e-4, atol=1e-6)
                assert s.any(dim=1).all(), "rows without a gradient are left out"
                assert recorder.take(path) is None


def test_inputs_are_recorded_as_dropout_left_them(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    """Then they make the gradients of the factors: A's is s B^T S^T X, and B's is s S^T X A^T."""
    with target_lora(pico_base, replace(RECIPE, dropout=0.5), 0) as peft_model:
        fill(pico_base)
        recorder = Recorder(peft_layers(pico_base))
        peft_model.train()
        with recorder.recording():
            passes(pico_base, [examples])
            for path, layer in recorder.layers.items():
                rows = recorder.take(path)
                assert rows is not None
                (a, b), scale = factor_pair(layer), layer.scaling[ADAPTER]
                gradient = rows.c * rows.s.T @ rows.x
                torch.testing.assert_close(a.grad, scale * b.T @ gradient, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(b.grad, scale * gradient @ a.T, rtol=1e-4, atol=1e-5)


def test_validation_records_nothing_and_outputs_stay_the_same(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    batch = collate(pico_base, examples)
    with target_lora(pico_base, RECIPE, 0):
        fill(pico_base)
        before = mean_loss(pico_base, [batch])
        recorder = Recorder(peft_layers(pico_base))
        with recorder.recording():
            assert mean_loss(pico_base, [batch]) == before
            assert answer_loss(pico_base, batch).item() == pytest.approx(before, abs=1e-6)
            assert all(recorder.take(path) is None for path in recorder.layers)
        answer_loss(pico_base, batch).backward()
        assert all(recorder.take(path) is None for path in recorder.layers)


def optimizer_of(base: BaseModel, rule: Rule, **other: float) -> LowRankOptimizer:
    kwargs = {"lr": 0.5, "weight_decay": 0.0, **other}
    return LowRankOptimizer(Recorder(peft_layers(base)), rule=rule, seed=3, **kwargs)  # type: ignore[arg-type]


def products(base: BaseModel) -> dict[str, Tensor]:
    """s B A by module path."""
    return {
        path: layer.scaling[ADAPTER]
        * factor_pair(layer)[1].detach()
        @ factor_pair(layer)[0].detach()
        for path, layer in peft_layers(base).items()
    }


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix.double())
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).float()


def test_a_step_is_the_truncated_svd_of_the_full_step_of_the_weight(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    """s B A moves by rate x G, whatever s is, and decays by rate x decay."""
    rule = replace(RULE, inner_steps=300, proximal=0.0)
    with target_lora(pico_base, RECIPE, 0):
        fill(pico_base)
        gradients, before = weight_gradients(pico_base, [examples]), products(pico_base)
        optimizer = optimizer_of(pico_base, rule, lr=2.0, weight_decay=0.1)
        with optimizer.recorder.recording():
            passes(pico_base, [examples])
            optimizer.step()
        for path, after in products(pico_base).items():
            rank = len(factor_pair(optimizer.recorder.layers[path])[0])
            best = truncated(0.8 * before[path] - 2.0 * gradients[path], rank)
            assert (after - best).norm() < 0.03 * (before[path] - best).norm(), path


def test_the_full_gradient_is_clipped(pico_base: BaseModel, examples: list[Example]) -> None:
    with target_lora(pico_base, RECIPE, 0):
        fill(pico_base)
        gradients = weight_gradients(pico_base, [examples[:2]])
        norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
        for highest, share in ((norm / 3, 1 / 3), (norm * 3, 1.0)):
            optimizer = optimizer_of(pico_base, RULE)
            with optimizer.recorder.recording():
                passes(pico_base, [examples[:2]])
                optimizer.clip([], highest)
                assert max(len(rows.x) for rows in optimizer._rows.values()) <= EXACT_ROWS
            assert optimizer._share == pytest.approx(share, rel=1e-3)


def test_a_clipped_step_is_a_shorter_one(pico_base: BaseModel, examples: list[Example]) -> None:
    """Three times the rate on a third of the gradient; the next step is as long as it would be."""
    found = []
    for rate, times in ((0.2, 1.0), (0.6, 1 / 3)):
        with target_lora(pico_base, RECIPE, 0):
            fill(pico_base)
            optimizer = optimizer_of(pico_base, replace(RULE, proximal=0.0), lr=rate)
            with optimizer.recorder.recording():
                passes(pico_base, [examples[:2]])  # few enough for the exact norm
                optimizer.clip([], 1e9)
                assert optimizer._share == 1
                squares = [(c * s.T @ x).square().sum() for x, s, c in optimizer._rows.values()]
                optimizer.clip([], times * float(torch.stack(squares).sum().sqrt()))
                optimizer.step()
            found.append(products(pico_base))
            assert optimizer._share == 1
    for path, product in found[0].items():
        assert (found[1][path] - product).norm() < 1e-3 * product.norm(), path


def test_gradients_of_b_are_left_out_in_a_step_alone(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    with target_lora(pico_base, RECIPE, 0):
        fill(pico_base)
        optimizer = optimizer_of(pico_base, RULE)
        with optimizer.recorder.recording():
            optimizer.zero_grad()
            passes(pico_base, [examples])
            assert all(b.grad is None for _, b in optimizer.factors.values())
            assert all(a.grad is not None for a, _ in optimizer.factors.values())
            optimizer.step()
        assert all(b.requires_grad for _, b in optimizer.factors.values())


def test_a_tiny_rate_moves_next_to_nothing(pico_base: BaseModel, examples: list[Example]) -> None:
    """Also where all columns of B point one way, so that nothing in the passes says where A is to
    be in the others."""
    with target_lora(pico_base, RECIPE, 0):
        optimizer = optimizer_of(pico_base, RULE, lr=1e-7)
        with torch.no_grad():
            for _, b in optimizer.factors.values():
                b.copy_(torch.linspace(0.02, 0.07, len(b))[:, None])
        before = [a.detach().clone() for a, _ in optimizer.factors.values()]
        with optimizer.recorder.recording():
            passes(pico_base, [examples])
            optimizer.step()
        pairs = zip(optimizer.factors.values(), before, strict=True)
        moved = [float((a.detach() - start).norm() / start.norm()) for (a, _), start in pairs]
        assert max(moved) < 0.01


@pytest.mark.parametrize("averaged", [False, True])
def test_momentum_and_metric_are_those_of_the_equations(
    pico_base: BaseModel, examples: list[Example], averaged: bool
) -> None:
    """Two steps written out with dense gradients, clipped to different shares."""
    kfac = Kfac(decay=0.7, power=0.5, damping=1e-3)
    rule = replace(RULE, momentum=0.6, averaged=averaged, kfac=kfac)
    path = "model.layers.1.mlp.up_proj"
    with target_lora(pico_base, RECIPE, 0):
        fill(pico_base)
        optimizer = optimizer_of(pico_base, rule)
        layer = optimizer.recorder.layers[path]
        scale, new = layer.scaling[ADAPTER], 0.4 if averaged else 1.0
        a, b = (factor.detach().clone() for factor in factor_pair(layer))
        width, out = torch.ones(32), torch.ones(64)
        momentum: tuple[Tensor, Tensor] | None = None
        for rows, highest in ((examples[:3], 0.5), (examples[3:], 0.1)):
            gradient = weight_gradients(pico_base, [rows])[path]
            with optimizer.recorder.recording():
                optimizer.zero_grad()
                passes(pico_base, [rows])
                optimizer.clip([], highest)
                assert optimizer._share < 0.9
                x, s, c = optimizer._taken()[path]
                gradient, s = optimizer._share * gradient, optimizer._share * c * s
                width = 0.7 * width + 0.3 * x.square().sum(0) / len(x)
                out = 0.7 * out + 0.3 * s.square().sum(0) * len(x)
                if momentum is None:
                    momentum = _first_momentum(optimizer, path)
                optimizer.step()
            eye = torch.eye(32)
            metric = Metric((out + 1e-3).sqrt(), (width + 1e-3).sqrt())
            step = -0.5 / scale
            terms = [
                Term(1.0, a, b), Term(step * new, eye, gradient), Term(step * 0.6, *momentum)
            ]  # fmt: skip
            a, b = low_rank_sum(terms, 0.005, 2, metric)
            momentum = low_rank_sum([Term(0.6, *momentum), Term(new, eye, gradient)], 0.005, 2)
            torch.testing.assert_close(factor_pair(layer)[0], a, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(factor_pair(layer)[1], b, rtol=1e-3, atol=1e-4)


def _first_momentum(optimizer: LowRankOptimizer, path: str) -> tuple[Tensor, Tensor]:
    state = optimizer._state_of(path)
    assert not state["momentum_b"].any()
    return state["momentum_a"].clone(), state["momentum_b"].clone()


def test_a_layer_that_sat_out_stays_as_it_was(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    with target_lora(pico_base, RECIPE, 0):
        fill(pico_base)
        optimizer = optimizer_of(pico_base, replace(RULE, momentum=0.9))
        layers, before = optimizer.recorder.layers, products(pico_base)
        out = next(iter(layers))
        layers[out]._disable_adapters = True
        with optimizer.recorder.recording():
            passes(pico_base, [examples])
            optimizer.step()
        moved = {
            path
            for path, after in products(pico_base).items()
            if not torch.equal(after, before[path])
        }
        assert moved == set(layers) - {out}
        assert len(optimizer.state_dict()["state"]) == len(layers) - 1


@pytest.mark.parametrize("name", ["oplora", "lorsum", "psi-lora"])
def test_a_step_does_not_depend_on_how_it_is_cut_into_passes(
    pico_base: BaseModel, examples: list[Example], name: str
) -> None:
    """What the rows begin with is run in each pass, and yet counts as one row. Checkpointing runs
    it with each row, which only psi-lora's metric tells apart."""
    begin_alike = [examples[1], examples[2], examples[1], examples[4]]
    settings = METHODS["lora"].settings({"optimizer": name}, target=False)
    settings |= {"metric_decay": 0.5}  # soon away from its start
    found = []
    pace = {"steps": 3, "lr": 1.0, "batch_size": 4, "warmup": 0.0, "eval_every": 3}
    ways = [{"micro_batch": rows} for rows in (4, 2, 1)]
    for way in ways if name == "psi-lora" else [*ways, {"checkpointing": True}]:
        plan = TrainingPlan(**pace, **way)  # type: ignore[arg-type]
        setup = Setup(pico_base, RECIPE, plan, begin_alike)
        with former_of(settings)(setup) as form:
            trained, _ = train_form(setup, form, begin_alike, plan, Silent())
            found.append((trained.history[-1][1], products(pico_base)))
    assert found[0][0] < trained.history[0][1] - 0.01
    for loss, after in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-4)
        for path, product in after.items():
            assert (product - found[0][1][path]).norm() < 1e-2 * product.norm(), path


@pytest.mark.parametrize("name", ["oplora", "lorsum", "psi-lora"])
def test_it_keeps_no_more_than_adam(
    pico_base: BaseModel, examples: list[Example], name: str
) -> None:
    """With the factors and their gradients, three times the LoRA's numbers, K-FAC's diagonals
    apart; and the rows of a pass are in the budget."""
    setup = Setup(pico_base, RECIPE, TrainingPlan(steps=2, lr=0.1), examples)
    settings = {"optimizer": name, "inner_steps": 1, "proximal": 1e-2, "momentum": 0.9}
    settings |= {"metric_decay": 0.99, "metric_power": 0.5, "metric_damping": 1e-5}
    with former_of({})(setup) as plain:
        usual = form_budget(setup, plain)
    with former_of(settings)(setup) as form:
        optimizer = form.hooks.optimizer(form.parameters, setup.plan)
        passes(pico_base, [examples])
        optimizer.step()
        kept = sum(
            value.numel()
            for state in optimizer.state_dict()["state"].values()
            for value in state.values()
        )
        numbers = sum(p.numel() for p in form.parameters.values())
        sides = sum(sum(pair.shape) for pair in products(pico_base).values())
        assert kept == numbers + (sides if name == "psi-lora" else 0)
        longest = max(len(e.prompt) + len(e.answer) for e in examples)
        more = form_budget(setup, form).a_row - usual.a_row
        assert more == pytest.approx(4 * sides * longest, rel=0.2)
