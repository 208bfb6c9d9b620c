"""Options that several commands share, and what they turn into."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from recycle_cli.errors import InputError
from recycle_cli.lora.base_names import EMBEDDED_NAME, base_name_given
from recycle_cli.settings import Settings

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.records import Document
    from recycle_cli.workflows.adapters import Source

STDIN = "-"
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kMGT]B)", re.IGNORECASE)
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
AdapterSource = Literal["hub", "folder"]
"""Where an adapter in the index came from."""
SOURCES: tuple[AdapterSource, ...] = get_args(AdapterSource)
MAX_SEED = 2**32 - 1
"""What every library takes."""


@dataclass(frozen=True)
class Session:
    """What the global options say."""

    settings: Settings
    quiet: bool
    verbose: bool


JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON Lines: one document a line, nothing else.")
]
BaseModelOption = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="NAME",
        help="smollm2, a Hub id or a local folder. Default: that of the piped input, else smollm2.",
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of everything drawn.")
]
RowsOption = Annotated[
    int | None,
    typer.Option("--rows", min=1, help="Use only this many of the task's training rows."),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="PATH",
        help="PATH.jsonl, a folder with train.jsonl and test.jsonl, or a task.yaml. "
        "Default: the task of the piped input.",
    ),
]
OutOption = Annotated[Path, typer.Option("--out", help="The folder to write; it must not exist.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace --out where it exists.")]
SaveDtypeOption = Annotated[
    str, typer.Option("--save-dtype", help="float32, bfloat16 or float16, on disk.")
]
AdaptersArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[ADAPTER]...",
        help="Adapter folders, ids in the index, sha256:PREFIX, or - for documents on stdin.",
        show_default=False,
    ),
]


def checked_source(source: str | None) -> AdapterSource | None:
    """What `--source` says; None where it was not given.

    Raises:
        InputError: it is none of SOURCES.
    """
    for known in SOURCES:
        if source == known:
            return known
    if source is None:
        return None
    raise InputError(f"--source is {source!r}", f"use one of: {', '.join(SOURCES)}")


@dataclass(frozen=True)
class Inputs:
    """The adapters of a command and what came with them in the pipe."""

    names: tuple[str, ...]
    documents: "tuple[Document, ...]"

    def sources(self, settings: Settings, members: bool = False) -> "list[Source]":
        """The adapters named, or those that the piped documents name; with `members`, those that
        went into the results that they describe."""
        from recycle_cli.workflows.adapters import resolve_documents, resolve_names

        if self.documents:
            return resolve_documents(self.documents, settings, members)
        return resolve_names(self.names, settings)

    def base_model(self, given: str | None) -> str:
        """The canonical name of the base model: as given, as the pipe says, or the default."""
        from recycle_cli.workflows.adapters import base_of_documents

        return base_name_given(given or base_of_documents(self.documents) or EMBEDDED_NAME)

    def task_source(self, given: str | None) -> str:
        """The task's path: as given, or as the pipe says.

        Raises:
            InputError: neither says.
        """
        from recycle_cli.workflows.adapters import task_of_documents

        piped = task_of_documents(self.documents)
        source = given or (piped.path if piped else None)
        if source is None:
            raise InputError("no task is named", "name one with --task PATH")
        return source


def read_inputs(adapters: Sequence[str] | None) -> Inputs:
    """Reads the adapter arguments; `-` alone reads documents from stdin, all of them.

    Raises:
        InputError: `-` is mixed with names, stdin is a terminal, empty, or no recycle output.
    """
    names = tuple(adapters or ())
    if STDIN not in names:
        return Inputs(names, ())
    if names != (STDIN,):
        raise InputError("- stands beside other adapters", "name them or pipe them, not both")
    import sys

    from recycle_cli.records import read_documents

    if sys.stdin is None or sys.stdin.isatty():
        raise InputError(
            "- reads standard input, which is a terminal", "pipe a recycle command's --json into it"
        )
    return Inputs((), tuple(read_documents(sys.stdin)))


def load_base(name: str, session: Session) -> "BaseModel":
    """Loads the base model and, when verbose, says where it runs."""
    from recycle_cli.cli.output import Output
    from recycle_cli.engine.base_model import load_base_model

    base = load_base_model(name, session.settings)
    compute = base.compute
    Output(verbose=session.verbose).detail(
        f"{base.id} on {compute.device} in {compute.dtype}: {compute.reason}"
    )
    return base


def parse_size(text: str | None, option: str) -> int | None:
    """Bytes, from a number with a unit that was given with an option.

    Raises:
        InputError: it is none.
    """
    if text is None:
        return None
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{option} is {text!r}", "write a number and a unit, as in 500MB or 8GB")
    return int(float(match[1]) * UNITS[match[2].upper()])
