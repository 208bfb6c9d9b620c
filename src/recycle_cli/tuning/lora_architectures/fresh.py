"""A LoRA to be trained from scratch in a form of its own: where it goes, and how it starts."""

import abc
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from recycle_cli.engine.adapted import Forward
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.lora.config import AdapterConfig
from recycle_cli.lora.draws import generator_for
from recycle_cli.lora.update import Lazy, LowRankUpdate, ModelUpdate
from recycle_cli.tuning.mixture import parameter_name
from recycle_cli.tuning.target_lora import LoraRecipe, check_target_modules
from recycle_cli.tuning.tuned import Share, Tuned


@dataclass(frozen=True)
class Target:
    """A module to adapt.

    Args:
        shape: (out, in).
        rank: of its LoRA.
        alpha: the numerator of its scale.
        scale: s in s B A.
    """

    shape: tuple[int, int]
    rank: int
    alpha: float
    scale: float


def lora_targets(base: BaseModel, recipe: LoraRecipe) -> dict[str, Target]:
    """The modules that a recipe adapts, by path in the order of the model, as PEFT finds them: all
    linear ones but the output head where it names none.

    Raises:
        InputError: no module has one of the names in the recipe.
    """
    check_target_modules(base, recipe)
    config = AdapterConfig(
        recipe.rank,
        recipe.alpha,
        recipe.use_rslora,
        recipe.rank_pattern,
        recipe.alpha_pattern,
        recipe.target_modules,
        targets_listed=bool(recipe.target_modules),
    )
    head = base.model.get_output_embeddings()
    found = {}
    for path, shape in base.shapes.items():
        unnamed = not recipe.target_modules and base.model.get_submodule(path) is head
        if not unnamed and not config.leaves_out(path):
            rank = config.rank_of(path)
            found[path] = Target(shape, rank, config.alpha_of(path), config.scale_of(path, rank))
    return found


class FreshLora(Tuned, abc.ABC):
    """Base of the LoRAs that are trained from scratch.

    Attributes:
        targets: the modules it changes, by path.
        dropout: probability of dropping an input of its products.
    """

    def __init__(self, base: BaseModel, recipe: LoraRecipe) -> None:
        super().__init__()
        self.targets = lora_targets(base, recipe)
        self.dropout = recipe.dropout
        self.device = base.compute.device
        # Dropout is for the steps alone; the loop switches it on for them.
        self.training = False

    @abc.abstractmethod
    def added(self, path: str, x: Tensor) -> Tensor:
        """What it adds to the output of a module whose input is x (..., in): (..., out)."""

    def forwards(self, base: BaseModel, tokens: float) -> Mapping[str, Forward]:
        """See `Tuned`."""
        return {path: self._forward(path) for path in self.targets}

    def _forward(self, path: str) -> Forward:
        def forward(module: nn.Linear, x: Tensor) -> Tensor:
            y = functional.linear(x, module.weight, module.bias)
            # Summed before it is rounded, as PEFT does.
            return (y + self.added(path, x)).to(y.dtype)

        return forward

    def dropped(self, x: Tensor) -> Tensor:
        """Inputs with some of their numbers dropped, in training."""
        return functional.dropout(x, self.dropout, self.training)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """See `Tuned`."""
        return {path: target.shape for path, target in self.targets.items()}

    def shares(self) -> list[Share]:
        """None: there are no adapters."""
        return []


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(x A^T) B^T in the dtype of the factors, as PEFT computes it.

    Args:
        x: (..., in).
        a: (rank, in).
        b: (out, rank).
    """
    return functional.linear(functional.linear(x.to(a.dtype), a), b)


def dense_update(
    shapes: Mapping[str, tuple[int, int]], delta: Callable[[str], Tensor]
) -> ModelUpdate:
    """The update of modules whose dW has full rank, as factors: dW and the identity of its smaller
    side. Modules are formed when they are asked for.

    Args:
        shapes: (out, in) by module path.
        delta: gives dW (out, in) of a module.
    """

    def make(path: str) -> LowRankUpdate:
        whole, (out, width) = delta(path).detach().float().cpu(), shapes[path]
        if out <= width:
            return LowRankUpdate(whole, torch.eye(out), 1.0)
        return LowRankUpdate(torch.eye(width), whole, 1.0)

    return Lazy(shapes.keys(), make)


Draw = Callable[[tuple[int, int], torch.Generator], Tensor]


def kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """What PEFT draws A from, (rank, in): uniform within 1 / sqrt(in)."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])


def zeros(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """What B, (out, rank), starts as."""
    return torch.zeros(shape)


def factors(
    shapes: Iterable[tuple[str, tuple[int, int]]],
    draw: Draw,
    device: torch.device,
    *key: object,
) -> nn.ParameterDict:
    """One factor a module, in float32, by `parameter_name` of its path.

    Args:
        shapes: paths, and the shapes of their factors.
        draw: gives the start of one.
        device: where to put them.
        key: what tells these draws from others, the seed among it.
    """
    return nn.ParameterDict(
        {
            parameter_name(path): nn.Parameter(draw(shape, generator_for(*key, path)).to(device))
            for path, shape in shapes
        }
    )
