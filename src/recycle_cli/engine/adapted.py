"""Adapters on a loaded base model, put on and taken off without touching its weights.

A set of adapters is one concatenated low-rank product in each module it touches:
y = W x + B_cat (z * (A_cat x)), where A_cat stacks the adapters' A, B_cat their B, and z holds a
number for each rank-1 component. There is no loop over adapters, whatever their ranks, and an
adapter that lacks a module owns no components in it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.lora.config import AdapterProblem
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate


@dataclass(frozen=True)
class ModuleComponents:
    """The rank-1 components of all adapters in one module.

    Args:
        A: (components, in), stacked.
        B: (out, components), side by side, with the adapters' scales in it.
        owner: (components,) int64, the index of the adapter that a component belongs to.
    """

    A: Tensor
    B: Tensor
    owner: Tensor


def concatenate(updates: Sequence[ModelUpdate]) -> dict[str, ModuleComponents]:
    """The components of several adapters, by module, in the order of the adapters."""
    modules = sorted({module for update in updates for module in update})
    return {module: _concatenate_module(module, updates) for module in modules}


def _concatenate_module(module: str, updates: Sequence[ModelUpdate]) -> ModuleComponents:
    pieces = [(index, update[module]) for index, update in enumerate(updates) if module in update]
    return ModuleComponents(
        A=torch.cat([piece.A for _, piece in pieces]),
        B=torch.cat([piece.B * piece.scale for _, piece in pieces], dim=1),
        owner=torch.cat([torch.full((piece.rank,), index) for index, piece in pieces]),
    )


Gate = Callable[[], Tensor]
"""Gives z, (components,), for one module; called in every forward pass."""


@contextlib.contextmanager
def attached(
    base: BaseModel, components: Mapping[str, ModuleComponents], gates: Mapping[str, Gate]
) -> Iterator[None]:
    """The base model with the components on it, as long as the context lasts.

    Args:
        base: the model; its weights stay as they are.
        components: by module path; factors in float32.
        gates: by module path, the numbers that scale the components.

    Raises:
        AdapterProblem: a module is not in the model, or has another shape there.
    """
    check_modules(base, {name: (c.B.shape[0], c.A.shape[1]) for name, c in components.items()})
    device = base.compute.device
    handles = []
    try:
        for path, piece in components.items():
            hook = _make_hook(piece.A.to(device), piece.B.to(device), gates[path])
            handles.append(base.model.get_submodule(path).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def with_adapter(base: BaseModel, update: ModelUpdate | None) -> Iterator[None]:
    """The base model with one adapter on it; with None, the base model itself."""
    if update is None:
        yield
        return
    components = concatenate([update])
    device = base.compute.device
    ones = {path: torch.ones(piece.A.shape[0], device=device) for path, piece in components.items()}
    with attached(base, components, {path: ones[path].clone for path in ones}):
        yield


def check_modules(base: BaseModel, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Checks that the model has linear modules of these shapes.

    Raises:
        AdapterProblem: it has not (`no_such_module`, `shape_mismatch`).
    """
    there = base.shapes
    for module, shape in shapes.items():
        if module not in there:
            raise AdapterProblem(
                "no_such_module",
                f"the adapter changes {module}, which {base.id} does not have",
                "use adapters of this base model",
            )
        if there[module] != shape:
            raise AdapterProblem(
                "shape_mismatch",
                f"the adapter's {module} is {shape}, that of {base.id} is {there[module]}",
                "use adapters of this base model",
            )


def _make_hook(a: Tensor, b: Tensor, gate: Gate) -> Callable[..., Tensor]:
    def add_low_rank(_module: object, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # As PEFT does: the product and the sum in float32, then back to the model's dtype.
        inner = functional.linear(inputs[0].to(a.dtype), a) * gate()
        return (output + functional.linear(inner, b)).to(output.dtype)

    return add_low_rank


def fold(components: Mapping[str, ModuleComponents], gates: Mapping[str, Gate]) -> ModelUpdate:
    """The one LoRA that equals the components under these gates: z goes into B, exactly.

    Components whose gate is zero are left out, and so are modules where all are zero. Where that
    leaves nothing, one rank-1 zero update stands for it, since an adapter has to hold something.
    """
    folded = {}
    with torch.no_grad():
        for path, piece in components.items():
            z = gates[path]().detach().to(piece.B.device)
            kept = z != 0
            if kept.any():
                folded[path] = LowRankUpdate(piece.A[kept], piece.B[:, kept] * z[kept], 1.0)
    if not folded:
        path, piece = next(iter(components.items()))
        folded[path] = LowRankUpdate(piece.A[:1], torch.zeros_like(piece.B[:, :1]), 1.0)
    return folded
