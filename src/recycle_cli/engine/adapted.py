"""Adapters on a loaded base model, put on and taken off without touching its weights.

A set of adapters is one concatenated low-rank product in each module it touches:
y = W x + B_cat (z * (A_cat x)), where A_cat stacks the adapters' A, B_cat their B, and z holds a
number for each rank-1 component. There is no loop over adapters, whatever their ranks, and an
adapter that lacks a module owns no components in it. How the product is computed, with gradients
for z, is in `engine.products`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
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


def concatenate(
    updates: Sequence[ModelUpdate], dtype: torch.dtype | None = None
) -> dict[str, ModuleComponents]:
    """The components of several adapters, by module, in the order of the adapters.

    Each update is read once, module by module.

    Args:
        updates: the adapters.
        dtype: of the factors; None leaves it as it is.
    """
    modules = sorted({module for update in updates for module in update})
    return {module: _concatenate_module(module, updates, dtype) for module in modules}


def _concatenate_module(
    module: str, updates: Sequence[ModelUpdate], dtype: torch.dtype | None
) -> ModuleComponents:
    pieces = [(index, update[module]) for index, update in enumerate(updates) if module in update]
    dtype = dtype or pieces[0][1].A.dtype
    return ModuleComponents(
        A=torch.cat([piece.A.to(dtype) for _, piece in pieces]),
        B=torch.cat([(piece.B * piece.scale).to(dtype) for _, piece in pieces], dim=1),
        owner=torch.cat([torch.full((piece.rank,), index) for index, piece in pieces]),
    )


Gate = Callable[[], Tensor]
"""Gives z, (components,), for one module; called in every forward pass."""

Forward = Callable[[nn.Linear, Tensor], Tensor]
"""What a linear module does to its input (..., in), adapters included: (..., out)."""


@contextlib.contextmanager
def replaced(
    base: BaseModel, forwards: Mapping[str, Forward], shapes: Mapping[str, tuple[int, int]]
) -> Iterator[None]:
    """The base model with other forward passes in some modules, as long as the context lasts.

    Args:
        base: the model; its weights stay as they are.
        forwards: by module path.
        shapes: (out, in) that each module has to have.

    Raises:
        AdapterProblem: a module is not in the model, or has another shape there.
    """
    check_modules(base, shapes)
    modules = {path: base.model.get_submodule(path) for path in forwards}
    try:
        for path, module in modules.items():
            # On the instance, where calls look first; hooks of other libraries still run.
            module.forward = functools.partial(forwards[path], module)
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)


def shapes_of(components: Mapping[str, ModuleComponents]) -> dict[str, tuple[int, int]]:
    """(out, in) by module path."""
    return {path: (piece.B.shape[0], piece.A.shape[1]) for path, piece in components.items()}


@contextlib.contextmanager
def with_adapter(base: BaseModel, update: ModelUpdate | None) -> Iterator[None]:
    """The base model with one adapter on it; with None, the base model itself.

    The product is computed as PEFT does, in the dtype of the factors, so that other tools score
    the adapter the same.
    """
    if update is None:
        yield
        return
    components = concatenate([update])
    device = base.compute.device
    forwards = {path: _as_peft(p.A.to(device), p.B.to(device)) for path, p in components.items()}
    with replaced(base, forwards, shapes_of(components)):
        yield


def _as_peft(a: Tensor, b: Tensor) -> Forward:
    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        output = functional.linear(x, module.weight, module.bias)
        inner = functional.linear(x.to(a.dtype), a)
        # Added while it is multiplied: the numbers that PEFT gets, without another tensor.
        added = output.to(a.dtype)
        added.view(-1, b.shape[0]).addmm_(inner.view(-1, a.shape[0]), b.T)
        return added.to(output.dtype)

    return forward


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
            if kept.all():
                folded[path] = LowRankUpdate(piece.A, piece.B * z, 1.0)
            elif kept.any():
                folded[path] = LowRankUpdate(piece.A[kept], piece.B[:, kept] * z[kept], 1.0)
    if not folded:
        path, piece = next(iter(components.items()))
        folded[path] = LowRankUpdate(piece.A[:1], torch.zeros_like(piece.B[:, :1]), 1.0)
    return folded
