"""`recycle index forget`: remove adapters from the index, and from disk."""

from collections.abc import Sequence
from pathlib import Path

from recycle_cli.errors import RecycleError
from recycle_cli.records import AdapterDocument, ForgetDocument, ForgottenAdapter
from recycle_cli.settings import Settings
from recycle_cli.store.catalog import Catalog
from recycle_cli.store.rows import row_key
from recycle_cli.workflows.index import open_index
from recycle_cli.workflows.reclaim import reclaim, rows_of


def forget_adapters(
    names: Sequence[str], settings: Settings, dry_run: bool = False
) -> ForgetDocument:
    """Removes adapters from the index, and their folders where no other row needs them.

    All names are looked up before anything goes. A crawl that finds such an adapter again looks at
    it as at a new one.

    Args:
        names: an id or an origin means all its revisions and pools; a revision, a kept path or a
            sha256 means the rows of those weights at that place.
        settings: where the index and the cache are.
        dry_run: change nothing, and tell what would go.

    Raises:
        InputError: no adapter has a name, or several have.
        RecycleError: the index cannot be used, or folders cannot be removed; the rows are gone
            then, and so are the other folders.
    """
    with open_index(settings) as catalog:
        rows = _unique([row for name in names for row in catalog.meant_by(name)])
        folders = _folders_to_go(rows, catalog, settings)
        sizes = {str(folder): _size_of(folder) for folder in folders}
        if not dry_run:
            catalog.remove(rows)
            failed = reclaim(folders, settings.adapters_folder, catalog)
            if failed:
                raise RecycleError(
                    f"forgotten, but {len(failed)} folders cannot be removed: {failed[0]}",
                    "check the permissions of the adapter cache, and remove them by hand",
                )
    forgotten = [
        ForgottenAdapter(
            **row.model_dump(include=set(ForgottenAdapter.model_fields)),
            bytes=sizes.pop(row.path or "", 0),
        )
        for row in rows
    ]
    return ForgetDocument(
        adapters=forgotten, bytes=sum(one.bytes for one in forgotten), dry_run=dry_run
    )


def _unique(rows: Sequence[AdapterDocument]) -> list[AdapterDocument]:
    return list({row_key(row): row for row in rows}.values())


def _folders_to_go(
    rows: Sequence[AdapterDocument], catalog: Catalog, settings: Settings
) -> list[Path]:
    """The kept folders that no other row has."""
    going = {row_key(row) for row in rows}
    folders = {Path(row.path) for row in rows if row.path is not None}
    return [
        folder
        for folder in sorted(folders)
        if folder.parent == settings.adapters_folder
        and folder.is_dir()
        and all(row_key(other) in going for other in rows_of(folder, catalog))
    ]


def _size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
