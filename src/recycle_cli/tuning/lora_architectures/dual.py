"""Dual LoRA (arXiv 2512.03402): how much an entry of a weight changes, and which way, each from a
LoRA of its own.

dW = w c ReLU(B A) (.) Sign(D C) entry by entry, c = alpha / sqrt(r_1 r_2), with Sign(x) = 1 where
x > 0 and -1 elsewhere. The rank is halved between the two, so that they take as many numbers as one
LoRA. Sign passes gradients on as they are, clipped to [-1, 1] entry by entry (in each backward
pass).

All four factors start from N(0, 0.02^2): with a factor of zero nothing would have a slope. In their
place the weight w starts at zero and rises to 1 over the first steps, so that the model starts as
the base. dW has full rank, so it is formed in each pass, and again in the backward pass, where
keeping it would take the memory of another model.
"""

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.errors import InputError
from recycle_cli.lora.update import ModelUpdate
from recycle_cli.tuning.lora_architectures.fresh import FreshLora, dense_update, factors
from recycle_cli.tuning.lora_form import Former, LoraForm, Setup, of_tuned
from recycle_cli.tuning.mixture import parameter_name
from recycle_cli.tuning.target_lora import LoraRecipe

SPREAD = 0.02
WARMUP_STEPS = 50


def dual(setup: Setup, within: Former) -> AbstractContextManager[LoraForm]:
    """Dual LoRA in the place of the ordinary one: see `lora_form`.

    Raises:
        InputError: a rank is 1, or the recipe asks for another scale.
    """
    steps, seed = setup.plan.steps, setup.plan.seed
    return of_tuned(setup, DualLora(setup.base, setup.recipe, steps=steps, seed=seed))


class DualLora(FreshLora):
    """Magnitude and direction in each module.

    Attributes:
        lora_A: (r_1, in) float32 by module.
        lora_B: (out, r_1) likewise.
        lora_C: (r_2, in) likewise.
        lora_D: (out, r_2) likewise.
        weight: () float64, w, on the processor.
    """

    def __init__(self, base: BaseModel, recipe: LoraRecipe, *, steps: int, seed: int) -> None:
        super().__init__(base, recipe)
        if recipe.use_rslora:
            raise InputError("Dual LoRA has a scale of its own", "leave out --rslora")
        self.warmup = max(1, min(WARMUP_STEPS, steps // 2))
        self.weight = torch.zeros((), dtype=torch.float64)
        self.scales: dict[str, float] = {}
        shapes: dict[str, list[tuple[str, tuple[int, int]]]] = {name: [] for name in "ABCD"}
        for path, target in self.targets.items():
            if target.rank < 2:
                raise InputError(
                    f"Dual LoRA halves its rank, and that of {path} is {target.rank}",
                    "use a --rank of 2 or more",
                )
            (out, width), half = target.shape, math.ceil(target.rank / 2)
            self.scales[path] = target.alpha / math.sqrt(half * (target.rank - half))
            for down, up, rank in (("A", "B", half), ("C", "D", target.rank - half)):
                shapes[down].append((path, (rank, width)))
                shapes[up].append((path, (out, rank)))
        self.lora_A, self.lora_B, self.lora_C, self.lora_D = (
            factors(own, _gaussian, self.device, "dual", seed, name) for name, own in shapes.items()
        )

    def added(self, path: str, x: Tensor) -> Tensor:
        """See `FreshLora`."""
        apply: Any = _DualProduct.apply
        added: Tensor = apply(self.dropped(x), *self.pairs(path), self.weight * self.scales[path])
        return added

    def pairs(self, path: str) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter]:
        """A, B, C and D of a module."""
        name = parameter_name(path)
        return self.lora_A[name], self.lora_B[name], self.lora_C[name], self.lora_D[name]

    def after_step(self) -> None:
        """Warms up."""
        self.weight.add_(1 / self.warmup).clamp_(max=1)

    def kept(self) -> dict[str, Tensor]:
        """See `Tuned`."""
        return {"weight": self.weight}

    def delta(self, path: str) -> Tensor:
        """The update (out, in) as it stands."""
        a, b, c, d = (factor.detach() for factor in self.pairs(path))
        return _delta(b @ a, d @ c, self.weight * self.scales[path])

    def result(self) -> ModelUpdate:
        """See `Tuned`: exact, of the smaller side of each module as its rank."""
        return dense_update(self.shapes(), self.delta)


def _gaussian(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return SPREAD * torch.randn(shape, generator=generator)


def _signed(sizes: Tensor, direction: Tensor) -> Tensor:
    """Sizes with the sign of a direction: + where it is above 0, - elsewhere."""
    # One pass over the entries, where a comparison and a choice take three. Zero becomes negative.
    return torch.copysign(sizes, direction - torch.finfo(direction.dtype).tiny)


def _delta(magnitude: Tensor, direction: Tensor, scale: Tensor) -> Tensor:
    return _signed(magnitude.relu().mul_(scale), direction)


class _DualProduct(torch.autograd.Function):
    """x (..., in), A, B, C, D, w c () -> x dW^T (..., out); w c is not trained."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, scale: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, a, b, c, d, scale)
        return x @ _delta(b @ a, d @ c, scale).to(x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, c, d, scale = ctx.saved_tensors
        magnitude, direction = b @ a, d @ c
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ _delta(magnitude, direction, scale).to(x.dtype)
        of_delta = (grad.flatten(end_dim=-2).T @ x.flatten(end_dim=-2)).to(a.dtype).mul_(scale)
        signs = _signed(torch.ones_like(scale, dtype=a.dtype), direction)
        of_magnitude = signs.mul_(of_delta).masked_fill_(magnitude <= 0, 0)
        of_direction = of_delta.mul_(magnitude.relu_()).clamp_(-1, 1)
        return (
            of_x,
            b.T @ of_magnitude,
            of_magnitude @ a.T,
            d.T @ of_direction,
            of_direction @ c.T,
            None,
        )
