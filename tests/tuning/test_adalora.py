"""AdaLoRA, by PEFT: what the loop adds to it."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plain import CLOSED_ROWS, logits
from torch import Tensor

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.store import Snapshot, Store
from recycle_cli.engine.training import Hooks, Trained, TrainingPlan, train
from recycle_cli.errors import InputError
from recycle_cli.lora.folder import read_adapter, write_adapter
from recycle_cli.lora.update import ModelUpdate
from recycle_cli.progress import Silent
from recycle_cli.tuning.lora_allocations.adalora import RankAllocation, adalora_config
from recycle_cli.tuning.target_lora import LoraRecipe, wrapped

TOKENS = list(range(3, 43))
STEPS = 20
PLAN = TrainingPlan(steps=STEPS, lr=0.02, batch_size=3, eval_every=4, patience=100)
RECIPE = LoraRecipe(rank=4, alpha=8, dropout=0.1, target_modules=("q_proj", "v_proj", "down_proj"))


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[:3])


def run(
    base: BaseModel, examples: list[Example], store: Store | None = None, watch: Any = None
) -> tuple[Trained, ModelUpdate, Tensor]:
    with wrapped(base, adalora_config(RECIPE, STEPS), 0) as peft_model:
        allocation = RankAllocation(base, peft_model)
        own = allocation.hooks()

        def after() -> None:
            own.after_step()
            if watch:
                watch(allocation)

        hooks = Hooks(peft_model.train, own.penalty, after, own.buffers)
        parameters = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
        trained = train(base, parameters, examples, examples, PLAN, Silent(), hooks, store)
        with torch.no_grad():
            return trained, copy.deepcopy(allocation.update()), logits(base.model, TOKENS)


def test_the_ranks_go_down_to_the_ones_asked_for(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    totals = []
    run(pico_base, examples, watch=lambda a: totals.append(6 * a.figures()["mean_rank"]))
    # The first step's rate is 0, so all singular values still are.
    assert totals[:2] == [0, 6 * 6]
    # Tinit is 2 and tfinal 6: from step 14 on nothing is cut any more.
    assert totals[13:] == [totals[13]] * 7
    assert totals[13] == 6 * 4


def test_the_penalty_is_pefts_own(pico_base: BaseModel, examples: list[Example]) -> None:
    with wrapped(pico_base, adalora_config(RECIPE, STEPS), 0) as peft_model:
        tokens = torch.tensor([TOKENS])
        with torch.no_grad():
            with_it = peft_model(tokens, labels=tokens).loss
            without = pico_base.model(tokens, labels=tokens).loss
            found = RankAllocation(pico_base, peft_model).penalty()
        assert float(found) == pytest.approx(float(with_it - without), abs=1e-5)
        assert float(found) > 0.1


def test_the_export_is_what_was_trained(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    trained, update, expected = run(pico_base, examples)
    assert trained.best_loss < trained.history[0][1] - 0.05
    write_adapter(tmp_path, update, "pico")
    with torch.no_grad(), with_adapter(pico_base, read_adapter(tmp_path).update):
        found = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_resumed_run_ends_as_the_undisturbed_one(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    """Stopped while ranks are cut, and after the last cut."""
    expected, update, _ = run(pico_base, examples)

    class Stopped(Exception):
        pass

    for step in (8, 16):

        class At(Store):
            def save(self, snapshot: Snapshot) -> None:
                super().save(snapshot)
                if snapshot.step == step:  # noqa: B023
                    raise Stopped

        with pytest.raises(Stopped):
            run(pico_base, examples, At(tmp_path, {}))
        found, again, _ = run(pico_base, examples, Store(tmp_path, {}))
        assert found == expected
        assert {p: piece.rank for p, piece in again.items()} == {
            p: piece.rank for p, piece in update.items()
        }
        assert all(torch.equal(update[path].dense(), again[path].dense()) for path in update)
        (tmp_path / "state.safetensors").unlink()


def test_nothing_trained_is_a_zero_update(pico_base: BaseModel) -> None:
    with wrapped(pico_base, adalora_config(RECIPE, STEPS), 0) as peft_model:
        update = RankAllocation(pico_base, peft_model).update()
        (piece,) = update.values()
        assert piece.rank == 1
        assert not piece.dense().any()


@pytest.mark.parametrize("steps", [1, 2, 5, 400])
def test_any_number_of_steps_leaves_room_to_cut(steps: int) -> None:
    config = adalora_config(RECIPE, steps)
    assert config.tinit < config.total_step - config.tfinal
    assert config.init_r == math.ceil(1.5 * 4)


@pytest.mark.parametrize(
    "recipe",
    [
        LoraRecipe(rank=4, rank_pattern={"q_proj": 2}),
        LoraRecipe(rank=4, alpha_pattern={"q_proj": 2}),
        LoraRecipe(rank=4, use_rslora=True),
    ],
)
def test_what_it_would_ignore_is_refused(recipe: LoraRecipe) -> None:
    with pytest.raises(InputError, match="finds the ranks itself"):
        adalora_config(recipe, 10)


def test_it_needs_steps() -> None:
    with pytest.raises(InputError, match="there are none"):
        adalora_config(RECIPE, 0)
