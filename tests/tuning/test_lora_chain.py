"""RAC-LoRA and COLA: one-step identities and a quadratic in float64, and the chain in training."""

import copy
from pathlib import Path

import pytest
import torch
from support.plain import CLOSED_ROWS, DenseModel, logits
from torch import Tensor, nn

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.store import Store
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.lora.folder import read_adapter, write_adapter
from recycle_cli.progress import Silent
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.lora_form import Setup, form_budget, former_of
from recycle_cli.tuning.lora_schedules.chain import Chain
from recycle_cli.tuning.target_lora import LoraRecipe
from recycle_cli.tuning.tuned import fit

TOKENS = list(range(3, 43))
PLAN = TrainingPlan(steps=12, lr=0.02, batch_size=3, eval_every=3, patience=100)
Q0 = "model.layers.0.self_attn.q_proj"
RECIPE = LoraRecipe(rank=2, alpha=6, dropout=0.0, target_modules=("q_proj", "down_proj"))
NAME = Q0.replace(".", "/")


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[:3])


def chain(base: BaseModel, steps: int = 12, blocks: int = 4, randomised: bool = True) -> Chain:
    return Chain(base, RECIPE, steps=steps, seed=5, randomised=randomised, blocks=blocks)


def weight(made: Chain, path: str = Q0) -> Tensor:
    """sum_t s B_t A_t of all blocks, dense; the scale is alpha / rank = 3."""
    return torch.stack([product(made, number, path) for number in range(len(made.blocks))]).sum(0)


def product(made: Chain, number: int, path: str = Q0) -> Tensor:
    """s B_t A_t of one block."""
    name, block = path.replace(".", "/"), made.blocks[number]
    return made.targets[path].scale * block.lora_B[name] @ block.lora_A[name]


def step(made: Chain, gradient: Tensor, rate: float, path: str = Q0) -> None:
    """One step of gradient descent on the current block, from dL/d(sum of all), and on."""
    made.train()
    (product(made, made.current, path) * gradient).sum().backward()
    with torch.no_grad():
        for parameter in made.blocks[made.current].parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
            parameter.grad = None
    made.after_step()


def test_a_step_projects_the_gradient_on_the_sketch(pico_base: BaseModel) -> None:
    """W+ = W - s^2 eta G A^T A, or W - s^2 eta B B^T G, from the start of a block."""
    made = chain(pico_base, steps=20, blocks=20).double()
    generator = torch.Generator().manual_seed(0)
    sides = set()
    for block in made.blocks:
        gradient = torch.randn(32, 32, generator=generator, dtype=torch.float64)
        before = weight(made).detach()
        a, b = block.lora_A[NAME].detach().clone(), block.lora_B[NAME].detach().clone()
        step(made, gradient, rate=0.1)
        left, right = 0.9 * b @ b.T @ gradient, 0.9 * gradient @ a.T @ a
        expected = before - (left if block.trains == "A" else right)
        torch.testing.assert_close(weight(made).detach(), expected, rtol=1e-12, atol=1e-12)
        assert not (a if block.trains == "A" else b).any()
        sides.add(block.trains)
    assert sides == {"A", "B"}


def descend(base: BaseModel, goal: Tensor, blocks: int) -> float:
    """How far from the goal of f(W) = |W - goal|^2 / 2 gradient descent ends, of a chain of rank 4
    in a module of shape (16, 32)."""
    path, steps = "model.layers.0.self_attn.k_proj", 480
    recipe = LoraRecipe(rank=4, alpha=4, dropout=0.0, target_modules=(path,))
    made = Chain(base, recipe, steps=steps, seed=5, randomised=True, blocks=blocks).double()
    done, current = torch.zeros_like(goal), 0
    for _ in range(steps):
        if made.current != current:
            done, current = done + product(made, current, path).detach(), made.current
        gradient = done + product(made, current, path).detach() - goal
        # The squared lengths of a sketch's rows are about 1/3, so this rate is stable.
        step(made, gradient, rate=1.0, path=path)
    return float((weight(made, path).detach() - goal).square().sum())


