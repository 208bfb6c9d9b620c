"""The training loop: supervised steps on examples, validation, and the best state kept."""

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import get_scheduler

from recycle_cli.engine.attention import attention_with_gradients
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.checkpointing import gradient_checkpointing
from recycle_cli.engine.encoding import Example, shared_length
from recycle_cli.engine.forward import Batch, answer_loss, by_length, collate, mean_loss
from recycle_cli.engine.store import Snapshot, Store
from recycle_cli.errors import RecycleError
from recycle_cli.progress import Progress

VALID_BATCH = 16
# What transformers calls the schedules.
LIBRARY_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
STEP = "step"
STEP_FACTOR = 0.85


class Diverged(RecycleError):
    """A loss is no longer a finite number, and would not be when run again."""


@dataclass(frozen=True)
class TrainingPlan:
    """How to train.

    Args:
        steps: optimizer steps; 0 only validates the start.
        lr: peak learning rate.
        batch_size: examples a step.
        micro_batch: examples a pass; gradients of the passes of a step are summed. None for all.
        warmup: share of the steps over which the rate rises from 0.
        lr_schedule: how it goes on: it falls as a `cosine`, falls on a line (`linear`), stays
            (`constant`), or falls to 0.85 of itself after each epoch (`step`).
        weight_decay: decoupled from the gradients.
        max_grad_norm: gradients are scaled down to this norm.
        eval_every: steps between two validations.
        patience: stop after this many validations without a better loss.
        checkpointing: compute the activations of each layer again in the backward pass instead of
            keeping them: less memory, a third more time.
        seed: of the order of the examples, and of dropout.
    """

    steps: int
    lr: float
    batch_size: int = 8
    micro_batch: int | None = None
    warmup: float = 0.1
    lr_schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_every: int = 10
    patience: int = 20
    checkpointing: bool = False
    seed: int = 0

    @property
    def rows_a_pass(self) -> int:
        """Examples in one forward and backward pass."""
        return min(self.micro_batch or self.batch_size, self.batch_size)

    def with_rows_a_pass(self, rows: int) -> "TrainingPlan":
        """The same with fewer examples in one pass."""
        return replace(self, micro_batch=rows)


@dataclass(frozen=True)
class Trained:
    """What came of it. `history` holds (step, validation loss in nats), step 0 first."""

    best_step: int
    best_loss: float
    history: list[tuple[int, float]]


Parameters = Mapping[str, nn.Parameter]


def adamw(parameters: Parameters, plan: TrainingPlan) -> torch.optim.Optimizer:
    """The usual optimizer (arXiv 1711.05101)."""
    return torch.optim.AdamW(parameters.values(), lr=plan.lr, weight_decay=plan.weight_decay)


def clip_norm(parameters: Iterable[nn.Parameter], highest: float) -> None:
    """Scales the gradients of all parameters down to a norm."""
    clip_grad_norm_(parameters, highest)


@dataclass(frozen=True)
class Hooks:
    """What a method does while it is trained.

    Args:
        set_training: switches dropout on and off.
        penalty: added to the training loss, where it gives something; the validation loss is
            without it.
        after_step: called after each optimizer step, before any validation; gradients are there.
        buffers: tensors that it changes meanwhile, and that a resumed run has to go on with.
        kept: such tensors that also belong to the parameters they were beside, and so go back to
            what they were at the lowest validation loss.
        optimizer: makes what turns gradients into a step. The rates of its groups at that time are
            their peaks, and all follow the same schedule. What it keeps by the time of a validation
            is in its `state_dict`, as tensors and numbers.
        clip: scales gradients down before the step, given the parameters and the norm.
    """

    set_training: Callable[[bool], object] = lambda _on: None
    penalty: Callable[[], Tensor | None] = lambda: None
    after_step: Callable[[], object] = lambda: None
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: Callable[[Parameters, TrainingPlan], torch.optim.Optimizer] = adamw
    clip: Callable[[Iterable[nn.Parameter], float], object] = clip_norm

    def then(self, other: "Hooks") -> "Hooks":
        """These and others, these first. Optimizer and clipping are those of the others, where they
        have their own."""

        def set_training(on: bool) -> None:
            self.set_training(on)
            other.set_training(on)

        def after_step() -> None:
            self.after_step()
            other.after_step()

        def penalty() -> Tensor | None:
            found = [term for term in (self.penalty(), other.penalty()) if term is not None]
            return torch.stack(found).sum() if found else None

        return Hooks(
            set_training,
            penalty,
            after_step,
            {**self.buffers, **other.buffers},
            {**self.kept, **other.kept},
            self.optimizer if other.optimizer is adamw else other.optimizer,
            self.clip if other.clip is clip_norm else other.clip,
        )


