"""Random groups of updates, merge rules under parameters, and what they make of the updates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.merging.catalog import METHODS, MergeMethod
from recycle_cli.merging.group import Group, MergeRule
from recycle_cli.merging.merger import Contribution, Merger
from recycle_cli.parameters import Value
from support.low_rank import Matrix, dense, random_piece

EQUAL_RANKS = {"factor-average"}
DRAWING_ENTRIES = {"dare-linear", "dare-ties", "della"}


@dataclass(frozen=True)
class Case:
    """A rule under parameters; those that are not given are at their defaults."""

    method: MergeMethod
    given: Mapping[str, Value] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.method.name, *(f"{k}={v}" for k, v in self.given.items())])

    def rule(self, given: Mapping[str, Value] | None = None) -> MergeRule:
        """The rule itself."""
        return self.method.load(self.method.settings(self.given if given is None else given))

    def merge(
        self,
        pool: Sequence[LowRankUpdate],
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> LowRankUpdate | Tensor:
        """What the rule makes of one module's updates."""
        return merger(self, [{"m": piece} for piece in pool], weights, seed).merge("m")

    def matrix(
        self,
        pool: Sequence[LowRankUpdate],
        weights: Sequence[float] | None = None,
        seed: int = 0,
    ) -> Matrix:
        """The same as a plain matrix."""
        return matrix(self.merge(pool, weights, seed))


AT_DEFAULTS = [Case(method) for method in METHODS.values()]
CASES = [
    *AT_DEFAULTS,
    Case(METHODS["ties"], {"density": 0.6, "normalize": "weights"}),
    Case(METHODS["della"], {"density": 0.7, "epsilon": 0.3, "normalize": "weights"}),
    Case(METHODS["breadcrumbs"], {"density": 0.4, "gamma": 0.3}),
    Case(METHODS["tsv"], {"components": 1}),
    Case(METHODS["core-space"], {"inner": "dare", "density": 0.5}),
    Case(METHODS["compress-then-merge"], {"inner": "ties", "shared_rank": 3}),
    Case(METHODS["compress-then-merge"], {"inner": "dare", "shared_rank": 2}),
    Case(METHODS["lora-lego"], {"clusters": 2}),
]


def merger(
    case: Case,
    pool: Sequence[ModelUpdate],
    weights: Sequence[float] | None = None,
    seed: int = 0,
    absent: str = "zero",
) -> Merger:
    """The rule applied to whole updates, under the keys adapter-0, adapter-1 and so on."""
    weights = weights or [1.0] * len(pool)
    contributions = [
        Contribution.of(update, weight, f"adapter-{number}")
        for number, (update, weight) in enumerate(zip(pool, weights, strict=True))
    ]
    return Merger(case.rule(), contributions, seed, absent)


def group_of(pieces: Sequence[LowRankUpdate], weights: Sequence[float] | None = None) -> Group:
    """A group under the keys adapter-0, adapter-1 and so on."""
    keys = tuple(f"adapter-{number}" for number in range(len(pieces)))
    return Group(tuple(pieces), tuple(weights or [1.0] * len(pieces)), keys)


def exact_pieces(
    shape: tuple[int, int],
    ranks: Sequence[int],
    scales: Sequence[float] | None = None,
    seed: int = 0,
) -> list[LowRankUpdate]:
    """Random updates in float64, no two from the same draws."""
    scales = scales or [0.5, 2.0, -1.25, 0.8][: len(ranks)]
    return [
        random_piece(seed + number, rank, shape, scale).to(torch.float64)
        for number, (rank, scale) in enumerate(zip(ranks, scales, strict=True))
    ]


def matrix(merged: LowRankUpdate | Tensor) -> Matrix:
    """What a rule gave, in float64, by numpy."""
    return merged.double().numpy() if isinstance(merged, Tensor) else dense(merged)


def distance(found: Matrix, expected: Matrix, whole: float | None = None) -> float:
    """The Frobenius norm of the difference, as a share of that of what was expected, or of
    another size."""
    assert found.shape == expected.shape
    size = float(np.linalg.norm(expected)) if whole is None else whole
    return float(np.linalg.norm(found - expected)) / (size if size > 0 else 1.0)
