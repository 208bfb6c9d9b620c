"""`recycle index`: the pool in the index."""

from collections.abc import Callable
from typing import Annotated

import typer

from recycle_cli.cli.index_show import print_adapter
from recycle_cli.cli.index_upkeep import duplicates, forget, verify
from recycle_cli.cli.options import SOURCES, JsonOption, Session, checked_source
from recycle_cli.cli.output import Output
from recycle_cli.errors import InputError
from recycle_cli.lora.base_names import base_name_given

Guard = Callable[[Callable[..., None]], Callable[..., None]]
STATUSES = ("accepted", "rejected", "failed", "all")
HISTOGRAMS = {
    "base models": "base_models",
    "ranks": "ranks",
    "alpha / rank": "alpha_over_rank",
    "target modules": "target_modules",
    "licences": "licenses",
}
SORTS = "id, rank, norm, size, downloads, likes, license, created, modified, relevance"


def make_app(guarded: Guard) -> typer.Typer:
    """The command group; `guarded` turns known failures into two lines and an exit code."""
    app = typer.Typer(
        invoke_without_command=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        help="Bring the index up to date, ask it (list, show, stats, duplicates), "
        "or keep it in order (verify, forget).",
    )
    app.callback()(guarded(update))
    app.command("list")(guarded(list_))
    app.command("show")(guarded(show))
    app.command("stats")(guarded(stats))
    app.command("duplicates")(guarded(duplicates))
    app.command("verify")(guarded(verify))
    app.command("forget")(guarded(forget))
    return app


def update(context: typer.Context, json: JsonOption = False) -> None:
    """Bring the index up to date, or ask it."""
    if context.invoked_subcommand is not None:
        if json:
            raise InputError(
                "--json stands before the name of the subcommand",
                f"write: recycle index {context.invoked_subcommand} --json",
            )
        return
    from recycle_cli.workflows.index import update_index

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    with output.progress() as progress:
        document = update_index(session.settings, progress)
    if json:
        output.document(document)
        return
    output.text(f"{document.adapters} adapters, {document.updated} rows brought up to date")
    for name in document.missing:
        output.text(f"missing: {name}")


def list_(
    context: typer.Context,
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="NAME", help="Of this base model only.")
    ] = None,
    license_: Annotated[str | None, typer.Option("--license", help="With this licence.")] = None,
    author: Annotated[str | None, typer.Option("--author", help="By this author.")] = None,
    source: Annotated[
        str | None, typer.Option("--source", help=f"From one of: {', '.join(SOURCES)}.")
    ] = None,
    min_rank: Annotated[
        int | None, typer.Option("--min-rank", min=1, help="Of this rank on.")
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", min=1, help="Up to this rank.")
    ] = None,
    target_module: Annotated[
        str | None, typer.Option("--target-module", help="That adapt this module, as in q_proj.")
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(
            "--search",
            metavar="TEXT",
            help="With all these words in id, tags, reason or model card (word* for its beginning, "
            '"two words" for a phrase), or with this text in id, origin, base model, licence or '
            "reason.",
        ),
    ] = None,
    status: Annotated[
        str, typer.Option("--status", help=f"One of: {', '.join(STATUSES)}.")
    ] = "accepted",
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort",
            help=f"One of: {SORTS}; falling with a minus, as in -norm. Default: id; relevance, "
            "the best first, with --search.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="The first ones only.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the adapters in the index."""
    from recycle_cli.store.catalog import AdapterQuery
    from recycle_cli.workflows.index import list_adapters

    session: Session = context.obj
    if status not in STATUSES:
        raise InputError(f"--status is {status!r}", f"use one of: {', '.join(STATUSES)}")
    query = AdapterQuery(
        base_model=None if base_model is None else base_name_given(base_model),
        license=license_,
        author=author,
        source=checked_source(source),
        min_rank=min_rank,
        max_rank=max_rank,
        target_module=target_module,
        search=search,
        status=None if status == "all" else status,  # type: ignore[arg-type]  # checked above
        sort=sort,
        limit=limit,
    )
    rows = list_adapters(query, session.settings)
    output = Output(json, session.quiet, session.verbose)
    if json:
        for row in rows:
            output.document(row)
        return
    output.table(
        f"{len(rows)} adapters",
        [
            "adapter",
            "sha256",
            "base model",
            "rank",
            "norm",
            "licence",
            "downloads",
            "bytes",
            "reason",
        ],
        [
            (
                row.id,
                (row.sha256 or "-")[:8],
                row.base_model,
                f"{row.rank.min}-{row.rank.max}" if row.rank else "-",
                row.norm,
                row.license,
                row.downloads,
                row.size_bytes,
                row.reason or "",
            )
            for row in rows
        ],
    )


def show(
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(help="An id, id@revision, a path, or sha256:PREFIX.")],
    json: JsonOption = False,
) -> None:
    """Show all that the index knows of one adapter, and why it was refused, if it was."""
    from recycle_cli.workflows.index import show_adapter

    session: Session = context.obj
    row = show_adapter(adapter, session.settings)
    output = Output(json, session.quiet, session.verbose)
    if json:
        output.document(row)
    else:
        print_adapter(row, output)


def stats(
    context: typer.Context,
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="NAME", help="Of this base model only.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the pool in figures: how many, why others were refused, ranks, licences."""
    from recycle_cli.workflows.index import pool_statistics

    session: Session = context.obj
    name = None if base_model is None else base_name_given(base_model)
    document = pool_statistics(session.settings, name)
    output = Output(json, session.quiet, session.verbose)
    if json:
        output.document(document)
        return
    counted = ", ".join(f"{number} {status}" for status, number in document.counts.items())
    of_these = f" ({counted})" if counted else ""
    output.text(f"{document.adapters} usable adapters, {document.size_bytes} bytes{of_these}")
    if document.funnel:
        steps: list[tuple[str, object, int]] = [("found", "", document.found)]
        steps += [(step.reason, step.adapters, step.left) for step in document.funnel]
        output.table("funnel", ["reason", "refused", "left"], steps)
    for title, histogram in HISTOGRAMS.items():
        counts: dict[str, int] = getattr(document, histogram)
        if counts:
            output.table(title, [title, "adapters"], list(counts.items()))
