"""`recycle merge`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from recycle_cli.cli.options import (
    AdaptersArgument,
    BaseModelOption,
    ForceOption,
    JsonOption,
    SaveDtypeOption,
    SeedOption,
    Session,
    read_inputs,
)
from recycle_cli.cli.output import Output
from recycle_cli.cli.parameters import with_parameters
from recycle_cli.errors import InputError
from recycle_cli.merging.catalog import METHODS
from recycle_cli.merging.parameters import PARAMETERS


@with_parameters(PARAMETERS, METHODS)
def merge(
    context: typer.Context,
    adapters: AdaptersArgument = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder to write; it must not exist.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help=f"{', '.join(METHODS)}. --list tells what they do.")
    ] = "average",
    list_methods: Annotated[
        bool, typer.Option("--list", help="List the methods and their parameters, and stop.")
    ] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="W,W,...",
            help="One number for each adapter, in their order; or ID=W,ID=W; or, from the pipe, "
            "from:score (of a selection), from:weight (of a merge), from:coefficient (of a "
            "mixture). Default: 1 each.",
        ),
    ] = None,
    weights_sum: Annotated[
        float | None,
        typer.Option("--weights-sum", help="Scale the weights so that they sum to this."),
    ] = None,
    absent: Annotated[
        str,
        typer.Option(
            "--absent",
            help="What an adapter counts for in a module that it lacks. zero. skip: leave it out "
            "there, so that means are over those that have it.",
        ),
    ] = "zero",
    rank: Annotated[
        str,
        typer.Option(
            "--rank",
            help="full: exact. N: at most N in every module. energy:0.99: the fewest directions "
            "that hold this share of the squared norm.",
        ),
    ] = "full",
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="One rank for all modules, filled up with zeros."),
    ] = False,
    form: Annotated[
        str,
        typer.Option(
            "--as",
            help="adapter. adapter+residual (fedex): an adapter of the sources' rank, and beside "
            "it the rest of the exact mean, which --rank then limits.",
        ),
    ] = "adapter",
    into_base: Annotated[
        str | None,
        typer.Option(
            "--into-base",
            metavar="MODEL",
            help="Write this model's weights with the merge in them, instead of an adapter.",
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="With --into-base: compare its logits with the unmerged ones."
        ),
    ] = False,
    base_model: BaseModelOption = None,
    save_dtype: SaveDtypeOption = "float32",
    seed: SeedOption = 0,
    force: ForceOption = False,
    json: JsonOption = False,
    **parameters: Any,
) -> None:
    """Merge adapters into one adapter, or into a model, without data."""
    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    if list_methods:
        _list_methods(output)
        return
    from recycle_cli.workflows.adapters import counted
    from recycle_cli.workflows.merge import merge as run
    from recycle_cli.workflows.merge_request import MergeRequest
    from recycle_cli.workflows.weights import Weights, parse_weights, scaled

    if out is None:
        raise InputError("no folder to write is named", "name one with --out")
    inputs = read_inputs(adapters)
    wanted = parse_weights(weights) if weights is not None else None
    sources = inputs.sources(session.settings, members=(wanted or Weights()).of_members)
    if not sources:
        raise InputError("no adapters are named", "name some, or pipe in a selection with -")
    if wanted is None and weights_sum is not None:
        wanted = Weights(positions=(1.0,) * len(sources))
    resolved = wanted.resolve(sources, inputs.documents) if wanted else None
    request = MergeRequest(
        base_model=inputs.base_model(base_model or into_base),
        out=out,
        method=method,
        parameters={name: value for name, value in parameters.items() if value is not None},
        weights=tuple(scaled(resolved, weights_sum, method)) if resolved else None,
        absent=absent,
        rank=rank,
        uniform=uniform,
        form=form,
        into_base=into_base,
        check=check,
        save_dtype=save_dtype,
        seed=seed,
        force=force,
    )
    with output.progress() as progress:
        document = run(request, sources, session.settings, progress)
    if json:
        output.document(document)
        return
    output.text(
        f"{document.path}: {counted(sources)} by {document.method}, rank {document.rank}, "
        f"energy kept {document.energy_kept:.4%}"
    )
    if document.max_logit_deviation is not None:
        output.text(f"largest difference of logits: {document.max_logit_deviation:.3g}")
    for warning in document.warnings:
        output.message(f"warning: {warning}")


def _list_methods(output: Output) -> None:
    from recycle_cli.workflows.methods import merge_methods

    documents = merge_methods()
    if output.json:
        for document in documents:
            output.document(document)
        return
    rows = [
        (
            document.name,
            document.summary,
            ", ".join(f"{p.option} {p.default}" for p in document.parameters),
            "yes" if document.invariant else "no",
            document.paper,
        )
        for document in documents
    ]
    output.table("merge methods", ("method", "gives", "defaults", "invariant", "paper"), rows)
    output.text(
        "invariant: only the updates count, not how they are split into factors. "
        "Formulas: --json, or docs/merge.md"
    )
