import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from support import plain
from support.plain import CLOSED_ROWS, DenseModel, mixed_updates, weighted_sum
from torch import Tensor
from torch.nn import functional

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples, shared_length
from recycle_cli.engine.forward import collate, mean_loss
from recycle_cli.engine.products import attached
from recycle_cli.engine.training import Hooks, Trained, TrainingPlan, train
from recycle_cli.errors import RecycleError
from recycle_cli.evaluation.tasks import Row
from recycle_cli.progress import Silent
from recycle_cli.tuning.mixture import Mixture, MixtureRecipe

CPU = torch.device("cpu")
PLAN = TrainingPlan(steps=6, lr=0.05, batch_size=4, eval_every=2)


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[:4])


@pytest.fixture(scope="module")
def valid(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[4:])


class Notes(Silent):
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def advance(self, note: str = "") -> None:
        self.notes.append(note)


def run(
    base: BaseModel,
    examples: Sequence[Example],
    valid: Sequence[Example],
    plan: TrainingPlan,
    progress: Silent | None = None,
    start: float | None = None,
) -> tuple[Trained, Tensor]:
    """Trains the coefficients of three adapters; also gives where they end."""
    mixture = Mixture(mixed_updates(base), MixtureRecipe(), base.compute.device)
    if start is not None:
        for row in mixture.coefficients:
            row.data.fill_(start)
    with attached(base, mixture.components, mixture.gates()):
        trained = train(
            base, dict(mixture.named_parameters()), examples, valid, plan, progress or Silent()
        )
        if math.isfinite(trained.best_loss):
            now = mean_loss(base, [collate(base, valid)])
            assert now == pytest.approx(trained.best_loss, abs=2e-6)
    return trained, torch.stack([row.detach() for row in mixture.coefficients])


