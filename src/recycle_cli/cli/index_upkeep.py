"""`recycle index duplicates`, `verify` and `forget`."""

from typing import TYPE_CHECKING, Annotated

import typer

from recycle_cli.cli.options import JsonOption, Session
from recycle_cli.cli.output import Output
from recycle_cli.lora.base_names import base_name_given

if TYPE_CHECKING:
    from recycle_cli.records import DuplicatesDocument

RELATIONS = {
    "identical": "the same weights file",
    "same_update": "the same update in different files",
    "near": "nearly the same update",
}


def duplicates(
    context: typer.Context,
    base_model: Annotated[
        str | None, typer.Option("--base-model", metavar="NAME", help="Of this base model only.")
    ] = None,
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            min=0.5,
            max=1.0,
            help="The cosine from which on updates are nearly the same.",
        ),
    ] = 0.99,
    json: JsonOption = False,
) -> None:
    """Find adapters that are the same, or nearly so, under several names.

    The first of a group is the one to keep: accepted, downloaded most, oldest.
    """
    from recycle_cli.workflows.index_duplicates import find_duplicates

    session: Session = context.obj
    name = None if base_model is None else base_name_given(base_model)
    found = find_duplicates(session.settings, threshold, name)
    output = Output(json, session.quiet, session.verbose)
    if found.not_compared:
        output.message(
            f"{found.not_compared} adapters have no fingerprint yet and were compared by sha256 "
            "alone; recycle index computes what is missing"
        )
    for group in found.groups:
        if json:
            output.document(group)
        else:
            _print_group(group, output)
    if not json:
        output.text(f"groups of duplicates: {len(found.groups)}")


def _print_group(group: "DuplicatesDocument", output: Output) -> None:
    output.table(
        f"{RELATIONS[group.relation]} ({group.base_model or 'base model unknown'})",
        ["adapter", "sha256", "cosine", "norm", "downloads", "licence", "status"],
        [
            (
                one.id,
                (one.sha256 or "-")[:8],
                f"{one.cosine:.5f}",
                one.norm,
                one.downloads,
                one.license,
                one.status,
            )
            for one in group.adapters
        ],
    )


def verify(
    context: typer.Context,
    repair: Annotated[
        bool, typer.Option("--repair", help="Fetch again what is damaged or missing.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Read every kept adapter and compare it with its sha256; exit 3 when one is not whole."""
    from recycle_cli.workflows.index_verify import check_whole, verify_index

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    with output.progress() as progress:
        document = verify_index(session.settings, repair, progress)
    if json:
        output.document(document)
    else:
        output.text(f"{document.adapters} adapters, {document.bytes} bytes read")
        for one in document.damaged:
            state = "repaired; it was " if one.repaired else ""
            output.text(f"{one.id} (sha256:{one.sha256[:12]}): {state}{one.problem}: {one.detail}")
    check_whole(document)


def forget(
    context: typer.Context,
    adapters: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...",
            help="An id or the folder it was found in, for all its revisions; or id@revision, "
            "sha256:PREFIX.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go, and change nothing.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Remove adapters from the index, and from disk where nothing else needs them.

    A crawl that finds them again brings them back.
    """
    from recycle_cli.workflows.index_forget import forget_adapters

    session: Session = context.obj
    document = forget_adapters(adapters, session.settings, dry_run)
    output = Output(json, session.quiet, session.verbose)
    if json:
        output.document(document)
        return
    for one in document.adapters:
        version = f"@{one.revision}" if one.revision else ""
        output.text(f"{one.id}{version}: {one.bytes} bytes")
    what = "to forget" if dry_run else "forgotten"
    output.text(f"rows {what}: {len(document.adapters)}, bytes of disk: {document.bytes}")
