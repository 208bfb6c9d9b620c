"""A merge rule applied to adapters, one module at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from recycle_cli.lora.threads import threads_for
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate, zero_update
from recycle_cli.merging.group import Group, MergeRule

ABSENT_ZERO, ABSENT_SKIP = "zero", "skip"


@dataclass(frozen=True)
class Contribution:
    """What one adapter brings to a merge.

    Args:
        key: its sha256; it settles its place among the others and what is drawn for it.
        weight: its weight.
        shapes: module path -> (out, in), the modules that it changes.
        read: its update of one of them.
    """

    key: str
    weight: float
    shapes: Mapping[str, tuple[int, int]]
    read: Callable[[str], LowRankUpdate]

    @classmethod
    def of(cls, update: ModelUpdate, weight: float, key: str) -> "Contribution":
        """That of an update in memory."""
        shapes = {module: piece.shape for module, piece in update.items()}
        return cls(key, weight, shapes, update.__getitem__)


@dataclass(frozen=True)
class Merger:
    """A rule, and what it is applied to. The order of the contributions does not matter.

    Args:
        rule: takes a Group, and gives factors or a dense matrix.
        contributions: at least one; they agree on the shapes of the modules they share.
        seed: of what the rule draws.
        absent: what an adapter counts for in a module that it lacks: `zero`, or `skip` for not
            at all.
    """

    rule: MergeRule
    contributions: Sequence[Contribution]
    seed: int = 0
    absent: str = ABSENT_ZERO

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The modules that the result has, sorted by path, with their (out, in)."""
        found = {m: shape for one in self.contributions for m, shape in one.shapes.items()}
        return dict(sorted(found.items()))

    def merge(self, module: str) -> LowRankUpdate | Tensor:
        """The merged update of one module; reads that module alone."""
        with threads_for(self.shapes[module]):
            merged = self.rule(self._group(module))
        if isinstance(merged, LowRankUpdate) and merged.rank == 0:
            return merged.padded(1)
        return merged

    def _group(self, module: str) -> Group:
        there = [
            one
            for one in sorted(self.contributions, key=lambda one: one.key)
            if self.absent == ABSENT_ZERO or module in one.shapes
        ]
        return Group(
            pieces=tuple(
                one.read(module) if module in one.shapes else zero_update(self.shapes[module])
                for one in there
            ),
            weights=tuple(one.weight for one in there),
            keys=tuple(f"{self.seed}:{one.key}:{module}" for one in there),
        )
