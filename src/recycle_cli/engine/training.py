"""The training loop: supervised steps on examples, validation, and the best state kept."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, shared_length
from recycle_cli.engine.forward import Batch, answer_loss, by_length, collate, mean_loss
from recycle_cli.errors import RecycleError
from recycle_cli.progress import Progress

VALID_BATCH = 16
# What transformers calls the schedules.
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class TrainingPlan:
    """How to train.

    Args:
        steps: optimizer steps, at least 1.
        lr: peak learning rate.
        batch_size: examples a step.
        warmup: share of the steps over which the rate rises from 0.
        schedule: how it goes on: it falls as a `cosine`, falls on a line (`linear`), or stays.
        weight_decay: AdamW's decoupled decay.
        max_grad_norm: gradients are scaled down to this norm.
        eval_every: steps between two validations.
        patience: stop after this many validations without a better loss.
        seed: of the order of the examples, and of dropout.
    """

    steps: int
    lr: float
    batch_size: int = 8
    warmup: float = 0.1
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_every: int = 10
    patience: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """What came of it. `history` holds (step, validation loss in nats), step 0 first."""

    best_step: int
    best_loss: float
    history: list[tuple[int, float]]


def train(
    base: BaseModel,
    parameters: Sequence[torch.nn.Parameter],
    examples: Sequence[Example],
    valid: Sequence[Example],
    plan: TrainingPlan,
    progress: Progress,
    set_training: Callable[[bool], object] = lambda _on: None,
    penalty: Callable[[], Tensor] | None = None,
    after_step: Callable[[], object] = lambda: None,
) -> Trained:
    """Trains parameters that act inside the base model's forward pass.

    The parameters end at the values that had the lowest validation loss, the start (step 0)
    included, so that training can never end worse on the validation rows than it began.

    Args:
        base: the model, with whatever holds the parameters attached.
        parameters: what is trained, in float32.
        examples: to train on, in batches drawn without replacement, epoch by epoch.
        valid: to validate on.
        plan: steps, rates and sizes.
        progress: told of every step.
        set_training: switches dropout on and off.
        penalty: added to the training loss; the validation loss is without it.
        after_step: called after each optimizer step, before any validation.

    Raises:
        RecycleError: the training or the validation loss is no longer a finite number.
    """
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, weight_decay=plan.weight_decay)
    schedule: LRScheduler = get_scheduler(
        SCHEDULES[plan.schedule],
        optimizer,
        num_warmup_steps=math.ceil(plan.warmup * plan.steps),
        num_training_steps=plan.steps,
    )
    shared = shared_length([example.prompt for example in [*examples, *valid]])
    valid_batches = _valid_batches(base, valid, shared)
    keeper = _BestKeeper(parameters)
    keeper.consider(0, mean_loss(base, valid_batches))
    order = _example_order(len(examples), plan.seed)
    torch.manual_seed(plan.seed)
    for step in range(1, plan.steps + 1):
        batch = collate(base, [examples[next(order)] for _ in range(plan.batch_size)], shared)
        set_training(True)
        loss = _step(base, batch, parameters, optimizer, plan.max_grad_norm, penalty)
        after_step()
        set_training(False)
        schedule.step()
        if step % plan.eval_every == 0 or step == plan.steps:
            keeper.consider(step, mean_loss(base, valid_batches))
        progress.advance(f"loss {loss:.3f}, best valid {keeper.best_loss:.3f}")
        if keeper.idle >= plan.patience:
            break
    keeper.restore()
    return Trained(keeper.best_step, keeper.best_loss, keeper.history)


def _step(
    base: BaseModel,
    batch: Batch,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    penalty: Callable[[], Tensor] | None,
) -> float:
    """One optimizer step; gives the loss before it, without the penalty."""
    loss: Tensor = answer_loss(base, batch)
    value = _finite(loss.item(), "training")
    optimizer.zero_grad(set_to_none=True)
    (loss if penalty is None else loss + penalty()).backward()
    clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return value


def _finite(loss: float, kind: str) -> float:
    if not math.isfinite(loss):
        raise RecycleError(
            f"the {kind} loss became {loss}", "lower --lr, or leave out the adapter at fault"
        )
    return loss


def _valid_batches(base: BaseModel, valid: Sequence[Example], shared: int) -> list[Batch]:
    lengths = [len(example.prompt) + len(example.answer) for example in valid]
    return [
        collate(base, [valid[index] for index in group], shared)
        for group in by_length(lengths, VALID_BATCH)
    ]


def _example_order(count: int, seed: int) -> Iterator[int]:
    """Endless indices: every example once an epoch, reshuffled each time."""
    shuffler = random.Random(f"order:{seed}")
    while True:
        epoch = list(range(count))
        shuffler.shuffle(epoch)
        yield from epoch


class _BestKeeper:
    """Remembers the parameters with the lowest validation loss."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.best_step = 0
        self.best_loss = math.inf
        self.history: list[tuple[int, float]] = []
        self.idle = 0
        self._best = self._copy()

    def consider(self, step: int, loss: float) -> None:
        self.history.append((step, _finite(loss, "validation")))
        self.idle += 1
        if loss < self.best_loss:
            self.best_step, self.best_loss, self.idle = step, loss, 0
            self._best = self._copy()

    def restore(self) -> None:
        with torch.no_grad():
            for parameter, best in zip(self.parameters, self._best, strict=True):
                parameter.copy_(best)

    def _copy(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]
