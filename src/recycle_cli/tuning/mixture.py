"""The mixture: frozen adapters with learned coefficients.

y = W x + sum_i f(c_mi) s_i B_mi A_mi x for every linear module m, with one coefficient c_mi for
each module and adapter (arXiv 2602.12323, section 3). Base and adapters stay frozen; the result is
exactly one LoRA whose rank is the sum of the adapters' ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from recycle_cli.engine.adapted import Gate, ModuleComponents, attached, concatenate, fold
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.training import Trained, TrainingPlan, train
from recycle_cli.lora.update import ModelUpdate
from recycle_cli.progress import Progress

LEAKY_SLOPE = 0.01

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "leaky-relu": lambda c: functional.leaky_relu(c, LEAKY_SLOPE),
    "linear": lambda c: c,
}
INITS: Mapping[str, float] = {"zero": 0.0, "one": 1.0}

PAPER_PLAN = TrainingPlan(steps=100, lr=5e-2)


@dataclass(frozen=True)
class MixtureRecipe:
    """The form of a mixture.

    Args:
        activation: f, a key of `ACTIVATIONS`.
        init: the value that all coefficients start from, a key of `INITS`. With "zero" the model
            starts as the base model.
    """

    activation: str = "leaky-relu"
    init: str = "zero"


class Mixture(nn.Module):
    """The coefficients of several adapters in every module they touch.

    Attributes:
        coefficients: (modules, adapters) float32, before the activation; the entry of an adapter
            that lacks a module is never used.
        modules_touched: the module paths, in the order of the rows.
    """

    def __init__(
        self, updates: Sequence[ModelUpdate], recipe: MixtureRecipe, device: torch.device
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.components: dict[str, ModuleComponents] = concatenate(updates)
        self.modules_touched = tuple(self.components)
        start = torch.full((len(self.components), len(updates)), INITS[recipe.init])
        self.coefficients = nn.Parameter(start.to(device))
        self._owners = {path: c.owner.to(device) for path, c in self.components.items()}

    def gates(self) -> dict[str, Gate]:
        """For each module path, the function that gives one number for each rank-1 component."""
        return {path: self._gate(row, path) for row, path in enumerate(self.modules_touched)}

    def activated(self) -> Tensor:
        """f(c), (modules, adapters); zero where an adapter lacks the module."""
        values = ACTIVATIONS[self.recipe.activation](self.coefficients.detach())
        mask = torch.zeros_like(values)
        for row, path in enumerate(self.modules_touched):
            mask[row, self._owners[path].unique()] = 1
        return values * mask

    def folded(self) -> ModelUpdate:
        """The one LoRA that equals the mixture as it stands."""
        return fold(self.components, self.gates())

    def _gate(self, row: int, path: str) -> Gate:
        activation, owner = ACTIVATIONS[self.recipe.activation], self._owners[path]
        return lambda: activation(self.coefficients[row])[owner]


def train_mixture(
    base: BaseModel,
    mixture: Mixture,
    examples: Sequence[Example],
    valid: Sequence[Example],
    plan: TrainingPlan,
    progress: Progress,
) -> Trained:
    """Learns the coefficients; they end at the step with the lowest validation loss.

    Raises:
        AdapterProblem: an adapter does not fit the base model.
    """
    with attached(base, mixture.components, mixture.gates()):
        return train(base, [mixture.coefficients], examples, valid, plan, progress)
