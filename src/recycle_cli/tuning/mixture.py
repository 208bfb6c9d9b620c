"""The mixture: frozen adapters with learned coefficients.

y = W x + sum_i f(c_mi) s_i B_mi A_mi x for every linear module m (arXiv 2602.12323, section 3).
Base and adapters stay frozen; the result is exactly one LoRA whose rank is the sum of the
adapters' ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recycle_cli.engine.adapted import Gate, ModuleComponents, attached, concatenate, fold
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.training import Trained, TrainingPlan, train
from recycle_cli.lora.update import ModelUpdate
from recycle_cli.progress import Progress
from recycle_cli.tuning.layout import (
    ACTIVATIONS,
    INITS,
    MODULE,
    Layout,
    Start,
    lay_out,
)


@dataclass(frozen=True)
class MixtureRecipe:
    """The form of a mixture.

    Args:
        activation: f, a key of `ACTIVATIONS`.
        init: where the coefficients start, a key of `INITS`. With "zero" (and an f that keeps
            zero) the model starts as the base model.
        granularity: what shares a coefficient, one of `GRANULARITIES`.
        affine: follow f by a f(c) + b with learned a and b for each group, from 1 and 0; for the
            activations in `AFFINE`.
        l1: the weight of mean |c| in the loss.
    """

    activation: str = "leaky-relu"
    init: str = "zero"
    granularity: str = MODULE
    affine: bool = False
    l1: float = 0.0


class Mixture(nn.Module):
    """The coefficients of several adapters.

    Attributes:
        layout: which component takes which coefficient.
        coefficients: for each group of the layout (width,) float32, before the activation; entries
            that are not present are never used.
        slopes: for each group (1,) float32, a of the affine form; empty without it.
        offsets: for each group (1,) float32, b of the affine form; empty without it.
    """

    def __init__(
        self,
        updates: Sequence[ModelUpdate],
        recipe: MixtureRecipe,
        device: torch.device,
        target: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.components: dict[str, ModuleComponents] = concatenate(updates)
        self.adapters = len(updates)
        self.layout: Layout = lay_out(self.components, self.adapters, recipe.granularity)
        owner = _owners(self.layout, self.components)
        start = INITS[recipe.init](Start(self.layout, owner, self.adapters, target, seed))
        self.coefficients = _parameters(start.to(device))
        ones = torch.ones(len(start) if recipe.affine else 0, 1, device=device)
        self.slopes, self.offsets = _parameters(ones), _parameters(torch.zeros_like(ones))
        self._present = self.layout.present.to(device)
        self._columns = {path: taken.to(device) for path, taken in self.layout.column.items()}

    def row(self, number: int) -> Tensor:
        """f(c) of a group, or a f(c) + b, (width,)."""
        activation = ACTIVATIONS[self.recipe.activation]
        activated = activation(self.coefficients[number], self._present[number])
        if self.recipe.affine:
            activated = self.slopes[number] * activated + self.offsets[number]
        return activated

    def gates(self) -> dict[str, Gate]:
        """For each module path, the function that gives one number for each rank-1 component."""
        return {path: self._gate(path) for path in self.components}

    def activated(self) -> Tensor:
        """The number before the components of each adapter, (modules, adapters), as a mean where
        they have several; zero where an adapter lacks the module. Rows are in the order of
        `components`."""
        means = torch.zeros(len(self.components), self.adapters)
        for mean, (path, piece) in zip(means, self.components.items(), strict=True):
            counts = torch.bincount(piece.owner, minlength=self.adapters).clamp(min=1)
            gate = self._gate(path)().detach().float().cpu()
            mean.index_add_(0, piece.owner, gate).div_(counts)
        return means

    def penalty(self) -> Tensor:
        """l1 times the mean of |c| over the coefficients in use."""
        rows = zip(self.coefficients, self._present, strict=True)
        total = torch.stack([row[there].abs().sum() for row, there in rows]).sum()
        return self.recipe.l1 * total / self.layout.count

    def folded(self) -> ModelUpdate:
        """The one LoRA that equals the mixture as it stands."""
        return fold(self.components, self.gates())

    def _gate(self, path: str) -> Gate:
        row, columns = self.layout.row[path], self._columns[path]
        return lambda: self.row(row)[columns]


def _parameters(rows: Tensor) -> nn.ParameterList:
    """One parameter for each row, so that a module's gradient touches its own row alone."""
    return nn.ParameterList(nn.Parameter(row.clone()) for row in rows)


def _owners(layout: Layout, components: Mapping[str, ModuleComponents]) -> Tensor:
    """The adapter of each coefficient, (groups, width); 0 where none takes it."""
    owners = torch.zeros(layout.present.shape, dtype=torch.int64)
    for path, columns in layout.column.items():
        owners[layout.row[path], columns] = components[path].owner
    return owners


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
    parameters = list(mixture.parameters())
    with attached(base, mixture.components, mixture.gates()):
        return train(
            base,
            parameters,
            examples,
            valid,
            plan,
            progress,
            penalty=mixture.penalty if mixture.recipe.l1 else None,
        )
