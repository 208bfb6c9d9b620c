"""The gradient-free search, on a problem whose minimum Newton's method finds."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import plain
from support.plain import CLOSED_ROWS, DOWN, HEAD, Q0, Q1, DenseModel, random_update, weighted_sum
from torch import Tensor, nn

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.search import SAVE_EVERY, SearchPlan, search
from recycle_cli.engine.store import Store
from recycle_cli.engine.training import Diverged, Trained
from recycle_cli.errors import InputError
from recycle_cli.lora.update import ModelUpdate
from recycle_cli.progress import Silent
from recycle_cli.tuning.mixture import Mixture, MixtureRecipe

PLAN = SearchPlan(steps=25, bound=1.5, batch_size=4, seed=3)
RECIPE = MixtureRecipe("linear", "zero", "adapter")
RUN = {"method": "lorahub"}


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[:4])


@pytest.fixture(scope="module")
def valid(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[4:])


@pytest.fixture(scope="module")
def heads(pico_base: BaseModel) -> list[ModelUpdate]:
    """Two adapters of the head alone: the loss is convex in their coefficients."""
    return [random_update(pico_base, {HEAD: 3}, seed=10 * at) for at in (1, 2)]


class Killed(Exception):
    """Stands for a signal."""


@dataclass
class Watch(Silent):
    """Notes the coefficients and the loss of each evaluation; may die at one."""

    parameters: Sequence[Tensor] = ()
    dies_at: int = 0
    seen: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def advance(self, note: str = "") -> None:
        self.seen.append(torch.cat([p.detach().clone() for p in self.parameters]))
        self.losses.append(float(note.split()[1].rstrip(",")))
        if len(self.seen) == self.dies_at:
            raise Killed


@dataclass
class Found:
    """What a search came to. `passes` counts runs of the model over a batch."""

    trained: Trained
    coefficients: Tensor
    watch: Watch
    passes: int


def run(
    base: BaseModel,
    updates: Sequence[ModelUpdate],
    examples: Sequence[Example],
    valid: Sequence[Example],
    plan: SearchPlan = PLAN,
    recipe: MixtureRecipe = RECIPE,
    *,
    store: Store | None = None,
    dies_at: int = 0,
    start: float | None = None,
    reuse: bool = False,
) -> Found:
    mixture = Mixture(updates, recipe, base.compute.device, seed=1)
    if start is not None:
        for row in mixture.coefficients:
            row.data.fill_(start)
    watch = Watch(parameters=list(mixture.coefficients), dies_at=dies_at)
    passes: list[object] = []
    handle = base.model.model.register_forward_hook(lambda *_: passes.append(1))
    try:
        with mixture.attached(base):
            trained = search(
                base,
                mixture.searched(),
                examples,
                valid,
                plan,
                watch,
                mixture.penalty,
                store,
                mixture.reuse if reuse else None,
            )
    finally:
        handle.remove()
    rows = [row.detach().clone() for row in mixture.coefficients]
    return Found(trained, torch.cat(rows), watch, len(passes))


def loss_at(
    base: BaseModel, heads: Sequence[ModelUpdate], rows: Sequence[Example], c: Tensor
) -> Tensor:
    return plain.loss(DenseModel(base, weighted_sum(heads, c[None])), rows)


def minimum(
    base: BaseModel,
    heads: Sequence[ModelUpdate],
    rows: Sequence[Example],
    weight_of_size: float = 0.0,
) -> Tensor:
    """By Newton's method on the loss and a smooth stand-in for the penalty on the size."""

    def whole(c: Tensor) -> Tensor:
        size = (c**2 + 1e-6).sqrt().mean()
        return loss_at(base, heads, rows, c) + weight_of_size * size

    c = torch.full((2,), 0.1)
    for _ in range(8):
        gradient = torch.autograd.functional.jacobian(whole, c)
        curvature = torch.autograd.functional.hessian(whole, c)
        step = torch.linalg.solve(curvature, gradient)
        c = c - step * min(1.0, 0.2 / float(step.norm()))
    return c


