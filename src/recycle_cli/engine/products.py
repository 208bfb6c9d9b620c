"""The adaptive layer: a frozen linear module with frozen adapters and a trained number for each of
their rank-1 components, y = W x + B (z * (A x)), with exact gradients for x and z.

It is computed in one of two forms, whichever needs fewer operations for a step of T tokens, with
r components in a module of shape (m, n):

- side by side: h = x A^T, then h (z B)^T; forward and backward 4 T r (m + n) beyond the frozen
  module, and T r numbers are kept for the backward pass.
- dense: dW = B diag(z) A is multiplied out; 4 r m n, and 2 T m n for its gradient. Where W + dW can
  be summed without rounding dW away (float32, float64), that is all; otherwise dW is a product of
  its own, 4 T m n more.

Both read the factors as they are: nothing of the size of the model is kept, and no loop runs over
adapters.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from recycle_cli.engine.adapted import Forward, Gate, ModuleComponents, replaced, shapes_of
from recycle_cli.engine.base_model import BaseModel

Form = Literal["side by side", "dense"]
FORMS: tuple[Form, ...] = ("side by side", "dense")
# Sums of a weight and an update a thousand times smaller lose little here.
WIDE = (torch.float32, torch.float64)


def choose_form(tokens: int, rank: int, shape: tuple[int, int], dtype: torch.dtype) -> Form:
    """The form with fewer operations.

    Args:
        tokens: in one step.
        rank: the number of rank-1 components.
        shape: (out, in) of the module.
        dtype: of its weight.
    """
    m, n = shape
    side_by_side = 4 * tokens * rank * (m + n)
    dense = 4 * rank * m * n + (2 if dtype in WIDE else 6) * tokens * m * n
    return "dense" if dense < side_by_side else "side by side"


def choose_forms(
    components: Mapping[str, ModuleComponents], tokens: float, dtype: torch.dtype
) -> dict[str, Form]:
    """`choose_form` for each module path."""
    return {
        path: choose_form(math.ceil(tokens), len(piece.owner), shape, dtype)
        for (path, piece), shape in zip(
            components.items(), shapes_of(components).values(), strict=True
        )
    }


@contextlib.contextmanager
def attached(
    base: BaseModel,
    components: Mapping[str, ModuleComponents],
    gates: Mapping[str, Gate],
    forms: Mapping[str, Form] | None = None,
) -> Iterator[None]:
    """The base model with the components on it, as long as the context lasts.

    Args:
        base: the model; its weights stay as they are.
        components: by module path; on the model's device and in its dtype.
        gates: by module path, the numbers that scale the components, which may need gradients.
        forms: by module path, as `choose_forms` gives them; side by side where none is given.

    Raises:
        AdapterProblem: a module is not in the model, or has another shape there.
    """
    forwards = {
        path: frozen_product(piece, gates[path], (forms or {}).get(path, "side by side"))
        for path, piece in on_device(components, base).items()
    }
    with replaced(base, forwards, shapes_of(components)):
        yield


def on_device(
    components: Mapping[str, ModuleComponents], base: BaseModel
) -> dict[str, ModuleComponents]:
    """The components where the model is, in its dtype; those that are there are not copied."""
    device, dtype = base.compute.device, base.dtype
    return {
        path: ModuleComponents(
            piece.A.to(device, dtype), piece.B.to(device, dtype), piece.owner.to(device)
        )
        for path, piece in components.items()
    }


class Reuse:
    """The products h = x A^T that are the same whatever the numbers z are: those of the modules
    that read the input of the first adapted one in a pass, such as q, k and v of its attention.

    It keeps them from the first pass over some rows on, for a search that runs the same rows again
    and again without gradients.
    """

    def __init__(self) -> None:
        self._pass: object = None
        self._first: Tensor | None = None
        self._kept: dict[tuple[object, int], Tensor] = {}

    @property
    def active(self) -> bool:
        """Whether a pass has been announced."""
        return self._pass is not None

    def begin(self, rows: object) -> None:
        """A pass over rows begins that are known by this key."""
        self._pass, self._first = rows, None

    def pause(self) -> None:
        """Passes over other rows follow."""
        self._pass = self._first = None

    def end(self) -> None:
        """There are no more such passes."""
        self.pause()
        self._kept.clear()

    def see(self, x: Tensor) -> None:
        """An adapted module reads x (T, in); what a pass's first reads does not depend on z."""
        if self._first is None:
            self._first = x

    def inner(self, x: Tensor, a: Tensor) -> Tensor:
        """X A^T, (T, r), of an input that was seen."""
        first = self._first
        # The same memory, which cannot be another tensor's as long as the first one is held.
        if first is None or x.data_ptr() != first.data_ptr() or x.shape != first.shape:
            return x @ a.T
        key = self._pass, a.data_ptr()
        if key not in self._kept:
            self._kept[key] = x @ a.T
        return self._kept[key]


