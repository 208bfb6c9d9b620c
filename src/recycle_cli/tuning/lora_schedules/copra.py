"""CopRA (arXiv 2410.22911) in the form that its authors published as CoTo (ICML 2025): the LoRAs of
a layer take part in a step with a probability that rises over training.

In the first three quarters of the steps it rises on a line from 0.1 to 1; the last quarter is
ordinary training. One coin decides for all modules of a layer, and coins are tossed again where all
layers would sit out. A layer that sits out is the base model's own, and its LoRAs get no gradients,
so that the optimizer leaves them alone. Validation is always with all of them.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.training import Hooks
from recycle_cli.lora.draws import generator_for
from recycle_cli.tuning.lora_form import Former, LoraForm, Setup
from recycle_cli.tuning.peft_layers import peft_layers, switch

START, END = 0.1, 1.0
RISING = 0.75


@contextlib.contextmanager
def copra(setup: Setup, within: Former) -> Iterator[LoraForm]:
    """CopRA around a form with layers of PEFT's: see `lora_form`."""
    with within(setup) as form:
        layers = RandomLayers(setup.base, steps=setup.plan.steps, seed=setup.plan.seed)
        yield form.then(layers.hooks())


def probability(step: int, steps: int) -> float:
    """That a layer takes part in a step.

    Args:
        step: from 0.
        steps: of the whole training; where there are none, its memory is still asked for.
    """
    rising = max(1, math.ceil(RISING * steps))
    return min(START + (END - START) * step / rising, END)


def toss(count: int, chance: float, generator: torch.Generator) -> list[bool]:
    """Which of some layers take part, at least one.

    Args:
        count: of layers, at least 1.
        chance: that one takes part, above 0.
        generator: of the coins.
    """
    while True:
        active = torch.rand(count, generator=generator) <= chance
        if active.any():
            return [bool(one) for one in active]


def layers_of(paths: Iterable[str]) -> dict[str, list[str]]:
    """Module paths by layer, which is what comes up to its number; a path without one is a layer of
    its own."""
    found: dict[str, list[str]] = {}
    for path in paths:
        parts = path.split(".")
        at = next((at for at, part in enumerate(parts) if part.isdigit()), len(parts))
        found.setdefault(".".join(parts[: at + 1]), []).append(path)
    return found


class RandomLayers:
    """Tosses the coins of a training, step by step.

    Attributes:
        steps_done: () int64; the coins of a step depend on it and on the seed alone, so that a
            resumed run tosses the same.
    """

    def __init__(self, base: BaseModel, *, steps: int, seed: int) -> None:
        self.layers = peft_layers(base)
        self.groups = list(layers_of(self.layers).values())
        self.steps, self.seed = steps, seed
        self.steps_done = torch.zeros((), dtype=torch.int64)

    def active(self, step: int) -> list[str]:
        """The paths of the modules that take part in a step, from 0."""
        chance = probability(step, self.steps)
        coins = toss(len(self.groups), chance, generator_for("copra", self.seed, step))
        return [p for group, on in zip(self.groups, coins, strict=True) if on for p in group]

    def set_training(self, on: bool) -> None:
        """Lets layers sit out for the coming step, or brings all back."""
        switch(self.layers, self.active(int(self.steps_done)) if on else self.layers)

    def after_step(self) -> None:
        """Counts."""
        self.steps_done += 1

    def hooks(self) -> Hooks:
        """What the training loop calls."""
        return Hooks(
            set_training=self.set_training,
            after_step=self.after_step,
            buffers={"copra.steps_done": self.steps_done},
        )
