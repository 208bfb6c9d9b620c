"""`recycle crawl`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recycle_cli.cli.options import JsonOption, Session, parse_size
from recycle_cli.cli.output import Output
from recycle_cli.errors import InputError, RecycleError
from recycle_cli.lora.base_names import EMBEDDED_NAME, base_name_given, canonical_base_name

if TYPE_CHECKING:
    from recycle_cli.records import AdapterDocument, CrawlDocument
    from recycle_cli.workflows.crawl_request import CrawlRequest

HUB = "hub"


def crawl(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="[hub|FOLDER]",
            help="hub: the Hugging Face Hub, or the mirror that HF_ENDPOINT names. A folder: "
            "adapters are found at any depth; write ./hub for a folder of that name.",
        ),
    ] = HUB,
    base_model: Annotated[
        str,
        typer.Option("--base-model", metavar="NAME", help="smollm2, a Hub id or a local folder."),
    ] = EMBEDDED_NAME,
    also_base: Annotated[
        list[str] | None,
        typer.Option(
            "--also-base",
            metavar="NAME",
            help="Another name of the same base model that adapters may state; may be given "
            "several times. Copies by unsloth and 4-bit copies are known.",
        ),
    ] = None,
    ids_from: Annotated[
        Path | None,
        typer.Option(
            "--ids-from",
            metavar="FILE",
            help="Hub: look at these alone: owner/name or owner/name@revision, one a line.",
        ),
    ] = None,
    author: Annotated[
        str | None, typer.Option("--author", help="Hub: look at this owner's adapters alone.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=1,
            help="Look at this many adapters at most; of a listing of the Hub the most downloaded.",
        ),
    ] = None,
    license_: Annotated[
        list[str] | None,
        typer.Option("--license", help="Accept this licence only; may be given several times."),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", min=1, help="Refuse higher ranks.")
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option("--max-bytes", metavar="SIZE", help="Refuse larger weights files: 2GB."),
    ] = None,
    min_norm: Annotated[
        float | None,
        typer.Option("--min-norm", min=0, help="Refuse updates of this norm and below: 1."),
    ] = None,
    max_norm: Annotated[
        float | None, typer.Option("--max-norm", min=0, help="Refuse larger norms: 1000.")
    ] = None,
    max_cache: Annotated[
        str | None,
        typer.Option(
            "--max-cache",
            metavar="SIZE",
            help="Keep no more weights than this in the adapter cache, as in 50GB.",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, max=64, help="Hub: adapters at once: 8.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Keep and record nothing. Of the Hub, stop at the headers of the weights and tell "
            "what fetching them would take.",
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Find the adapters of a base model, vet each one, and keep the good ones."""
    from recycle_cli.records import AdapterDocument
    from recycle_cli.workflows.crawl import crawl as run
    from recycle_cli.workflows.crawl_request import WORKERS, CrawlRequest, read_ids
    from recycle_cli.workflows.crawl_sources import check_folder, check_online

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    if source == HUB:
        check_online(session.settings)
    else:
        check_folder(Path(source))
        _refuse_hub_options({"--ids-from": ids_from, "--author": author, "--workers": workers})
    if not all(name.strip() for name in also_base or ()):
        raise InputError("--also-base is empty", "name a base model, or leave it out")
    if license_ and not all(license_):
        raise InputError("--license is empty", "name a licence, or leave it out")
    if min_norm is not None and max_norm is not None and min_norm >= max_norm:
        raise InputError(
            f"--min-norm is {min_norm:g} and --max-norm {max_norm:g}", "leave room between them"
        )
    if ids_from is not None and author is not None:
        raise InputError("--author and --ids-from both say what to look at", "leave out one")
    request = CrawlRequest(
        folder=None if source == HUB else Path(source),
        base_model=base_name_given(base_model),
        also_bases=frozenset(canonical_base_name(name) for name in also_base or ()),
        ids=read_ids(ids_from) if ids_from else (),
        author=author,
        limit=limit,
        licenses=frozenset(license_) if license_ else None,
        max_rank=max_rank,
        max_bytes=_size(max_bytes, "--max-bytes"),
        min_norm=min_norm,
        max_norm=max_norm,
        max_cache_bytes=_size(max_cache, "--max-cache"),
        workers=workers or WORKERS,
        dry_run=dry_run,
    )
    from recycle_cli.engine.base_model import linear_shapes  # it takes seconds to import

    shapes = linear_shapes(request.base_model, session.settings)
    seen: list[AdapterDocument] = []
    with output.progress() as progress:
        for document in run(request, session.settings, shapes, progress):
            if json:
                output.document(document)
            if not isinstance(document, AdapterDocument):
                summary = document
            elif not json:
                seen.append(document)
    if not json:
        _show(output, seen, summary)
    _check(request, summary)


def _size(text: str | None, option: str) -> int | None:
    """Bytes, from their number or a number with a unit.

    Raises:
        InputError: it is neither.
    """
    plain = (text or "").strip()
    if plain.isascii() and plain.isdigit() and int(plain) > 0:
        return int(plain)
    return parse_size(text, option)


def _refuse_hub_options(given: dict[str, object]) -> None:
    for option, value in given.items():
        if value is not None:
            raise InputError(f"{option} is about the Hub", "leave it out, or crawl hub")


def _check(request: "CrawlRequest", summary: "CrawlDocument") -> None:
    """Asks for some adapter that can be used, and for room for all that can."""
    if summary.reasons.get("no_room"):
        raise RecycleError(
            f"{summary.reasons['no_room']} adapters do not fit into the adapter cache, which may "
            f"take {request.max_cache_bytes} bytes",
            "allow more with --max-cache, or make room: recycle index forget; then crawl again",
        )
    if not summary.counts.get("accepted"):
        where = "on the Hub" if request.folder is None else f"under {request.folder}"
        status = "rejected" if summary.counts.get("rejected") else "failed"
        again = f"; recycle index list --status {status} shows them again"
        raise RecycleError(
            f"none of the {sum(summary.counts.values())} adapters {where} can be used with "
            f"{request.base_model}",
            f"the reasons are above{'' if request.dry_run else again}",
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
    if summary.reasons:
        reasons = sorted(summary.reasons.items(), key=lambda item: (-item[1], item[0]))
        output.table("Why not", ["reason", "adapters"], reasons)
    counted = ", ".join(f"{number} {status}" for status, number in sorted(summary.counts.items()))
    output.text(f"{counted} in {summary.elapsed_s:.1f} s")
    if summary.source == HUB:
        output.text(
            f"{summary.requests} requests to the Hub, {summary.storage_requests} to its storage, "
            f"{summary.bytes} bytes"
        )
    if summary.passed_over:
        output.text(
            f"{summary.passed_over} entries of the listing name no repository or no commit: passed "
            "over"
        )
    if summary.bytes_to_come is not None:
        output.text(
            f"Keeping the {summary.counts.get('accepted', 0)} accepted ones takes "
            f"{summary.bytes_to_come} bytes and {summary.requests_to_come} requests, for which the "
            f"Hub's rate limit has one wait {summary.rate_limited_s} s at least"
        )
