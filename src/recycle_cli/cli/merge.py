"""`recycle merge`."""

from pathlib import Path
from typing import Annotated

import typer

from recycle_cli.cli.options import (
    AdaptersArgument,
    BaseModelOption,
    ForceOption,
    JsonOption,
    OutOption,
    SeedOption,
    Session,
    parse_number,
    read_inputs,
)
from recycle_cli.cli.output import Output
from recycle_cli.errors import InputError
from recycle_cli.merging.catalog import METHODS

HELP = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())


def merge(
    context: typer.Context,
    out: OutOption,
    adapters: AdaptersArgument = None,
    method: Annotated[str, typer.Option("--method", help=HELP)] = "average",
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="W,W,...", help="One number for each adapter; 1 each."),
    ] = None,
    rank: Annotated[
        str,
        typer.Option(
            "--rank",
            help="full: exact. N: at most N in every module. energy:0.99: the fewest directions "
            "that hold this share of the squared norm.",
        ),
    ] = "full",
    base_model: BaseModelOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Merge adapters into one adapter, without data."""
    from recycle_cli.workflows.merge import MergeRequest
    from recycle_cli.workflows.merge import merge as run

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    inputs = read_inputs(adapters)
    request = MergeRequest(
        base_model=inputs.base_model(base_model),
        out=Path(out),
        method=method,
        weights=_parse_weights(weights),
        rank=rank,
        seed=seed,
        force=force,
    )
    sources = inputs.sources(session.settings)
    if not sources:
        raise InputError("no adapters are named", "name some, or pipe in a selection with -")
    with output.progress() as progress:
        document = run(request, sources, progress)
    if json:
        output.document(document)
        return
    output.text(
        f"{document.path}: {len(sources)} adapters by {document.method}, rank {document.rank}, "
        f"energy kept {document.energy_kept:.4%}"
    )
    for warning in document.warnings:
        output.message(f"warning: {warning}")


def _parse_weights(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(parse_number(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"--weights is {text!r}", "write numbers with commas between, as in --weights 1,0.5"
        ) from error
