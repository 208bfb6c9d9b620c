"""Gradient-free search for coefficients: nevergrad asks, passes over the training rows answer.

The rows go in batches, where LoraHub's go one by one, and what they all begin with is run once an
evaluation.
"""

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, shared_length
from recycle_cli.engine.forward import mean_loss
from recycle_cli.engine.products import Reuse
from recycle_cli.engine.store import Snapshot, Store
from recycle_cli.engine.training import BestKeeper, Trained, batches_of, finite
from recycle_cli.progress import Progress

SAVE_EVERY = 10
"""Evaluations between two savings."""
# NGOpt chooses an algorithm by the number of coefficients and evaluations. Its other choices fit a
# model to the losses, which nevergrad 1.0.12 cannot do with numpy 2.4, and which it ends by the
# clock, so that no seed would repeat it.
KEPT = ("Cobyla", "CMA")


@dataclass(frozen=True)
class SearchPlan:
    """How to search.

    Args:
        steps: evaluations of the training rows.
        bound: coefficients lie in [-bound, bound].
        batch_size: examples a pass; it changes the speed alone.
        seed: of the search.
    """

    steps: int
    bound: float
    batch_size: int = 32
    seed: int = 0

    @property
    def rows_a_pass(self) -> int:
        """Examples in one forward pass."""
        return self.batch_size

    def with_rows_a_pass(self, rows: int) -> "SearchPlan":
        """The same with fewer examples in one forward pass."""
        return replace(self, batch_size=rows)


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Keeps nevergrad's doings within: the warnings, its own and scipy's, about settings that it
    chooses itself, and the thread that waits for the next loss, which would keep an interrupted
    process from ending."""
    before = set(threading.enumerate())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(nevergrad|scipy)\.")
        try:
            yield
        finally:
            for thread in set(threading.enumerate()) - before:
                if type(thread).__module__.startswith("nevergrad."):
                    thread.stop()  # type: ignore[attr-defined]


@_contained()
def search(
    base: BaseModel,
    parameters: Sequence[tuple[nn.Parameter, Tensor]],
    examples: Sequence[Example],
    valid: Sequence[Example],
    plan: SearchPlan,
    progress: Progress,
    penalty: Callable[[], Tensor | None] = lambda: None,
    store: Store | None = None,
    reuse: Reuse | None = None,
) -> Trained:
    """Sets coefficients by their loss on the training rows, as LoraHub does (arXiv 2307.13269).

    Each time that loss is the lowest so far, and once for what the search recommends in the end,
    the validation rows are asked; the coefficients end where their loss was the lowest, the start
    included.

    Args:
        base: the model, with whatever holds the parameters attached.
        parameters: coefficients, and which of their entries are in use.
        examples: whose mean loss is searched.
        valid: to validate on.
        plan: evaluations and bounds.
        progress: told of every evaluation.
        penalty: added to the loss that is searched.
        store: keeps the losses; where it holds some, their evaluations are not run again.
        reuse: keeps what is the same in every evaluation.

    Raises:
        Diverged: a loss is not a finite number.
        RecycleError: the disk refused.
    """
    shared = shared_length([example.prompt for example in [*examples, *valid]])
    rows = batches_of(base, examples, shared, plan.batch_size)
    valid_rows = batches_of(base, valid, shared, plan.batch_size)
    space = _Space(parameters)
    keeper = BestKeeper([parameter for parameter, _ in parameters])
    optimizer = _optimizer(plan, space.start)
    losses, known = _kept(store)
    lowest = math.inf

    def validate(step: int, known_loss: float | None = None) -> None:
        keeper.consider(step, mean_loss(base, valid_rows) if known_loss is None else known_loss)

    def evaluate() -> float:
        loss = mean_loss(base, rows, reuse.begin) if reuse else mean_loss(base, rows)
        if reuse:
            reuse.pause()
        return finite(loss, "training") + _number(penalty())

    validate(0, known.get(0))
    for step in range(1, plan.steps + 1):
        candidate = optimizer.ask()
        space.set(candidate.value)
        again = step <= len(losses)
        if not again:
            losses.append(evaluate())
        loss = losses[step - 1]
        optimizer.tell(candidate, loss)
        if loss < lowest:
            lowest = loss
            validate(step, known.get(step))
        if store and not again and step % SAVE_EVERY == 0:
            store.save(_snapshot(losses, keeper))
        progress.advance(f"loss {loss:.3f}, best valid {keeper.best_loss:.3f}")
    if reuse:
        reuse.end()
    if plan.steps:
        space.set(optimizer.provide_recommendation().value)
        validate(plan.steps)
    keeper.restore()
    return Trained(keeper.best_step, keeper.best_loss, keeper.history)


class _Space:
    """The entries in use of several parameters, as one vector."""

    def __init__(self, parameters: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        self._parameters = parameters
        self.start = torch.cat([p.detach()[used].double().cpu() for p, used in parameters]).numpy()

    @torch.no_grad()
    def set(self, values: Any) -> None:
        """Puts a vector into the parameters."""
        vector = torch.as_tensor(values, dtype=torch.float64)
        at = 0
        for parameter, used in self._parameters:
            count = int(used.sum())
            parameter[used] = vector[at : at + count].to(parameter)
            at += count


def _optimizer(plan: SearchPlan, start: Any) -> Any:
    import nevergrad

    space = nevergrad.p.Array(init=start.clip(-plan.bound, plan.bound))
    space.set_bounds(-plan.bound, plan.bound)
    space.random_state.seed(plan.seed)
    algorithms, budget = nevergrad.optimizers.registry, max(1, plan.steps)
    optimizer = algorithms["NGOpt"](space, budget=budget)
    return optimizer if optimizer.optim.name in KEPT else algorithms["Cobyla"](space, budget=budget)


def _kept(store: Store | None) -> tuple[list[float], dict[int, float]]:
    """The training losses and the validation losses, by step, of an interrupted search."""
    saved = store.load() if store else None
    if saved is None:
        return [], {}
    return saved.tensors["losses"].tolist(), dict(saved.history)


def _snapshot(losses: Sequence[float], keeper: BestKeeper) -> Snapshot:
    """What repeats a search: it is deterministic, given what it was told."""
    told = {"losses": torch.tensor(losses, dtype=torch.float64)}
    return Snapshot(told, len(losses), keeper.best_step, keeper.idle, keeper.history)


def _number(penalty: Tensor | None) -> float:
    return 0.0 if penalty is None else float(penalty.detach())