def test_it_finds_the_minimum(
    pico_base: BaseModel, heads: list[ModelUpdate], examples: list[Example]
) -> None:
    expected = minimum(pico_base, heads, examples)
    found = run(pico_base, heads, examples, examples, replace(PLAN, steps=80, bound=10.0))
    lowest = float(loss_at(pico_base, heads, examples, expected))
    assert 0.2 < float(expected.abs().max()) < 5
    assert found.trained.history[0][1] > lowest + 0.02
    assert found.trained.best_loss == pytest.approx(lowest, abs=1e-4)
    torch.testing.assert_close(found.coefficients, expected, rtol=0, atol=0.02)


def test_the_penalty_counts(
    pico_base: BaseModel, heads: list[ModelUpdate], examples: list[Example]
) -> None:
    """It is in the loss that is searched, and draws the coefficients to where both together are
    lowest."""
    plan = replace(PLAN, steps=80, bound=10.0)
    recipe = replace(RECIPE, l1=0.05)
    found = run(pico_base, heads, examples, examples, plan, recipe)
    losses = [
        float(loss_at(pico_base, heads, examples, c)) + 0.05 * float(c.abs().mean())
        for c in found.watch.seen
    ]
    assert found.watch.losses == pytest.approx(losses, abs=6e-4)
    lowest = found.watch.seen[int(np.argmin(losses))]
    expected = minimum(pico_base, heads, examples, weight_of_size=0.05)
    without = minimum(pico_base, heads, examples)
    assert float((expected - without).abs().max()) > 0.08
    torch.testing.assert_close(lowest, expected, rtol=0, atol=0.02)
    # The validation loss is without it, so that what is kept may lie elsewhere.
    assert found.trained.best_loss == pytest.approx(
        float(loss_at(pico_base, heads, examples, found.coefficients)), abs=1e-5
    )


def test_coefficients_keep_to_the_bounds(
    pico_base: BaseModel, heads: list[ModelUpdate], examples: list[Example]
) -> None:
    """The minimum lies outside; what is found lies at the border."""
    free = minimum(pico_base, heads, examples)
    bound = 0.25 * float(free.abs().max())
    found = run(
        pico_base, heads, examples, examples, replace(PLAN, bound=bound, steps=60), start=5.0
    )
    assert all(float(c.abs().max()) <= bound + 1e-6 for c in found.watch.seen)
    side = int(free.abs().argmax())
    assert float(found.coefficients[side]) == pytest.approx(
        math.copysign(bound, free[side]), abs=0.02 * bound
    )


def test_it_never_ends_worse_than_it_began(
    pico_base: BaseModel, heads: list[ModelUpdate], examples: list[Example], valid: list[Example]
) -> None:
    """From the minimum of the validation rows, the training rows lead away."""
    best = minimum(pico_base, heads, valid)
    recipe = MixtureRecipe("linear", "zero", "adapter")
    mixture = Mixture(heads, recipe, pico_base.compute.device)
    mixture.coefficients[0].data.copy_(best)
    plan = replace(PLAN, bound=10.0)
    with mixture.attached(pico_base):
        trained = search(pico_base, mixture.searched(), examples, valid, plan, Silent())
    start = trained.history[0][1]
    assert start == pytest.approx(float(loss_at(pico_base, heads, valid, best)), abs=1e-5)
    assert len(trained.history) > 2
    assert trained.best_loss <= start
    assert all(loss >= trained.best_loss for _, loss in trained.history)
    assert float(loss_at(pico_base, heads, valid, mixture.coefficients[0].detach())) < start + 1e-5
    assert trained.best_step == 0
    assert torch.equal(mixture.coefficients[0].detach(), best)


def test_no_evaluations_leave_everything_as_it_was(
    pico_base: BaseModel, heads: list[ModelUpdate], examples: list[Example], valid: list[Example]
) -> None:
    found = run(pico_base, heads, examples, valid, replace(PLAN, steps=0), start=2.0)
    assert found.trained.best_step == 0
    assert len(found.trained.history) == 1
    assert found.coefficients.tolist() == [2.0, 2.0]


def several(base: BaseModel) -> list[ModelUpdate]:
    """Adapters of other modules, whose coefficients no formula gives."""
    return [
        random_update(base, {Q0: 3, DOWN: 2}, seed=10),
        random_update(base, {Q0: 2, Q1: 4}, seed=20),
    ]


