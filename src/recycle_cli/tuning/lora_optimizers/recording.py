"""What enters a LoRA and the gradient of what leaves it, kept pass by pass until the step.

The gradient of the loss by the weight that a LoRA adds to is S^T X, with the inputs X and the
gradients S of the outputs, one row a token. Both are kept as they come in the backward pass; the
product is not formed.

What all rows of a pass begin with is run apart, as one row, and so recorded as one. Where a step
has several passes it comes again in each; it then stays one row, with the sum of the gradients, so
that what is recorded does not depend on how a step is cut into passes.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recycle_cli.tuning.peft_layers import ADAPTER


class Rows(NamedTuple):
    """Rows whose gradient by the weight is c S^T X.

    Args:
        x: (tokens, in), float32, X.
        s: (tokens, out), float32, S.
        c: what S is to be multiplied by.
    """

    x: Tensor
    s: Tensor
    c: float


class Recorder:
    """Records PEFT's LoRA layers.

    Rows without a gradient, padding among them, are left out: S^T X is the same without them.

    Args:
        layers: by module path.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self.layers = layers
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._beginnings: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._entering: dict[str, Tensor] = {}
        self._went_back: set[str] = set()

    def clear(self) -> None:
        """Forgets what was recorded."""
        self._parts.clear()
        self._beginnings.clear()
        self._entering.clear()
        self._went_back.clear()

    def take(self, path: str) -> Rows | None:
        """The rows of all passes since `clear`, once; None where there were none. c S is the
        gradient by the output of the module: S is that by the LoRA's before it is scaled."""
        found = [*self._parts.pop(path, []), *self._beginnings.pop(path, [])]
        if not found:
            return None
        c = 1 / self.layers[path].scaling[ADAPTER]
        if len(found) == 1:
            return Rows(*found[0], c)
        x, s = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Rows(x, s, c)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Records each backward pass, as long as the context lasts."""
        handles = []
        for path, layer in self.layers.items():
            enter, leave = (
                functools.partial(self._enter, path),
                functools.partial(self._leave, path),
            )
            handles.append(layer.lora_A[ADAPTER].register_forward_hook(enter))
            handles.append(layer.lora_B[ADAPTER].register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.clear()

    def _enter(self, path: str, _module: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._entering[path] = inputs[0]

    def _leave(
        self, path: str, _module: nn.Module, _inputs: tuple[Tensor], output: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        self._went_back.discard(path)
        apply: Any = _Tap.apply
        tapped: Tensor = apply(output, self._entering.pop(path), functools.partial(self._add, path))
        return tapped

    def _add(self, path: str, x: Tensor, s: Tensor) -> None:
        x, s = _with_gradients(x.flatten(end_dim=-2), s.flatten(end_dim=-2))
        # The beginning of a pass is run first, so that its gradients come second.
        if path in self._went_back:
            parts = self._beginnings.setdefault(path, [])
            if parts and torch.equal(parts[-1][0], x):
                s = parts.pop()[1] + s
        else:
            parts = self._parts.setdefault(path, [])
        parts.append((x, s))
        self._went_back.add(path)


def _with_gradients(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of both where that of S is not zero."""
    there = (torch.linalg.vector_norm(s, dim=1) > 0).nonzero().squeeze(1)
    if len(there) == len(s):
        return x, s
    return x.index_select(0, there), s.index_select(0, there)


class _Tap(torch.autograd.Function):
    """Passes an output (..., out) on; in the backward pass, gives its gradient and the input
    (..., in) to `add`. The input is a saved tensor, so that checkpointing computes it again."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, add: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        ctx.add(x.detach(), grad)
        return grad, None, None
