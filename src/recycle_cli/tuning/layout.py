"""The coefficients of a mixture: which rank-1 component takes which number, and how it starts.

Adapters differ in rank and modules, so a mixture is seen as its rank-1 components: each module has
a row of them (`engine.adapted.concatenate`), and each component looks up one entry of a matrix of
coefficients. A row of that matrix is a group that shares its numbers: the whole model, a layer, a
sublayer, a module; its columns are the adapters, or, at the finest granularity, the components of
one module.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from recycle_cli.lora.draws import generator_for
from recycle_cli.tuning.choices import GRANULARITIES

ADAPTER, LAYER, SUBLAYER, MODULE, DIMENSION = GRANULARITIES
LEAKY_SLOPE = 0.01
# The path of a decoder layer, such as model.layers.3, and of the block in it, such as self_attn.
IN_LAYER = re.compile(r"(?P<layer>.*?\.\d+)\.(?P<block>[^.]+)")


@dataclass(frozen=True)
class Layout:
    """Which entry of the coefficient matrix each component takes.

    Args:
        groups: the names of the rows, sorted.
        present: (groups, width) bool, false for entries that no component takes: those of an
            adapter that lacks all modules of a group.
        row: module path -> the row that its components look at.
        column: module path -> (components,) int64, the columns that they take there.
    """

    groups: tuple[str, ...]
    present: Tensor
    row: Mapping[str, int]
    column: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        """How many coefficients are in use."""
        return int(self.present.sum())


def lay_out(owners: Mapping[str, Tensor], adapters: int, granularity: str) -> Layout:
    """The layout at one of the GRANULARITIES.

    Args:
        owners: by module path (components,) int64, the adapter that each belongs to.
        adapters: how many there are.
        granularity: what shares a coefficient.
    """
    groups = tuple(sorted({group_of(path, granularity) for path in owners}))
    row_of = {group: row for row, group in enumerate(groups)}
    rows = {path: row_of[group_of(path, granularity)] for path in owners}
    fine = granularity == DIMENSION
    columns = {path: torch.arange(len(owner)) if fine else owner for path, owner in owners.items()}
    width = max(map(len, columns.values())) if fine else adapters
    present = torch.zeros(len(groups), width, dtype=torch.bool)
    for path, taken in columns.items():
        present[rows[path], taken] = True
    return Layout(groups, present, rows, columns)


def group_of(path: str, granularity: str) -> str:
    """The name of the group that a module belongs to. A module outside of the decoder's layers,
    such as lm_head, is a layer and a sublayer of its own."""
    if granularity == ADAPTER:
        return "model"
    match = IN_LAYER.match(path)
    if match is None or granularity in (MODULE, DIMENSION):
        return path
    return match["layer"] if granularity == LAYER else match[0]


Activation = Callable[[Tensor, Tensor], Tensor]
"""f(c): coefficients (..., width) and their `present` in, numbers of the same shape out."""


def _softmax(c: Tensor, present: Tensor) -> Tensor:
    """Over the adapters of a group that are there; the others get nothing."""
    return functional.softmax(c.masked_fill(~present, -torch.inf), dim=-1)


ACTIVATIONS: Mapping[str, Activation] = {
    "linear": lambda c, _: c,
    "leaky-relu": lambda c, _: functional.leaky_relu(c, LEAKY_SLOPE),
    "squared": lambda c, _: c.square(),
    "sigmoid": lambda c, _: torch.sigmoid(c),
    "softmax": _softmax,
}


@dataclass(frozen=True)
class Start:
    """What an initialisation may depend on.

    Args:
        owner: (groups, width) int64, the adapter that an entry of the coefficients belongs to.
        adapters: how many there are.
        target: the position of the target LoRA among them, or None.
        seed: of what is drawn.
    """

    owner: Tensor
    adapters: int
    target: int | None
    seed: int

    @property
    def shape(self) -> torch.Size:
        """(groups, width)."""
        return self.owner.shape


def _one_hot(start: Start) -> Tensor:
    return start.owner.eq(-1 if start.target is None else start.target).float()


INITS: Mapping[str, Callable[[Start], Tensor]] = {
    "zero": lambda start: torch.zeros(start.shape),
    "one": lambda start: torch.ones(start.shape),
    # As in the paper's code, so that `squared` starts at the mean of the adapters.
    "equal": lambda start: torch.full(start.shape, start.adapters**-0.5),
    "normal": lambda start: 0.5 * torch.randn(start.shape, generator=_generator(start)),
    "uniform": lambda start: torch.rand(start.shape, generator=_generator(start)),
    "one-hot": _one_hot,
}


def _generator(start: Start) -> torch.Generator:
    return generator_for("coefficients", start.seed)
