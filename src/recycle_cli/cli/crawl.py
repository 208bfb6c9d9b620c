"""`recycle crawl`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recycle_cli.cli.options import JsonOption, Session
from recycle_cli.cli.output import Output
from recycle_cli.errors import RecycleError
from recycle_cli.lora.base_names import EMBEDDED_NAME, base_name_given

if TYPE_CHECKING:
    from recycle_cli.records import AdapterDocument, CrawlDocument


def crawl(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A folder; adapters are found at any depth.")],
    base_model: Annotated[
        str,
        typer.Option("--base-model", metavar="NAME", help="smollm2, a Hub id or a local folder."),
    ] = EMBEDDED_NAME,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Look at this many adapters at most.")
    ] = None,
    license_: Annotated[
        list[str] | None,
        typer.Option("--license", help="Accept this licence only; may be given several times."),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", min=1, help="Refuse higher ranks.")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option("--max-bytes", min=1, help="Refuse larger weights files.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Vet only: keep and record nothing.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Find the adapters of a base model, vet each one, and keep the good ones."""
    from recycle_cli.engine.base_model import linear_shapes
    from recycle_cli.records import AdapterDocument
    from recycle_cli.workflows.crawl import CrawlRequest, check_folder, crawl_folder

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    check_folder(folder)
    request = CrawlRequest(
        folder=folder,
        base_model=base_name_given(base_model),
        limit=limit,
        licenses=frozenset(license_) if license_ else None,
        max_rank=max_rank,
        max_bytes=max_bytes,
        dry_run=dry_run,
    )
    shapes = linear_shapes(request.base_model, session.settings)
    seen: list[AdapterDocument] = []
    with output.progress() as progress:
        for document in crawl_folder(request, session.settings, shapes, progress):
            if json:
                output.document(document)
            if isinstance(document, AdapterDocument):
                seen.append(document)
            else:
                summary = document
    if not json:
        _show(output, seen, summary)
    if not summary.counts.get("accepted"):
        raise RecycleError(
            f"none of the {len(seen)} adapters under {folder} can be used with "
            f"{request.base_model}",
            "the reasons are above; recycle index list --status rejected shows them again"
            if not dry_run
            else "the reasons are above",
        )


def _show(output: Output, seen: "list[AdapterDocument]", summary: "CrawlDocument") -> None:
    output.table(
        f"Adapters of {summary.base_model} in {summary.source}",
        ["adapter", "status", "rank", "norm", "licence", "reason"],
        [
            (
                row.id,
                row.status,
                f"{row.rank.min}-{row.rank.max}" if row.rank else "-",
                row.norm,
                row.license,
                f"{row.reason}: {row.detail}" if row.reason else "",
            )
            for row in seen
        ],
    )
    counted = ", ".join(f"{number} {status}" for status, number in sorted(summary.counts.items()))
    output.text(f"{counted} in {summary.elapsed_s:.1f} s")
