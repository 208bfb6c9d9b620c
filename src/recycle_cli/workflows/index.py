"""`recycle index`: bring the index up to date, and ask it."""

import time
from pathlib import Path

from recycle_cli.errors import RecycleError
from recycle_cli.progress import Progress, Silent
from recycle_cli.records import AdapterDocument, IndexDocument, StatsDocument
from recycle_cli.settings import Settings
from recycle_cli.store.catalog import AdapterQuery, Catalog

MISSING = "missing"
DAMAGED = "damaged"


def update_index(settings: Settings, progress: Progress | None = None) -> IndexDocument:
    """Computes the derived columns that are empty and marks adapters whose folder has gone.

    A marked adapter has the status `failed` and the reason `missing` (or `damaged`, where its
    folder cannot be read); crawling its origin again brings it back.

    Returns:
        `adapters` counts the accepted ones left, `updated` the rows changed, and `missing` names
        every adapter that is marked as missing, now or earlier.

    Raises:
        RecycleError: the index cannot be used.
    """
    started = time.monotonic()
    progress = progress or Silent()
    with Catalog(settings.catalog_file) as catalog:
        pool = catalog.query(AdapterQuery())
        progress.stage("updating the index", len(pool))
        updated = 0
        for document in pool:
            updated += _update(document, catalog)
            progress.advance(document.id)
        return IndexDocument(
            adapters=len(catalog.query(AdapterQuery())),
            updated=updated,
            missing=[
                row.id
                for row in catalog.query(AdapterQuery(status="failed"))
                if row.reason == MISSING
            ],
            elapsed_s=time.monotonic() - started,
        )


def _update(document: AdapterDocument, catalog: Catalog) -> bool:
    """Updates one row; True when it changed."""
    folder = Path(document.path or "")
    if document.path is None or not folder.is_dir():
        catalog.set_failed(document, MISSING, f"its folder {document.path} has gone")
        return True
    if document.norm is not None and document.fingerprint is not None:
        return False
    from recycle_cli.lora.folder import read_adapter
    from recycle_cli.lora.norm import fingerprint, module_norms, total_norm

    try:
        update = read_adapter(folder).update
        norms = module_norms(update)
    except (RecycleError, OSError) as error:
        catalog.set_failed(document, DAMAGED, str(error))
    else:
        catalog.set_derived(document, total_norm(norms), fingerprint(update, norms))
    return True


def list_adapters(query: AdapterQuery, settings: Settings) -> list[AdapterDocument]:
    """The adapters in the index that a query asks for.

    Raises:
        InputError: the sort key is unknown.
        RecycleError: the index cannot be used.
    """
    with Catalog(settings.catalog_file) as catalog:
        return catalog.query(query)


def show_adapter(name: str, settings: Settings) -> AdapterDocument:
    """The adapter of this name, whatever its status: an id, a path or the start of a sha256.

    Raises:
        InputError: no adapter has this name, or several do.
        RecycleError: the index cannot be used.
    """
    with Catalog(settings.catalog_file) as catalog:
        return catalog.get(name)


def pool_statistics(settings: Settings, base_model: str | None = None) -> StatsDocument:
    """The index in figures, of one base model or of all.

    Raises:
        RecycleError: the index cannot be used.
    """
    with Catalog(settings.catalog_file) as catalog:
        return catalog.statistics(base_model)
