"""The merge rules there are. A new one is a file beside this one and a row here."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recycle_cli.errors import unknown_name

if TYPE_CHECKING:
    from recycle_cli.lora.update import ModelUpdate

    MergeRule = Callable[[Sequence[ModelUpdate], Sequence[float]], ModelUpdate]


@dataclass(frozen=True)
class MergeMethod:
    """A merge rule: what it is called, what it does, where it is from, and where it lives.

    Args:
        name: what `--method` takes.
        summary: one line for the help.
        paper: its source.
        target: `module:function` under `recycle_cli.merging`.
        weights_may_sum_to_zero: whether it makes sense for weights that cancel.
    """

    name: str
    summary: str
    paper: str
    target: str
    weights_may_sum_to_zero: bool = True

    def load(self) -> "MergeRule":
        """The rule itself."""
        module, _, function = self.target.partition(":")
        rule: MergeRule = getattr(
            importlib.import_module(f"recycle_cli.merging.{module}"), function
        )
        return rule


METHODS: Mapping[str, MergeMethod] = {
    method.name: method
    for method in (
        MergeMethod(
            "average",
            "the weighted mean of the updates",
            "arXiv 2203.05482",
            "linear:average",
            weights_may_sum_to_zero=False,
        ),
        MergeMethod(
            "linear", "the weighted sum of the updates", "arXiv 2212.04089", "linear:linear"
        ),
    )
}


def find_merge_method(name: str) -> MergeMethod:
    """The method of that name.

    Raises:
        InputError: there is none; the hint names the nearest.
    """
    if name not in METHODS:
        raise unknown_name("merge method", name, METHODS)
    return METHODS[name]