def frozen_product(
    piece: ModuleComponents, gate: Gate, form: Form, reuse: Reuse | None = None
) -> Forward:
    """The forward pass of a module with frozen components on it."""
    apply: Any = (_Dense if form == "dense" else _SideBySide).apply

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if reuse is not None and reuse.active:
            # Modules of both forms say what they read: whichever comes first decides.
            reuse.see(flat)
        if reuse is not None and reuse.active and form != "dense":
            y = functional.linear(flat, module.weight, module.bias)
            y.addmm_(reuse.inner(flat, piece.A), _scaled(piece.B, gate()).T)
        else:
            y = apply(flat, module.weight, module.bias, piece.A, piece.B, gate())
        return y.view(*x.shape[:-1], -1)

    return forward


class _SideBySide(torch.autograd.Function):
    """x (T, n), W (m, n), bias (m,) or None, A (r, n), B (m, r), z (r,) -> y (T, m)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, z: Tensor
    ) -> Tensor:
        inner = x @ a.T
        y = functional.linear(x, weight, bias)
        y.addmm_(inner, _scaled(b, z).T)
        ctx.save_for_backward(weight, a, b, z, inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, z, inner = ctx.saved_tensors
        of_inner = grad @ b
        of_x = of_z = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ weight
            of_x.addmm_(of_inner, _scaled(a.T, z).T)
        if ctx.needs_input_grad[5]:
            of_z = of_inner.mul_(inner).sum(0, dtype=z.dtype)
        return of_x, None, None, None, None, of_z


class _Dense(torch.autograd.Function):
    """The same, with dW multiplied out."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, z: Tensor
    ) -> Tensor:
        if weight.dtype in WIDE:
            whole, delta = torch.addmm(weight, _scaled(b, z), a), None
            y = functional.linear(x, whole, bias)
        else:
            whole, delta = weight, _scaled(b, z) @ a
            y = functional.linear(x, weight, bias)
            y.addmm_(x, delta.T)
        ctx.save_for_backward(whole, delta, a, b, z, x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        whole, delta, a, b, z, x = ctx.saved_tensors
        of_x = of_z = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ whole
            if delta is not None:
                of_x.addmm_(grad, delta)
        if ctx.needs_input_grad[5]:
            of_weight = grad.T @ x
            of_z = (b.T @ of_weight).mul_(a).sum(1, dtype=z.dtype)
        return of_x, None, None, None, None, of_z


def _scaled(columns: Tensor, z: Tensor) -> Tensor:
    """The columns times z, in their dtype; the product itself is in z's, which is no coarser."""
    return (columns * z).to(columns.dtype)


def trained_product(
    a: Tensor, b: Tensor, gate: Gate | None = None, whole: Forward | None = None
) -> Forward:
    """The forward pass of a module with components on it whose factors are trained.

    Args:
        a: (r, in) float32.
        b: (out, r) float32.
        gate: z, (r,); None for ones.
        whole: what the module does without them; None for what it does itself.
    """

    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        y = functional.linear(x, module.weight, module.bias) if whole is None else whole(module, x)
        inner = functional.linear(x, a.to(x.dtype))
        if gate is not None:
            inner = inner * gate()
        return y + functional.linear(inner.to(x.dtype), b.to(x.dtype))

    return forward