def by_hand(
    base: BaseModel, examples: Sequence[Example], valid: Sequence[Example], plan: TrainingPlan
) -> tuple[list[tuple[int, float]], list[Tensor], list[float]]:
    """The same training, step by step on dense weights, every batch the whole of the examples.

    Returns:
        The validation losses, the coefficients after each step and the norms of the gradients.
    """
    updates = mixed_updates(base)
    c = torch.zeros(4, 3, requires_grad=True)

    def loss_on(rows: Sequence[Example]) -> Tensor:
        weights = functional.leaky_relu(c, 0.01)
        return plain.loss(DenseModel(base, weighted_sum(updates, weights)), rows)

    optimizer = torch.optim.AdamW([c], weight_decay=plan.weight_decay)
    warm = math.ceil(plan.warmup * plan.steps)
    history, path, norms = [(0, loss_on(valid).item())], [c.detach().clone()], []
    for step in range(plan.steps):
        if step < warm:
            share = step / warm
        else:
            share = 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (plan.steps - warm))
        for group in optimizer.param_groups:
            group["lr"] = plan.lr * share
        optimizer.zero_grad()
        loss_on(examples).backward()
        assert c.grad is not None
        norms.append(float(c.grad.norm()))
        c.grad *= min(1.0, plan.max_grad_norm / (norms[-1] + 1e-6))
        optimizer.step()
        path.append(c.detach().clone())
        if (step + 1) % plan.eval_every == 0 or step + 1 == plan.steps:
            history.append((step + 1, loss_on(valid).item()))
    return history, path, norms


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        replace(PLAN, warmup=0.0, steps=5),
        replace(PLAN, warmup=0.4, weight_decay=2.0, max_grad_norm=0.02),
        # Two epochs a step: every example is in the batch twice.
        replace(PLAN, batch_size=8, eval_every=4),
    ],
)
def test_it_is_the_loop_written_out(
    pico_base: BaseModel, examples: list[Example], valid: list[Example], plan: TrainingPlan
) -> None:
    history, path, norms = by_hand(pico_base, examples, valid, plan)
    trained, coefficients = run(pico_base, examples, valid, plan)
    assert [step for step, _ in trained.history] == [step for step, _ in history]
    for (_, ours), (_, theirs) in zip(trained.history, history, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert len({round(loss, 3) for _, loss in history}) == len(history)
    if plan.max_grad_norm < 1:
        assert min(norms) < plan.max_grad_norm < max(norms)

    best_step, best_loss = min(history, key=lambda entry: entry[1])
    assert trained.best_step == best_step
    assert trained.best_loss == pytest.approx(best_loss, abs=1e-5)
    torch.testing.assert_close(coefficients, path[best_step], rtol=0, atol=2e-5)


def test_the_best_state_is_kept_and_the_start_is_one(
    pico_base: BaseModel, examples: list[Example], valid: list[Example]
) -> None:
    absurd = replace(PLAN, lr=1e3, warmup=0.0, eval_every=1)
    trained, coefficients = run(pico_base, examples, valid, absurd)
    assert trained.best_step == 0
    assert trained.history[0] == (0, trained.best_loss)
    assert all(loss > trained.best_loss for _, loss in trained.history[1:])
    assert torch.equal(coefficients, torch.zeros(4, 3))


def test_training_on_the_validation_rows_gets_better_at_them(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    trained, _ = run(pico_base, examples, examples, replace(PLAN, steps=15))
    assert trained.best_step > 0
    assert trained.best_loss < trained.history[0][1] - 0.01
    assert (trained.best_step, trained.best_loss) == min(trained.history, key=lambda e: e[1])


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_ends_it(
    pico_base: BaseModel, examples: list[Example], valid: list[Example], patience: int
) -> None:
    plan = replace(PLAN, lr=1e3, warmup=0.0, steps=20, eval_every=2, patience=patience)
    progress = Notes()
    trained, _ = run(pico_base, examples, valid, plan, progress)
    assert [step for step, _ in trained.history] == list(range(0, 2 * patience + 1, 2))
    assert len(progress.notes) == 2 * patience


def test_the_last_step_is_validated_and_every_step_told(
    pico_base: BaseModel, examples: list[Example], valid: list[Example]
) -> None:
    progress = Notes()
    trained, _ = run(pico_base, examples, valid, replace(PLAN, steps=5, eval_every=3), progress)
    assert [step for step, _ in trained.history] == [0, 3, 5]
    assert len(progress.notes) == 5
    assert f"best valid {trained.best_loss:.3f}" in progress.notes[-1]


def test_a_seed_decides_everything(
    pico_base: BaseModel, examples: list[Example], valid: list[Example]
) -> None:
    plan = replace(PLAN, batch_size=1, steps=3)
    one, other, again = (
        run(pico_base, examples, valid, replace(plan, seed=seed)) for seed in (0, 1, 0)
    )
    assert one[0] == again[0]
    assert torch.equal(one[1], again[1])
    assert one[0].history != other[0].history


def test_batches_are_drawn_without_replacement(
    pico_base: BaseModel, examples: list[Example], valid: list[Example]
) -> None:
    """One row a step: the losses of an epoch are those of all rows, in an order of its own."""
    progress = Notes()
    # At such a rate nothing moves.
    plan = replace(PLAN, steps=12, batch_size=1, lr=1e-12)
    run(pico_base, examples, valid, plan, progress)
    losses = [note.split()[1].rstrip(",") for note in progress.notes]
    expected = sorted(f"{float(plain.loss(pico_base.model, [e])):.3f}" for e in examples)
    assert len(set(expected)) == len(examples)
    epochs = [losses[at : at + 4] for at in (0, 4, 8)]
    assert [sorted(epoch) for epoch in epochs] == [expected] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_dropout_is_on_in_steps_alone(
    pico_base: BaseModel, examples: list[Example], valid: list[Example]
) -> None:
    parameter = torch.nn.Parameter(torch.zeros(32))
    state = {"on": False, "steps": 0, "validations": 0}

    def switch(on: bool) -> None:
        state["on"] = on

    def add(_module: object, _inputs: object, output: Tensor) -> Tensor:
        assert state["on"] == torch.is_grad_enabled()
        state["steps" if state["on"] else "validations"] += 1
        return output + parameter

    # The last norm is run twice a pass: for the shared beginning and for the rest.
    handle = pico_base.model.model.norm.register_forward_hook(add)
    try:
        train(
            pico_base, {"p": parameter}, examples, valid, PLAN, Silent(), Hooks(set_training=switch)
        )
    finally:
        handle.remove()
    assert state == {"on": False, "steps": 2 * PLAN.steps, "validations": 2 * 4}


class Gradients:
    """What the gradients are after each step's clipping, and what a penalty adds to them."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.seen: list[Tensor] = []

    def after_step(self) -> None:
        found = [row.grad for row in self.mixture.coefficients]
        assert all(grad is not None for grad in found)
        self.seen.append(torch.stack([grad.clone() for grad in found if grad is not None]))

    def penalty(self) -> Tensor:
        return torch.stack([(row**2).sum() for row in self.mixture.coefficients]).sum()

    @property
    def hooks(self) -> Hooks:
        return Hooks(penalty=self.penalty, after_step=self.after_step)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_small_passes_add_up_to_the_whole_step(
    pico_base: BaseModel, valid: list[Example], rows: int, checkpointing: bool
) -> None:
    """Rows whose answers have 2 to 33 tokens, so that passes weigh unequally."""
    examples = encode_examples(pico_base, [*CLOSED_ROWS[:4], Row("a", "a whole sentence " * 2)])
    assert len({len(example.answer) for example in examples}) > 3
    whole = replace(PLAN, batch_size=5, max_grad_norm=1e9, steps=4)

    def trained(plan: TrainingPlan) -> tuple[Trained, Tensor, list[Tensor]]:
        mixture = Mixture(mixed_updates(pico_base), MixtureRecipe("linear", "one"), CPU)
        notes = Gradients(mixture)
        with mixture.attached(pico_base):
            result = train(
                pico_base,
                dict(mixture.named_parameters()),
                examples,
                valid,
                plan,
                Silent(),
                notes.hooks,
            )
        return result, torch.stack([row.detach() for row in mixture.coefficients]), notes.seen

    small = replace(whole, micro_batch=rows, checkpointing=checkpointing)
    (one, coefficients, gradients), (other, expected, whole_gradients) = (
        trained(small),
        trained(whole),
    )
    assert len(gradients) == 4
    torch.testing.assert_close(gradients[0], whole_gradients[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients, whole_gradients, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(coefficients, expected, rtol=0, atol=1e-5)
    assert one.best_step == other.best_step
    assert one.best_loss == pytest.approx(other.best_loss, abs=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "step"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_the_rate_follows_its_schedule(
    pico_base: BaseModel,
    examples: list[Example],
    valid: list[Example],
    schedule: str,
    warmup: float,
) -> None:
    """AdamW moves a number whose gradient never changes by the rate itself."""
    plan = TrainingPlan(
        steps=12, lr=0.01, batch_size=2, warmup=warmup, lr_schedule=schedule, max_grad_norm=1e9
    )
    number = torch.nn.Parameter(torch.zeros(()))
    path = [0.0]
    hooks = Hooks(penalty=lambda: -number, after_step=lambda: path.append(number.item()))
    mixture = Mixture(mixed_updates(pico_base), MixtureRecipe(), CPU)
    with mixture.attached(pico_base):
        everything = {"number": number, **dict(mixture.named_parameters())}
        train(pico_base, everything, examples, valid, plan, Silent(), hooks)
    shares = [(new - old) / plan.lr for old, new in itertools.pairwise(path)]
    warm = int(warmup * plan.steps)
    rest = plan.steps - warm
    expected = {
        "cosine": [0.5 + 0.5 * math.cos(math.pi * step / rest) for step in range(rest)],
        "linear": [1 - step / rest for step in range(rest)],
        "constant": [1.0] * rest,
        # Four examples, two a step: an epoch every other step, from the first on.
        "step": [0.85 ** ((warm + step) // 2) for step in range(rest)],
    }[schedule]
    rising = [step / 3 for step in range(warm)]
    assert shares == pytest.approx(rising + expected, abs=1e-5)


def test_a_validation_runs_the_shared_beginning_once(
    pico_base: BaseModel, examples: list[Example], valid: list[Example]
) -> None:
    """And in each batch of its own where the beginnings differ."""
    rows = [*examples, *valid]
    shared = shared_length([example.prompt for example in rows])
    pairs = [[rows[1], rows[2]], [rows[0], rows[3]], [rows[4], rows[5]]]
    batches = [collate(pico_base, pair, shared) for pair in pairs]
    own = [collate(pico_base, pair) for pair in pairs]
    assert len({len(batch.prefix) for batch in own}) > 1
    mixture = Mixture(mixed_updates(pico_base), MixtureRecipe("linear", "one"), CPU)
    passes: list[int] = []
    handle = pico_base.model.model.register_forward_hook(
        lambda _module, inputs, _output: passes.append(inputs[0].shape[1])
    )
    try:
        with mixture.attached(pico_base):
            once, each = mean_loss(pico_base, batches), mean_loss(pico_base, own)
    finally:
        handle.remove()
    assert passes == [
        shared,
        *(batch.tokens.shape[1] for batch in batches),
        *(length for b in own for length in (len(b.prefix), b.tokens.shape[1])),
    ]
    with torch.no_grad():
        dense = DenseModel(pico_base, weighted_sum(mixed_updates(pico_base), torch.ones(4, 3)))
        expected = float(plain.loss(dense, rows))
    assert once == pytest.approx(expected, abs=1e-5)
    assert each == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("start", [math.nan, math.inf])
def test_a_start_without_a_loss_ends_it(
    pico_base: BaseModel, examples: list[Example], valid: list[Example], start: float
) -> None:
    with pytest.raises(RecycleError, match=r"^the validation loss became (nan|inf)$") as caught:
        run(pico_base, examples, valid, PLAN, start=start)
    assert "--lr" in caught.value.hint


def test_a_step_that_blows_up_ends_it(
    pico_base: BaseModel, examples: list[Example], valid: list[Example]
) -> None:
    plan = replace(PLAN, lr=1e37, warmup=0.0, eval_every=6)
    with pytest.raises(RecycleError, match=r"^the training loss became (nan|inf)$"):
        run(pico_base, examples, valid, plan)
