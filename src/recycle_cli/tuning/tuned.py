"""What a tuning method trains, and the loop's view of it."""

import abc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from recycle_cli.engine.adapted import Forward, replaced
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.budget import Budget, estimate
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.products import Reuse
from recycle_cli.engine.search import SearchPlan, search
from recycle_cli.engine.store import Store
from recycle_cli.engine.training import (
    Hooks,
    Trained,
    TrainingPlan,
    train,
    validation_loss,
)
from recycle_cli.errors import InputError
from recycle_cli.lora.routed import RoutedAdapter
from recycle_cli.lora.update import ModelUpdate
from recycle_cli.parameters import Value
from recycle_cli.progress import Progress


@dataclass(frozen=True)
class Ingredients:
    """What a method is given.

    Args:
        updates: the adapters, each read module by module; at least one.
        target: the position of the target LoRA among them, or None.
        seed: of what is drawn.
        device: where the model is.
        dtype: of the model's weights.
    """

    updates: Sequence[ModelUpdate]
    target: int | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Share:
    """How much of an adapter is used, over all its modules: the mean of its coefficients after the
    activation, and the largest size among them."""

    mean: float
    max_abs: float


class Tuned(nn.Module, abc.ABC):
    """Trained parameters that act inside the forward pass of a frozen base model.

    Its parameters are what is trained; its buffers are what else a resumed run needs.
    """

    @abc.abstractmethod
    def forwards(self, base: BaseModel, tokens: float) -> Mapping[str, Forward]:
        """The forward passes of the modules it changes.

        Args:
            base: the model.
            tokens: in one step, about.
        """

    @abc.abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(out, in) of the modules it changes, by path."""

    @abc.abstractmethod
    def shares(self) -> list[Share]:
        """How much of each adapter is used, in their order."""

    def by_module(self) -> Mapping[str, Tensor]:
        """The mean of each adapter's coefficients after the activation, (adapters,), by module
        path; zero where an adapter lacks the module. Empty where there are no coefficients."""
        return {}

    @abc.abstractmethod
    def result(self) -> ModelUpdate | RoutedAdapter:
        """What was trained, as it stands: the one LoRA that equals it, or a routed adapter where
        none does."""

    def state(self) -> dict[str, Tensor]:
        """Named tensors that `load` takes, for `mixture.safetensors`."""
        return {
            self.public_name(name): parameter.detach().cpu()
            for name, parameter in self.named_parameters()
        }

    def public_name(self, name: str) -> str:
        """What a parameter is called in `state`."""
        return name.replace("/", ".")

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Starts from what `state` gave.

        Raises:
            InputError: the tensors are not those of this method with these adapters.
        """
        own = {self.public_name(name): parameter for name, parameter in self.named_parameters()}
        if {n: p.shape for n, p in own.items()} != {n: s.shape for n, s in state.items()}:
            raise InputError(
                "the state to start from is that of other adapters or settings",
                "use the same method, adapters and settings as there",
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def prepare(self, base: BaseModel, examples: Sequence[Example]) -> None:
        """Called once before training, for what needs the model and the training rows."""

    def penalty(self) -> Tensor | None:
        """Added to the training loss; None where there is none."""
        return None

    def after_step(self) -> None:
        """Called after each optimizer step; gradients are still there."""

    def kept(self) -> dict[str, Tensor]:
        """Tensors that belong to the best parameters, as those go with them: see `Hooks`."""
        return {}

    def hooks(self) -> Hooks:
        """What the training loop calls."""
        return Hooks(
            set_training=self.train,
            penalty=self.penalty,
            after_step=self.after_step,
            buffers=dict(self.named_buffers()),
            kept=self.kept(),
        )

    def finish(self) -> dict[str, float]:
        """Called after training with the best parameters in place; gives figures for the record,
        and some wherever it changed what was trained."""
        return {}

    def chosen(self) -> dict[str, Value]:
        """The parameters of the method that it set itself, with their values in force."""
        return {}

    def searched(self) -> list[tuple[nn.Parameter, Tensor]]:
        """The coefficients that a gradient-free search sets: parameters and which entries count."""
        return [(p, torch.ones_like(p, dtype=torch.bool)) for p in self.parameters()]

    def told(self, base: BaseModel, tokens: float) -> str:
        """How its forward passes are computed, in words; nothing where there is no choice."""
        return ""

    @property
    def reuse(self) -> Reuse | None:
        """What keeps the products that a search would compute again; None where nothing does."""
        return None

    def held(self) -> list[Tensor]:
        """The tensors that it takes memory for."""
        return [*self.parameters(), *self.buffers()]

    def attached(self, base: BaseModel, tokens: float = 0) -> AbstractContextManager[None]:
        """The base model with it on, as long as the context lasts.

        Raises:
            AdapterProblem: an adapter does not fit the base model.
        """
        return replaced(base, self.forwards(base, tokens), self.shapes())


def budget_of(
    base: BaseModel,
    tuned: Tuned,
    examples: Sequence[Example],
    plan: TrainingPlan,
    limit: int | None = None,
) -> Budget:
    """The memory that training it takes beyond the model and the adapters.

    Args:
        base: the model.
        tuned: what is trained.
        examples: the training rows.
        plan: how to train.
        limit: bytes that may be taken; None for what is free.
    """
    with tuned.attached(base, tokens_a_pass(examples, plan)):
        return estimate(base, tuned.parameters(), examples, plan, limit, tuned.held())


def tokens_a_pass(examples: Sequence[Example], plan: TrainingPlan | SearchPlan) -> float:
    """In one forward pass, about."""
    lengths = [len(example.prompt) + len(example.answer) for example in examples]
    return plan.rows_a_pass * sum(lengths) / len(lengths)


def fit(
    base: BaseModel,
    tuned: Tuned,
    examples: Sequence[Example],
    valid: Sequence[Example],
    plan: TrainingPlan | SearchPlan,
    progress: Progress,
    store: Store | None = None,
) -> tuple[Trained, dict[str, float]]:
    """Trains it; it ends at the step with the lowest validation loss.

    Returns:
        What came of it, and the figures of `Tuned.finish`. Where that changed what was trained,
        the loss is that of the result; of the training's best step it is in the history.

    Raises:
        AdapterProblem: an adapter does not fit the base model.
        RecycleError: a loss is no longer a finite number.
    """
    with tuned.attached(base, tokens_a_pass(examples, plan)):
        tuned.prepare(base, examples)
        trained = _search_or_train(base, tuned, examples, valid, plan, progress, store)
        figures = tuned.finish()
        if figures:
            trained = replace(trained, best_loss=validation_loss(base, valid, examples))
    return trained, figures


def _search_or_train(
    base: BaseModel,
    tuned: Tuned,
    examples: Sequence[Example],
    valid: Sequence[Example],
    plan: TrainingPlan | SearchPlan,
    progress: Progress,
    store: Store | None,
) -> Trained:
    if isinstance(plan, SearchPlan):
        searched = tuned.searched()
        return search(
            base, searched, examples, valid, plan, progress, tuned.penalty, store, tuned.reuse
        )
    parameters = dict(tuned.named_parameters())
    return train(base, parameters, examples, valid, plan, progress, tuned.hooks(), store)
