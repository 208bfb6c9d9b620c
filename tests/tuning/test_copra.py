"""CopRA: who takes part in a step, and what becomes of who does not."""

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.plain import CLOSED_ROWS, logits
from torch import Tensor

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.store import Snapshot, Store
from recycle_cli.engine.training import Hooks, TrainingPlan, train
from recycle_cli.lora.draws import generator_for
from recycle_cli.progress import Silent
from recycle_cli.tuning.lora_form import Setup, form_budget, former_of
from recycle_cli.tuning.lora_schedules.copra import RandomLayers, layers_of, probability, toss
from recycle_cli.tuning.target_lora import LoraRecipe, target_lora

TOKENS = list(range(3, 43))
PLAN = TrainingPlan(steps=16, lr=0.02, batch_size=3, eval_every=4, patience=100)
RECIPE = LoraRecipe(rank=2, alpha=4, dropout=0.0, target_modules=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[:3])


def test_the_probability_rises_to_one_in_three_quarters() -> None:
    assert probability(0, 400) == 0.1
    assert probability(150, 400) == pytest.approx(0.55)
    assert [probability(step, 400) for step in range(300, 400)] == [1.0] * 100
    assert probability(299, 400) < 1
    mean = sum(probability(step, 4000) for step in range(4000)) / 4000
    assert mean == pytest.approx(0.66, abs=0.005)
    assert probability(0, 1) == probability(0, 0) == 0.1


@pytest.mark.parametrize("chance", [0.1, 0.55, 0.9])
def test_coins_fall_as_often_as_they_should_and_never_all_off(chance: float) -> None:
    draws = 20_000
    generator = generator_for("test", chance)
    tosses = torch.tensor([toss(3, chance, generator) for _ in range(draws)])
    assert tosses.any(1).all()
    # Given that not all are off.
    expected = chance / (1 - (1 - chance) ** 3)
    found = tosses.float().mean(0)
    assert found.tolist() == pytest.approx([expected] * 3, abs=4 * 0.5 / draws**0.5)
    both = float((tosses[:, 0] & tosses[:, 1]).float().mean())
    assert both == pytest.approx(chance**2 / (1 - (1 - chance) ** 3), abs=4 * 0.5 / draws**0.5)


def test_modules_of_a_layer_share_a_coin(pico_base: BaseModel) -> None:
    paths = ["a.layers.0.q", "a.layers.0.mlp.up", "a.layers.1.q", "a.layers.10.q", "lm_head"]
    assert layers_of(paths) == {
        "a.layers.0": paths[:2],
        "a.layers.1": [paths[2]],
        "a.layers.10": [paths[3]],
        "lm_head": [paths[4]],
    }
    with target_lora(pico_base, RECIPE, 0):
        layers = RandomLayers(pico_base, steps=100, seed=0)
        seen = Counter(tuple(layers.active(step)) for step in range(100))
    one, two = (tuple(p for p in layers.layers if f".{number}." in p) for number in (0, 1))
    assert set(seen) == {one, two, one + two}
    assert len(one) == len(two) == 2


def run(
    base: BaseModel,
    examples: list[Example],
    plan: TrainingPlan,
    watch: dict[int, dict[str, Tensor]] | None = None,
    store: Store | None = None,
    seed: int = 0,
) -> tuple[RandomLayers, dict[str, Tensor], list[tuple[int, float]]]:
    """Trains; `watch` is given the factors' gradients of each step, by name."""
    with target_lora(base, RECIPE, seed) as peft_model:
        layers = RandomLayers(base, steps=plan.steps, seed=plan.seed)
        parameters = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}

        def after() -> None:
            if watch is not None:
                watch[int(layers.steps_done)] = {
                    name: p.grad.clone() for name, p in parameters.items() if p.grad is not None
                }
            layers.after_step()

        hooks = Hooks(layers.set_training, after_step=after, buffers=layers.hooks().buffers)
        trained = train(base, parameters, examples, examples, plan, Silent(), hooks, store)
        found = {name: p.detach().clone() for name, p in parameters.items()}
        return layers, found, trained.history