def test_the_chain_converges_where_a_fixed_sketch_stalls(pico_base: BaseModel) -> None:
    goal = torch.randn(16, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = float(goal.square().sum())
    # Rank 4 from a fixed side reaches about 4 / 16 or 4 / 32 of a goal without structure.
    assert descend(pico_base, goal, blocks=1) > 0.6 * start
    assert descend(pico_base, goal, blocks=120) < 1e-4 * start


def test_blocks_are_frozen_in_turn(pico_base: BaseModel, examples: list[Example]) -> None:
    made = chain(pico_base)
    start = copy.deepcopy(made.state_dict())
    seen: list[dict[str, Tensor]] = []
    own = made.after_step

    def watched() -> None:
        own()
        seen.append(copy.deepcopy(made.state_dict()))

    made.after_step = watched  # type: ignore[method-assign]
    fit(pico_base, made, examples, examples, PLAN, Silent())
    for number, now in enumerate(seen):
        before = seen[number - 1] if number else start
        changed = {n for n in now if n != "steps_done" and not torch.equal(now[n], before[n])}
        block = number // 3
        # The first step's rate is 0 in the warm-up; from then on all that the block trains moves.
        trains = made.blocks[block].trains
        expected = {n for n in now if n.startswith(f"blocks.{block}.lora_{trains}")}
        assert changed == (expected if number else set())
    sketches = [b.lora_B[NAME] if b.trains == "A" else b.lora_A[NAME] for b in made.blocks]
    assert len({tuple(s.flatten().tolist()) for s in sketches}) == 4
    assert {b.trains for b in made.blocks} == {"A", "B"}


@pytest.mark.parametrize(("steps", "blocks"), [(0, 10), (1, 10), (11, 10), (20, 15), (400, 10)])
def test_steps_are_shared_out_evenly(pico_base: BaseModel, steps: int, blocks: int) -> None:
    made = chain(pico_base, steps=steps, blocks=blocks)
    trained = []
    for _ in range(steps):
        trained.append(made.current)
        made.after_step()
    counts = [trained.count(number) for number in range(len(made.blocks))]
    assert len(counts) == max(1, min(steps, blocks)) and trained == sorted(trained)
    assert sum(counts) == steps and max(counts) - min(counts) <= 1


def test_a_new_block_changes_nothing_at_first(pico_base: BaseModel) -> None:
    made = chain(pico_base)
    generator = torch.Generator().manual_seed(0)
    for factors in (made.blocks[0].lora_A, made.blocks[0].lora_B):
        factors[NAME].data.copy_(torch.randn(factors[NAME].shape, generator=generator))
    with torch.no_grad(), made.attached(pico_base):
        before = logits(pico_base.model, TOKENS)
        made.steps_done += 3
        assert made.current == 1
        after = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)


def test_the_optimizer_begins_anew_with_each_block(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    store = Store(tmp_path, {})
    made = chain(pico_base)
    fit(pico_base, made, examples, examples, PLAN, Silent(), store)
    saved = store.load()
    assert saved is not None
    steps = [float(t) for name, t in saved.tensors.items() if name.endswith(".step")]
    assert steps == [3.0] * (4 * 4)


@pytest.mark.parametrize("randomised", [True, False])
def test_the_export_is_the_whole_chain(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path, randomised: bool
) -> None:
    before = copy.deepcopy(pico_base.model.state_dict())
    made = chain(pico_base, randomised=randomised)
    trained, figures = fit(pico_base, made, examples, examples, PLAN, Silent())
    assert trained.best_loss < trained.history[0][1] - 0.05
    blocks = -(-trained.best_step // 3)
    assert blocks > 1
    assert figures == {"blocks": blocks}
    with torch.no_grad(), made.attached(pico_base):
        expected = logits(pico_base.model, TOKENS)
    write_adapter(tmp_path, made.result(), "pico")
    update = read_adapter(tmp_path).update
    for path, piece in update.items():
        assert piece.rank == 2 * blocks
        delta = weight(made, path).detach()
        torch.testing.assert_close(piece.dense(), delta, rtol=0, atol=1e-6)
        exact = weight(copy.deepcopy(made).double(), path)
        assert torch.linalg.matrix_rank(exact, rtol=1e-9) == 2 * blocks
    with torch.no_grad(), with_adapter(pico_base, update):
        found = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    merged = DenseModel(pico_base, {path: weight(made, path).detach() for path in update})
    with torch.no_grad():
        torch.testing.assert_close(logits(merged, TOKENS), expected, rtol=0, atol=1e-4)
    after = pico_base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_rank_is_no_more_than_the_smaller_side(pico_base: BaseModel) -> None:
    recipe = LoraRecipe(rank=9, target_modules=("v_proj",))
    made = Chain(pico_base, recipe, steps=8, seed=5, randomised=False, blocks=4)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    path = "model.layers.0.self_attn.v_proj"
    name = path.replace(".", "/")
    delta = sum(16 / 9 * block.lora_B[name] @ block.lora_A[name] for block in made.blocks)
    piece = made.result()[path]
    assert piece.rank == min(piece.shape) == 16
    torch.testing.assert_close(piece.dense().float(), delta.detach(), rtol=1e-5, atol=1e-4)


def test_dropout_spares_the_blocks_that_are_done(pico_base: BaseModel) -> None:
    recipe = LoraRecipe(rank=2, dropout=0.5, target_modules=("q_proj",))
    made = Chain(pico_base, recipe, steps=4, seed=5, randomised=False, blocks=2)
    made.blocks[0].lora_B[NAME].data.fill_(0.1)
    made.steps_done += 2
    made.train()
    forward, module = made.forwards(pico_base, 0)[Q0], nn.Linear(32, 32)
    x = torch.randn(5, 32)
    assert torch.equal(forward(module, x), forward(module, x))
    made.blocks[1].lora_B[NAME].data.fill_(0.1)
    assert not torch.equal(forward(module, x), forward(module, x))


def test_the_memory_budget_is_that_of_the_whole_chain(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    """What is trained, its gradients and moments: a copy of each block less for the gradients."""
    setup = Setup(pico_base, RECIPE, PLAN, examples)
    budgets = []
    for blocks in (1, 4):
        settings = METHODS["lora"].settings({"schedule": "cola", "blocks": blocks}, target=False)
        with former_of(settings)(setup) as form:
            budgets.append(form_budget(setup, form, 0))
    numbers = sum(2 * sum(pico_base.shapes[path]) for path in chain(pico_base).targets)
    assert [budget.trained for budget in budgets] == [4 * 4 * numbers, (4 + 3 * 3) * 4 * numbers]