def test_a_seed_decides_everything(
    pico_base: BaseModel, examples: list[Example], valid: list[Example]
) -> None:
    updates = several(pico_base)
    # The second descent begins after some forty evaluations.
    plan = replace(PLAN, steps=60, bound=0.5)
    found = []
    for other in (1, 2):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(other)
        found.append(run(pico_base, updates, examples, valid, plan))
    one, again = found
    assert one.trained == again.trained
    assert one.watch.losses == again.watch.losses
    assert all(torch.equal(a, b) for a, b in zip(one.watch.seen, again.watch.seen, strict=True))
    assert torch.equal(one.coefficients, again.coefficients)


@pytest.mark.parametrize("dies_at", [4, SAVE_EVERY, SAVE_EVERY + 7, 3 * SAVE_EVERY])
def test_a_killed_search_ends_as_it_would_have(
    pico_base: BaseModel,
    examples: list[Example],
    valid: list[Example],
    tmp_path: Path,
    dies_at: int,
) -> None:
    """What was evaluated is not evaluated again; the last evaluation is among those."""
    updates, plan = several(pico_base), replace(PLAN, steps=3 * SAVE_EVERY, batch_size=2)
    store = Store(tmp_path, RUN)
    undisturbed = run(pico_base, updates, examples, valid, plan)
    with pytest.raises(Killed):
        run(pico_base, updates, examples, valid, plan, store=store, dies_at=dies_at)
    resumed = run(pico_base, updates, examples, valid, plan, store=store)
    assert resumed.trained == undisturbed.trained
    assert torch.equal(resumed.coefficients, undisturbed.coefficients)
    assert resumed.watch.losses == undisturbed.watch.losses
    kept = dies_at // SAVE_EVERY * SAVE_EVERY
    known = sum(step <= kept for step, _ in undisturbed.trained.history[:-1]) if kept else 0
    # Two batches of training rows and the beginning that all share; one of validation rows.
    assert undisturbed.passes == 3 * plan.steps + 2 * len(undisturbed.trained.history)
    assert resumed.passes == undisturbed.passes - 3 * kept - 2 * known


def test_another_search_is_refused(
    pico_base: BaseModel, heads: list[ModelUpdate], examples: list[Example], tmp_path: Path
) -> None:
    run(pico_base, heads, examples, examples, store=Store(tmp_path, RUN))
    with pytest.raises(InputError, match="differs in bound"):
        run(pico_base, heads, examples, examples, store=Store(tmp_path, {**RUN, "bound": 2.0}))


@pytest.mark.parametrize(("count", "steps"), [(1, 1), (1, 60), (2, 150), (4, 300)])
def test_any_number_of_coefficients_and_evaluations(
    pico_base: BaseModel, examples: list[Example], count: int, steps: int
) -> None:
    """Whichever algorithm is chosen for so many of them. What they move is the penalty alone."""
    planted = torch.linspace(-0.8, 0.7, count)
    parameter, used = nn.Parameter(torch.zeros(count)), torch.ones(count, dtype=torch.bool)
    watch = Watch(parameters=[parameter])
    search(
        pico_base,
        [(parameter, used)],
        examples[:1],
        examples[:1],
        replace(PLAN, steps=steps),
        watch,
        lambda: ((parameter - planted) ** 2).sum(),
    )
    assert len(watch.seen) == steps
    nearest = min(float((c - planted).abs().max()) for c in watch.seen)
    assert nearest < 0.05 or steps == 1


def test_products_are_reused_without_a_difference(
    pico_base: BaseModel, examples: list[Example], valid: list[Example]
) -> None:
    plan = replace(PLAN, batch_size=2)
    once, again = (
        run(pico_base, several(pico_base), examples, valid, plan, reuse=reuse)
        for reuse in (False, True)
    )
    assert once.watch.losses == pytest.approx(again.watch.losses, abs=1.1e-3)
    assert [step for step, _ in once.trained.history] == [s for s, _ in again.trained.history]
    for (_, one), (_, other) in zip(once.trained.history, again.trained.history, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    torch.testing.assert_close(once.coefficients, again.coefficients, rtol=0, atol=1e-4)


def test_a_loss_that_is_no_number_ends_it(
    pico_base: BaseModel, heads: list[ModelUpdate], examples: list[Example]
) -> None:
    with pytest.raises(Diverged, match="validation loss became nan"):
        run(pico_base, heads, examples, examples, start=math.nan)
