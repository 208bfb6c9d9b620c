"""DoRA, by PEFT: its update as PEFT merges it."""

import copy
from pathlib import Path

import pytest
import torch
from support.plain import CLOSED_ROWS, logits

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.lora.folder import read_adapter, write_adapter
from recycle_cli.progress import Silent
from recycle_cli.tuning.lora_architectures.dora import dora_config, dora_update
from recycle_cli.tuning.lora_form import Setup, of_peft, train_form
from recycle_cli.tuning.target_lora import LoraRecipe, wrapped

TOKENS = list(range(3, 43))
PLAN = TrainingPlan(steps=6, lr=0.02, batch_size=3, eval_every=3)
RECIPE = LoraRecipe(rank=2, alpha=6, dropout=0.1, target_modules=("q_proj", "v_proj", "down_proj"))


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[:3])


def test_its_update_is_what_peft_merges(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    before = copy.deepcopy(pico_base.model.state_dict())
    with wrapped(pico_base, dora_config(RECIPE), 0) as peft_model:
        assert not any(
            piece.dense().abs().max() > 1e-6 for piece in dora_update(pico_base).values()
        )
        setup = Setup(pico_base, RECIPE, PLAN, examples)
        form = of_peft(pico_base, peft_model)
        trained, _ = train_form(setup, form, examples, PLAN, Silent())
        assert trained.best_loss < trained.history[0][1] - 0.05
        with torch.no_grad():
            expected = logits(pico_base.model, TOKENS)
        update = dict(dora_update(pico_base))
        # What PEFT writes into the weights, in float64, of a copy.
        merged = copy.deepcopy(peft_model).double().merge_and_unload()
        for path, piece in update.items():
            theirs = merged.get_submodule(path).weight - before[f"{path}.weight"].double()
            torch.testing.assert_close(piece.dense().double(), theirs, rtol=0, atol=2e-7)
            assert piece.rank == min(piece.shape)
            assert torch.linalg.matrix_rank(theirs) == min(piece.shape)
    after = pico_base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    write_adapter(tmp_path, update, "pico")
    with torch.no_grad(), with_adapter(pico_base, read_adapter(tmp_path).update):
        found = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_lengths_are_trained_too(pico_base: BaseModel, examples: list[Example]) -> None:
    with wrapped(pico_base, dora_config(RECIPE), 0) as peft_model:
        names = {"magnitude": 0, "lora_A": 0, "lora_B": 0}
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad:
                names[next(kind for kind in names if kind in name)] += 1
        assert names == {"magnitude": 6, "lora_A": 6, "lora_B": 6}