def numbers_of_layers(names: Iterable[str]) -> set[str]:
    return {name.split(".layers.")[1].split(".")[0] for name in names}


def test_layers_that_sit_out_get_no_gradient_and_stay(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    """Not even by the optimizer's momentum, which they have from earlier steps."""
    gradients: dict[int, dict[str, Tensor]] = {}
    states: list[Snapshot] = []

    class Keeping(Store):
        def save(self, snapshot: Snapshot) -> None:
            states.append(copy.deepcopy(snapshot))

    plan = replace(PLAN, eval_every=1, warmup=0.0)
    layers, _, _ = run(pico_base, examples, plan, gradients, Keeping(tmp_path, {}))
    out = 0
    for step, of_step in gradients.items():
        active = numbers_of_layers(layers.active(step))
        assert numbers_of_layers(of_step) == active
        assert len(of_step) == 4 * len(active)
        if step:
            one, two = states[step - 1].tensors, states[step].tensors
            moved = {
                name[len("now.") :]
                for name in one
                if name.startswith("now.") and not torch.equal(one[name], two[name])
            }
            # A has no slope before its B has moved.
            assert {name for name in of_step if "lora_B" in name} <= moved <= set(of_step)
            out += len(active) < 2
    assert out > 2


def test_validation_is_with_all_layers(pico_base: BaseModel) -> None:
    with target_lora(pico_base, RECIPE, 0) as peft_model, torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        expected = logits(pico_base.model, TOKENS)
        layers = RandomLayers(pico_base, steps=100, seed=0)
        step = next(step for step in range(100) if len(layers.active(step)) == 2)
        layers.steps_done.fill_(step)
        layers.set_training(True)
        assert not torch.equal(logits(pico_base.model, TOKENS), expected)
        layers.set_training(False)
        assert torch.equal(logits(pico_base.model, TOKENS), expected)


def test_the_last_quarter_is_plain_training(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    """From the same state, to the bit."""
    store = Store(tmp_path, {})

    class Stopped(Exception):
        pass

    class Once(Store):
        def save(self, snapshot: Snapshot) -> None:
            super().save(snapshot)
            if snapshot.step == 12:
                raise Stopped

    with pytest.raises(Stopped):
        run(pico_base, examples, PLAN, store=Once(tmp_path, {}))
    saved = store.load()
    assert saved is not None
    _, expected, history = run(pico_base, examples, PLAN, store=store)
    # The same state again, without coins.
    store.save(saved)
    with target_lora(pico_base, RECIPE, 0) as peft_model:
        parameters = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
        hooks = Hooks(peft_model.train)
        trained = train(pico_base, parameters, examples, examples, PLAN, Silent(), hooks, store)
        assert trained.history == history
        assert all(torch.equal(expected[name], p) for name, p in parameters.items())


def test_a_resumed_run_ends_as_the_undisturbed_one(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    _, expected, history = run(pico_base, examples, PLAN)

    class Stopped(Exception):
        pass

    class Once(Store):
        def save(self, snapshot: Snapshot) -> None:
            super().save(snapshot)
            raise Stopped

    with pytest.raises(Stopped):
        run(pico_base, examples, PLAN, store=Once(tmp_path, {}))
    _, found, again = run(pico_base, examples, PLAN, store=Store(tmp_path, {}))
    assert again == history
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_coins_change_what_is_learned(pico_base: BaseModel, examples: list[Example]) -> None:
    _, one, _ = run(pico_base, examples, PLAN)
    _, two, _ = run(pico_base, examples, replace(PLAN, seed=1))
    assert not all(torch.equal(one[name], two[name]) for name in one)


def test_the_memory_budget_is_that_of_all_layers(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    plan = replace(PLAN, steps=400)
    setup = Setup(pico_base, RECIPE, plan, examples)
    with former_of({})(setup) as form:
        expected = form_budget(setup, form, 0)
    with former_of({"schedule": "copra"})(setup) as form:
        assert form_budget(setup, form, 0) == expected
