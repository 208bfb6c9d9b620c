"""What can go wrong in words a user can act on, and the exit code that goes with it."""

import difflib
from collections.abc import Iterable
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """The exit codes that every command keeps to."""

    OK = 0
    FAILED = 1
    USAGE = 2
    GATE_NOT_MET = 3
    INTERRUPTED = 130


class RecycleError(Exception):
    """A failure that is shown as `error: message` and `hint: hint`, never as a traceback.

    Args:
        message: what was wrong, with the value seen.
        hint: what the user can do about it, in one line.
    """

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        """What it takes to tell it in another process."""
        return type(self), (self.message, self.hint)


class InputError(RecycleError):
    """The command line, a file or a record that came in cannot be used as it is (exit 2)."""

    exit_code = ExitCode.USAGE


class GateNotMet(RecycleError):
    """The run went well, but a condition that the user set does not hold (exit 3)."""

    exit_code = ExitCode.GATE_NOT_MET


def unknown_name(kind: str, value: str, known: Iterable[str]) -> InputError:
    """The error for a name that is not in a catalog, with the nearest names as the hint."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(near)}? available: {', '.join(names)}"
    else:
        hint = f"available: {', '.join(names)}"
    return InputError(f"unknown {kind} {value!r}", hint)