def train(
    base: BaseModel,
    parameters: Mapping[str, nn.Parameter],
    examples: Sequence[Example],
    valid: Sequence[Example],
    plan: TrainingPlan,
    progress: Progress,
    hooks: Hooks | None = None,
    store: Store | None = None,
) -> Trained:
    """Trains parameters that act inside the base model's forward pass.

    The parameters end at the values that had the lowest validation loss, the start (step 0)
    included, so that training can never end worse on the validation rows than it began.

    Args:
        base: the model, with whatever holds the parameters attached.
        parameters: what is trained, by name, in float32.
        examples: to train on, in batches drawn without replacement, epoch by epoch.
        valid: to validate on.
        plan: steps, rates and sizes.
        progress: told of every step.
        hooks: what the method does meanwhile.
        store: keeps the run after each validation; where it holds one, that is gone on with, and
            ends as it would have without the interruption.

    Raises:
        Diverged: the training or the validation loss is no longer a finite number.
        RecycleError: the disk refused.
    """
    run = _Run(base, parameters, examples, valid, plan, hooks or Hooks())
    order = _example_order(len(examples), plan.seed)
    torch.manual_seed(plan.seed)
    saved = store.load() if store else None
    if saved is None:
        run.keeper.consider(0, run.valid_loss())
        done = 0
    else:
        done = run.restore(saved)
        progress.message(f"going on from step {done}")
        for _ in range(done * plan.batch_size):
            next(order)
    for _ in range(done):
        progress.advance()
    for step in range(done + 1, plan.steps + 1):
        if run.keeper.idle >= plan.patience:
            break
        loss = run.step(step, [examples[next(order)] for _ in range(plan.batch_size)])
        if step % plan.eval_every == 0 or step == plan.steps:
            run.keeper.consider(step, run.valid_loss())
            if store:
                store.save(run.snapshot(step))
        progress.advance(f"loss {loss:.3f}, best valid {run.keeper.best_loss:.3f}")
    run.keeper.restore()
    return Trained(run.keeper.best_step, run.keeper.best_loss, run.keeper.history)


def validation_loss(
    base: BaseModel, valid: Sequence[Example], examples: Sequence[Example]
) -> float:
    """The mean loss on validation rows, of the model as it stands, as `train` takes it beside
    these training rows.

    Raises:
        Diverged: it is no finite number.
    """
    shared = shared_length([example.prompt for example in [*examples, *valid]])
    batches = batches_of(base, valid, shared, VALID_BATCH)
    return finite(mean_loss(base, batches), "validation")


class _Run:
    """A training under way."""

    def __init__(
        self,
        base: BaseModel,
        parameters: Mapping[str, nn.Parameter],
        examples: Sequence[Example],
        valid: Sequence[Example],
        plan: TrainingPlan,
        hooks: Hooks,
    ) -> None:
        self.base, self.plan, self.hooks = base, plan, hooks
        self.parameters = dict(parameters)
        self.shared = shared_length([example.prompt for example in [*examples, *valid]])
        self.valid_batches = batches_of(base, valid, self.shared, VALID_BATCH)
        self.kept: dict[str, Tensor] = {**self.parameters, **hooks.kept}
        self.keeper = BestKeeper(list(self.kept.values()))
        self.optimizer = hooks.optimizer(self.parameters, plan)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.rate = _rate(plan, self.optimizer, math.ceil(len(examples) / plan.batch_size))

    def valid_loss(self) -> float:
        return mean_loss(self.base, self.valid_batches)

    def step(self, number: int, batch: Sequence[Example]) -> float:
        """One optimizer step; gives the loss before it, without the penalty."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.rate(number - 1)
        self.hooks.set_training(True)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(batch)
        self.hooks.clip(self.parameters.values(), self.plan.max_grad_norm)
        self.optimizer.step()
        self.hooks.after_step()
        self.hooks.set_training(False)
        return loss

    def _backward(self, batch: Sequence[Example]) -> float:
        """The gradients of the mean loss over the batch's answer tokens, pass by pass."""
        size, plan = self.plan.rows_a_pass, self.plan
        tokens = sum(len(example.answer) for example in batch)
        total = 0.0
        with contextlib.ExitStack() as around:
            if plan.checkpointing:
                around.enter_context(gradient_checkpointing(self.base))
            for start in range(0, len(batch), size):
                rows = batch[start : start + size]
                # Layers that are run again cannot add to a cache of keys and values twice.
                part = collate(self.base, rows, 0 if plan.checkpointing else self.shared)
                with attention_with_gradients(self.base, part.attention.shape[1]):
                    loss = answer_loss(self.base, part) * (part.targets.numel() / tokens)
                    total += finite(loss.item(), "training")
                    loss.backward()
        penalty = self.hooks.penalty()
        if penalty is not None:
            penalty.backward()
        return total

    def snapshot(self, step: int) -> Snapshot:
        """All that it takes to go on from here."""
        keeper = self.keeper
        tensors = {f"now.{name}": kept.detach() for name, kept in self.kept.items()}
        tensors |= {f"best.{name}": best for name, best in zip(self.kept, keeper.best, strict=True)}
        tensors |= _flat_state(self.optimizer)
        tensors |= {f"buffer.{name}": buffer for name, buffer in self.hooks.buffers.items()}
        tensors |= {f"random.{name}": state for name, state in _random_state(self.base).items()}
        return Snapshot(tensors, step, keeper.best_step, keeper.idle, keeper.history)

    def restore(self, saved: Snapshot) -> int:
        """Goes back to a snapshot; gives its step."""
        keeper, tensors = self.keeper, saved.tensors
        keeper.best_step, keeper.idle = saved.best_step, saved.idle
        keeper.history = [*saved.history]
        keeper.best_loss = dict(saved.history)[saved.best_step]
        with torch.no_grad():
            for at, (name, kept) in enumerate(self.kept.items()):
                kept.copy_(tensors[f"now.{name}"])
                keeper.best[at] = tensors[f"best.{name}"].to(kept.device)
            for name, buffer in self.hooks.buffers.items():
                buffer.copy_(tensors[f"buffer.{name}"])
        _restore_state(self.optimizer, tensors)
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.base.compute.device)
        return saved.step


