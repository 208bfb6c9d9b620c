"""A parameter that methods take: its name, range and help, and the check of values. The merging and
the tuning catalog list theirs, and options, documents and pages are made from that."""

import math
from dataclasses import dataclass

from recycle_cli.errors import InputError, unknown_name

Value = float | int | str | bool | None


@dataclass(frozen=True)
class Parameter:
    """A parameter that some methods take; on the command line, an option of its name.

    Args:
        name: as in the methods' signatures; `shared_rank` is `--shared-rank`.
        kind: float, int, str, or bool for a flag.
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
        if self.kind is bool:
            return "true or false"
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        kind = "a whole number" if self.kind is int else "a number"
        if self.high is None:
            return f"{kind} {'above' if self.low_is_out else 'from'} {self.low:g}"
        return f"{kind} in {'(' if self.low_is_out else '['}{self.low:g}, {self.high:g}]"

    def check(self, value: Value) -> None:
        """Checks a value that a user gave.

        Raises:
            InputError: it is outside the range.
        """
        if isinstance(value, bool) if self.kind is bool else self._allows(value):
            return
        if self.choices:
            raise unknown_name(self.option, str(value), self.choices)
        raise InputError(f"{self.option} is {value!r}", f"use {self.range}")

    def _allows(self, value: Value) -> bool:
        return value in self.choices if self.choices else self._holds(value)

    def _holds(self, value: Value) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        above = value > self.low if self.low_is_out else value >= self.low
        return above and (self.high is None or value <= self.high)
