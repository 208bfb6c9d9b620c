"""The parameters that merge rules take: their names, ranges and help, and the check of values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recycle_cli.errors import InputError

Value = float | int | str | None
ROUNDING = 1e-12


def cancel(weights: Sequence[float]) -> bool:
    """Whether the sum of weights is 0 up to rounding, so that nothing can be divided by it."""
    return abs(sum(weights)) <= ROUNDING * sum(map(abs, weights))


@dataclass(frozen=True)
class Parameter:
    """A parameter that some rules take; on the command line, an option of its name.

    Args:
        name: as in the rules' signatures; `shared_rank` is `--shared-rank`.
        kind: float, int or str.
        help: one line.
        low: the smallest number allowed.
        high: the largest, or None for no limit.
        low_is_out: whether `low` itself is not allowed.
        choices: the words allowed.
    """

    name: str
    kind: type
    help: str
    low: float = 0.0
    high: float | None = None
    low_is_out: bool = False
    choices: tuple[str, ...] = ()

    @property
    def option(self) -> str:
        """What the command line calls it."""
        return "--" + self.name.replace("_", "-")

    @property
    def range(self) -> str:
        """The values allowed, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.high is None:
            return f"a whole number from {self.low:g}"
        return f"a number in {'(' if self.low_is_out else '['}{self.low:g}, {self.high:g}]"

    def check(self, value: Value) -> None:
        """Checks a value that a user gave.

        Raises:
            InputError: it is outside the range.
        """
        if value in self.choices if self.choices else self._holds(value):
            return
        raise InputError(f"{self.option} is {value!r}", f"use {self.range}")

    def _holds(self, value: Value) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        above = value > self.low if self.low_is_out else value >= self.low
        return above and (self.high is None or value <= self.high)


PARAMETERS: Mapping[str, Parameter] = {
    parameter.name: parameter
    for parameter in (
        Parameter(
            "density",
            float,
            "The share of the entries of each update that is kept.",
            high=1.0,
            low_is_out=True,
        ),
        Parameter(
            "normalize",
            str,
            "Divide by the number of updates that agree on a sign, or by the sum of their weights.",
            choices=("count", "weights"),
        ),
        Parameter("gamma", float, "The share of the largest entries that is left out.", high=1.0),
        Parameter(
            "epsilon",
            float,
            "Entries are kept with a probability from density - epsilon to density + epsilon.",
            high=1.0,
        ),
        Parameter("components", int, "The most singular triplets that one adapter gives.", low=1.0),
        Parameter(
            "inner",
            str,
            "The rule that merges the cores.",
            choices=("linear", "ties", "dare"),
        ),
        Parameter("shared_rank", int, "The rank of the shared subspaces.", low=1.0),
        Parameter("clusters", int, "The number of clusters, which is the rank.", low=1.0),
    )
}