OPTIMIZER, NUMBER = "optimizer.", "optimizer_number."


def _flat_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer keeps, by the parameter's number, or whatever it goes by, and what it is.
    Plain numbers become tensors of one, of the kind that gives them back as they were."""
    found = {}
    for of, state in optimizer.state_dict()["state"].items():
        for what, value in state.items():
            if isinstance(value, Tensor):
                found[f"{OPTIMIZER}{of}.{what}"] = value
            else:
                kind = torch.float64 if isinstance(value, float) else None
                found[f"{NUMBER}{of}.{what}"] = torch.tensor(value, dtype=kind)
    return found


def _restore_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Gives an optimizer what `_flat_state` had found."""
    states: dict[int | str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        kind = next((kind for kind in (OPTIMIZER, NUMBER) if name.startswith(kind)), None)
        if kind:
            of, _, what = name.removeprefix(kind).rpartition(".")
            key = int(of) if of.isdigit() else of
            states.setdefault(key, {})[what] = tensor if kind == OPTIMIZER else tensor.item()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def _random_state(base: BaseModel) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if base.compute.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(base.compute.device)
    return state


def _rate(
    plan: TrainingPlan, optimizer: torch.optim.Optimizer, steps_an_epoch: int
) -> Callable[[int], float]:
    """The share of the peak rate, by the number of steps done."""
    warmup = math.ceil(plan.warmup * plan.steps)
    if plan.lr_schedule == STEP:
        return lambda done: (
            done / warmup if done < warmup else STEP_FACTOR ** (done // steps_an_epoch)
        )
    library = get_scheduler(
        LIBRARY_SCHEDULES[plan.lr_schedule],
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=plan.steps,
    )
    rate: Callable[[int], float] = library.lr_lambdas[0]
    return rate


def finite(loss: float, kind: str) -> float:
    """The loss.

    Raises:
        Diverged: it is no finite number.
    """
    if not math.isfinite(loss):
        raise Diverged(
            f"the {kind} loss became {loss}", "lower --lr, or leave out the adapter at fault"
        )
    return loss


def batches_of(base: BaseModel, examples: Sequence[Example], shared: int, size: int) -> list[Batch]:
    """Examples in batches of like lengths, to take a mean loss of."""
    lengths = [len(example.prompt) + len(example.answer) for example in examples]
    return [
        collate(base, [examples[index] for index in group], shared)
        for group in by_length(lengths, size)
    ]


def _example_order(count: int, seed: int) -> Iterator[int]:
    """Endless indices: every example once an epoch, reshuffled each time."""
    shuffler = random.Random(f"order:{seed}")
    while True:
        epoch = list(range(count))
        shuffler.shuffle(epoch)
        yield from epoch


class BestKeeper:
    """Remembers the parameters with the lowest validation loss."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.best_step = 0
        self.best_loss = math.inf
        self.history: list[tuple[int, float]] = []
        self.idle = 0
        self.best = self._copy()

    def consider(self, step: int, loss: float) -> None:
        """Takes the parameters as they are, where their loss is the lowest so far."""
        self.history.append((step, finite(loss, "validation")))
        self.idle += 1
        if loss < self.best_loss:
            self.best_step, self.best_loss, self.idle = step, loss, 0
            self.best = self._copy()

    def restore(self) -> None:
        """Puts the best parameters in place."""
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self.best, strict=True):
                parameter.copy_(best)

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]
