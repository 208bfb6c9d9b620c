import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.pico import ATTENTION, MLP
from support.plain import CLOSED_ROWS, logits

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.training import Trained, TrainingPlan
from recycle_cli.errors import InputError
from recycle_cli.lora.folder import WEIGHTS_FILE, read_adapter
from recycle_cli.progress import Silent
from recycle_cli.tuning.lora_form import Setup, ordinary, train_form
from recycle_cli.tuning.target_lora import LoraRecipe, check_target_modules, target_lora

PLAN = TrainingPlan(steps=6, lr=0.02, batch_size=3, eval_every=3)
TOKENS = list(range(3, 43))
LINEAR = {*ATTENTION, *MLP}
RECIPES = {
    "plain": LoraRecipe(rank=4, alpha=8),
    "rslora": LoraRecipe(rank=6, alpha=5, use_rslora=True, target_modules=("q_proj", "down_proj")),
    "patterns": LoraRecipe(
        rank=4,
        alpha=8,
        target_modules=("q_proj", "v_proj", "layers.1.mlp.up_proj"),
        rank_pattern={"q_proj": 2, "layers.1.self_attn.v_proj": 5},
        alpha_pattern={"v_proj": 3},
    ),
}


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS)


@torch.no_grad()
def of(model: Any) -> torch.Tensor:
    return logits(model, TOKENS)


def train_one(
    base: BaseModel,
    recipe: LoraRecipe,
    examples: list[Example],
    folder: Path,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Trained, torch.Tensor]:
    """Trains and saves; also gives the logits that the trained model had."""
    rows = examples[:3]
    plan = dataclasses.replace(PLAN, seed=seed)
    setup = Setup(base, recipe, plan, rows)
    with ordinary(setup) as form:
        trained, _ = train_form(setup, form, rows, plan, Silent())
        assert form.save is not None
        form.save(folder, dtype)
        return trained, of(form.peft_model)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_what_is_saved_is_what_was_trained(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path, recipe: LoraRecipe
) -> None:
    before = of(pico_base.model)
    trained, expected = train_one(pico_base, recipe, examples, tmp_path)
    assert trained.best_loss < trained.history[0][1] - 0.05
    assert (expected - before).abs().mean() > 0.01

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(copy.deepcopy(pico_base.model), tmp_path)
    torch.testing.assert_close(of(loaded), expected, rtol=0, atol=1e-5)
    update = read_adapter(tmp_path).update
    with with_adapter(pico_base, update):
        torch.testing.assert_close(of(pico_base.model), expected, rtol=0, atol=2e-5)
    names = recipe.target_modules or sorted(LINEAR)
    assert set(update) == {
        path for path in pico_base.shapes for name in names if path.endswith(f".{name}")
    }
    for path, piece in update.items():
        rank, alpha = (
            next((value for key, value in pattern.items() if path.endswith(key)), usual)
            for pattern, usual in (
                (recipe.rank_pattern, recipe.rank),
                (recipe.alpha_pattern, recipe.alpha),
            )
        )
        assert piece.rank == rank
        assert piece.scale == pytest.approx(alpha / rank ** (0.5 if recipe.use_rslora else 1))


def test_the_files_hold_the_factors_and_nothing_else(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    recipe = LoraRecipe(rank=3, target_modules=("o_proj",))
    base = dataclasses.replace(pico_base, id="some/model")
    train_one(base, recipe, examples, tmp_path, torch.bfloat16)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == {
        f"base_model.model.model.layers.{layer}.self_attn.o_proj.lora_{side}.weight": (
            {"A": (3, 32), "B": (32, 3)}[side],
            torch.bfloat16,
        )
        for layer in (0, 1)
        for side in "AB"
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 16, 0.1)


def test_it_starts_as_the_base_model(pico_base: BaseModel) -> None:
    before = of(pico_base.model)
    with target_lora(pico_base, LoraRecipe(), 0) as peft_model:
        assert torch.equal(of(peft_model), before)
        trained = {name for name, p in peft_model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * 2 * 7
        assert all(".lora_A." in name or ".lora_B." in name for name in trained)


@pytest.mark.parametrize("fails", [False, True])
def test_the_base_is_left_exactly_as_it_was(
    pico_base: BaseModel, examples: list[Example], fails: bool
) -> None:
    weights = copy.deepcopy(pico_base.model.state_dict())
    before, shapes = of(pico_base.model), pico_base.shapes
    try:
        setup = Setup(pico_base, LoraRecipe(rank=2), PLAN, examples)
        with ordinary(setup) as form:
            train_form(setup, form, examples, PLAN, Silent())
            assert not torch.equal(of(pico_base.model), before)
            form.hooks.set_training(True)
            if fails:
                raise KeyError("within")
    except KeyError:
        assert fails
    assert torch.equal(of(pico_base.model), before)
    now = pico_base.model.state_dict()
    assert now.keys() == weights.keys()
    assert all(torch.equal(weights[key], now[key]) for key in weights)
    assert pico_base.shapes == shapes
    assert not any(module.training for module in pico_base.model.modules())
    assert not any(parameter.requires_grad for parameter in pico_base.model.parameters())
    # And it can be wrapped again, with another shape.
    with target_lora(pico_base, LoraRecipe(rank=5, target_modules=("q_proj",)), 0) as again:
        ranks = {p.shape[0] for name, p in again.named_parameters() if ".lora_A." in name}
        assert ranks == {5}


def test_seed_and_dropout_decide_the_outcome(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    one, again, other_seed, no_dropout = (
        train_one(
            pico_base,
            LoraRecipe(rank=2, dropout=dropout, target_modules=("v_proj",)),
            examples,
            tmp_path / str(at),
            seed=seed,
        )
        for at, (seed, dropout) in enumerate([(0, 0.5), (0, 0.5), (1, 0.5), (0, 0.0)])
    )
    assert one[0] == again[0]
    assert torch.equal(one[1], again[1])
    assert not torch.equal(one[1], other_seed[1])
    assert not torch.equal(one[1], no_dropout[1])


@pytest.mark.parametrize("name", ["query", "proj", "_proj", "mlp", "self_attn", ""])
def test_an_unknown_module_is_refused_with_the_known_ones(pico_base: BaseModel, name: str) -> None:
    before = of(pico_base.model)
    recipe = LoraRecipe(target_modules=("q_proj", name))
    with pytest.raises(InputError) as caught, target_lora(pico_base, recipe, 0):
        pass
    assert caught.value.message == f"{pico_base.id} has no linear module {name!r}"
    assert caught.value.hint == f"its modules: {', '.join(sorted({*LINEAR, 'lm_head'}))}"
    assert torch.equal(of(pico_base.model), before)


def test_names_are_ends_of_paths(pico_base: BaseModel) -> None:
    names = ("q_proj", "mlp.up_proj", "layers.1.mlp.up_proj", "lm_head", *pico_base.shapes)
    check_target_modules(pico_base, LoraRecipe(target_modules=names))
