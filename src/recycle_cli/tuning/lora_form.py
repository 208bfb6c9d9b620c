"""A target LoRA in the form that it is trained in, and how the options of its axes make it.

Each option is a layer around a form: a function that takes the form within, and its own parameters
by name, and gives another form. So CopRA is an ordinary LoRA with hooks of its own around it, and
an architecture takes the place of the ordinary LoRA.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.budget import Budget, estimate
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.store import Store
from recycle_cli.engine.training import Hooks, Trained, TrainingPlan, train
from recycle_cli.lora.update import ModelUpdate
from recycle_cli.parameters import Value
from recycle_cli.progress import Progress
from recycle_cli.tuning.lora_catalog import chosen_options
from recycle_cli.tuning.peft_layers import lora_update, peft_layers, switch
from recycle_cli.tuning.target_lora import LoraRecipe, save_target_lora, target_lora
from recycle_cli.tuning.tuned import Tuned, tokens_a_pass


@dataclass(frozen=True)
class Setup:
    """What a target LoRA is made from.

    Args:
        base: the model.
        recipe: its shape.
        plan: how it will be trained; its seed is that of all that is drawn.
        examples: the training rows.
        max_memory: bytes that may be taken beyond the model; None for what is free.
        only_measured: whether no more than its memory is asked for, so that whatever takes steps or
            looks at rows to make it is left out.
    """

    base: BaseModel
    recipe: LoraRecipe
    plan: TrainingPlan
    examples: Sequence[Example]
    max_memory: int | None = None
    only_measured: bool = False


@dataclass(frozen=True)
class LoraForm:
    """A target LoRA on the base model, ready to be trained.

    Args:
        parameters: what is trained, by name, in float32. The factors of a pair are called the same
            but for `lora_A` and `lora_B`.
        update: the LoRA that equals it as it stands.
        hooks: what it does while it is trained.
        save: writes it as it is to a folder, the factors in a dtype; None where it is written as
            its update says.
        settle: called with the best parameters in place; gives figures for the record, and changes
            what is computed nowhere.
        held: tensors beside the model's that it takes memory for.
        kept_a_row: bytes that its options keep for each row of a pass until the step.
        later: bytes that it takes beyond what is trained at first.
        peft_model: PEFT's wrapper; None where it is in a form of ours.
        begin: told right before it is trained how, with passes that fit into memory.
    """

    parameters: Mapping[str, nn.Parameter]
    update: Callable[[], ModelUpdate]
    hooks: Hooks = field(default_factory=Hooks)
    save: Callable[[Path, torch.dtype], None] | None = None
    settle: Callable[[], dict[str, float]] = dict
    held: Sequence[Tensor] = ()
    kept_a_row: int = 0
    later: int = 0
    peft_model: Any = None
    begin: Callable[[TrainingPlan], object] = lambda _plan: None

    def then(self, hooks: Hooks, settle: Callable[[], dict[str, float]] = dict) -> "LoraForm":
        """The same with more hooks and figures, called after its own."""

        def both() -> dict[str, float]:
            return {**self.settle(), **settle()}

        return replace(self, hooks=self.hooks.then(hooks), settle=both)


Former = Callable[[Setup], AbstractContextManager[LoraForm]]
"""Puts a target LoRA on the base model, as long as the context lasts."""
Layer = Callable[..., AbstractContextManager[LoraForm]]
"""What an option does, as layer(setup, within=former, **own parameters): `within` gives the form
that it is laid around, or that whose place it takes."""


def former_of(settings: Mapping[str, Value]) -> Former:
    """What the options in force make, together.

    Args:
        settings: the options by axis, and their own parameters.
    """
    former: Former = ordinary
    for option in chosen_options(settings):
        if option.target:
            own = {name: settings[name] for name in option.defaults}
            former = functools.partial(option.layer(), within=former, **own)
    return former


@contextlib.contextmanager
def ordinary(setup: Setup) -> Iterator[LoraForm]:
    """An ordinary LoRA, by PEFT."""
    with target_lora(setup.base, setup.recipe, setup.plan.seed) as peft_model:
        yield of_peft(setup.base, peft_model, save_as_it_is=True)


def of_peft(base: BaseModel, peft_model: Any, save_as_it_is: bool = False) -> LoraForm:
    """What PEFT's wrapper trains, as LoRAs.

    Args:
        base: the model within.
        peft_model: the wrapper.
        save_as_it_is: whether the result is what PEFT saves.
    """
    return LoraForm(
        {name: p for name, p in peft_model.named_parameters() if p.requires_grad},
        update=lambda: lora_update(base),
        hooks=Hooks(set_training=peft_model.train),
        save=functools.partial(save_target_lora, peft_model) if save_as_it_is else None,
        peft_model=peft_model,
    )


@contextlib.contextmanager
def of_tuned(setup: Setup, tuned: Tuned) -> Iterator[LoraForm]:
    """A form of ours, on the base model."""

    def update() -> ModelUpdate:
        result = tuned.result()
        assert isinstance(result, Mapping), "a target LoRA routes nothing"
        return result

    with tuned.attached(setup.base, tokens_a_pass(setup.examples, setup.plan)):
        tuned.prepare(setup.base, setup.examples)
        yield LoraForm(
            dict(tuned.named_parameters()),
            update,
            tuned.hooks(),
            settle=tuned.finish,
            held=tuned.held(),
        )


def train_form(
    setup: Setup,
    form: LoraForm,
    valid: Sequence[Example],
    plan: TrainingPlan,
    progress: Progress,
    store: Store | None = None,
) -> tuple[Trained, dict[str, float]]:
    """Trains it; it ends at the step with the lowest validation loss.

    Args:
        setup: what it was made from.
        form: on the base model.
        valid: the rows to validate on.
        plan: the setup's, with passes that fit into memory.
        progress: told of every step.
        store: keeps the run, as in `train`.

    Returns:
        What came of it, and its figures.

    Raises:
        RecycleError: a loss is no longer a finite number, or the disk refused.
    """
    form.begin(plan)
    trained = train(
        setup.base, form.parameters, setup.examples, valid, plan, progress, form.hooks, store
    )
    return trained, form.settle()


def form_budget(setup: Setup, form: LoraForm, limit: int | None = None) -> Budget:
    """The memory that training it takes beyond the model.

    Args:
        setup: what it was made from.
        form: on the base model.
        limit: bytes that may be taken; None for what is free.
    """
    # Dropout keeps its masks.
    form.hooks.set_training(True)
    layers = peft_layers(setup.base)
    switch(layers, layers)  # those too that may sit out now and act later
    try:
        budget = estimate(
            setup.base, form.parameters.values(), setup.examples, setup.plan, limit, form.held
        )
    finally:
        form.hooks.set_training(False)
    return replace(
        budget, trained=budget.trained + form.later, a_row=budget.a_row + form.kept_a_row
    )
