"""What enters a LoRA and the gradient of what leaves it, kept pass by pass until the step.

The gradient of the loss by the weight that a LoRA adds to is S^T X, with the inputs X and the
gradients S of the outputs, one row a token. Both are kept as they come in the backward pass; the
product is not formed.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recycle_cli.tuning.peft_layers import ADAPTER

Rows = tuple[Tensor, Tensor]
"""X (tokens, in) and S (tokens, out), float32."""


class Recorder:
    """Records PEFT's LoRA layers.

    Rows without a gradient, padding among them, are left out: S^T X is the same without them.

    Args:
        layers: by module path.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self.layers = layers
        self._rows: dict[str, list[Rows]] = {}
        self._entering: dict[str, Tensor] = {}

    def clear(self) -> None:
        """Forgets what was recorded."""
        self._rows.clear()
        self._entering.clear()

    def take(self, path: str) -> Rows | None:
        """The rows of all passes since `clear`, once; None where there were none. S is the gradient
        by the output of the module, the LoRA's scale apart."""
        found = self._rows.pop(path, [])
        if not found:
            return None
        if len(found) == 1:
            return found[0]
        x, s = (torch.cat(parts) for parts in zip(*found, strict=True))
        return x, s

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
        apply: Any = _Tap.apply
        tapped: Tensor = apply(output, self._entering.pop(path), functools.partial(self._add, path))
        return tapped

    def _add(self, path: str, x: Tensor, s: Tensor) -> None:
        x, s = x.flatten(end_dim=-2), s.flatten(end_dim=-2)
        there = torch.linalg.vector_norm(s, dim=1) > 0
        if not there.all():
            x, s = x[there], s[there]
        self._rows.setdefault(path, []).append((x, s / self.layers[path].scaling[ADAPTER]))


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
