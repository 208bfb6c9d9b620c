"""`recycle index`: bring the index up to date, and ask it."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recycle_cli.errors import RecycleError
from recycle_cli.progress import Progress, Silent
from recycle_cli.records import (
    AdapterDocument,
    IndexDocument,
    ModuleNorm,
    OtherRow,
    ShownAdapterDocument,
    StatsDocument,
)
from recycle_cli.settings import Settings
from recycle_cli.store.catalog import AdapterQuery, Catalog
from recycle_cli.store.details import Details
from recycle_cli.store.questions import codes_in_order
from recycle_cli.store.rows import row_key

if TYPE_CHECKING:
    from recycle_cli.store.update_facts import UpdateFacts

MISSING: Literal["missing"] = "missing"
DAMAGED: Literal["damaged"] = "damaged"


def open_index(settings: Settings) -> Catalog:
    """The index, to be asked; where there is none, an empty one that leaves nothing behind."""
    file = settings.catalog_file
    return Catalog(file if file.exists() else None)


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
    with open_index(settings) as catalog:
        pool = catalog.query(AdapterQuery())
        lacking = {row_key(document) for document in catalog.lacking_derived()}
        progress.stage("updating the index", len(pool))
        updated = 0
        for document in pool:
            updated += _update(document, row_key(document) in lacking, catalog)
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


def _update(document: AdapterDocument, lacks_derived: bool, catalog: Catalog) -> bool:
    """Updates one row; True when it changed."""
    folder = Path(document.path or "")
    if document.path is None or not folder.is_dir():
        catalog.set_failed(document, MISSING, f"its folder {document.path} has gone")
        return True
    if lacks_derived:
        _derive(document, folder, catalog)
    return lacks_derived


def _derive(document: AdapterDocument, folder: Path, catalog: Catalog) -> None:
    try:
        facts = facts_in(folder)
    except (RecycleError, OSError) as error:
        catalog.set_failed(document, DAMAGED, str(error))
        return
    card = catalog.details_of(document).card or _kept_card(document, folder)
    details = Details(card, facts.modules)
    catalog.set_derived(document, facts.norm, facts.fingerprint, details)


def facts_in(folder: Path) -> "UpdateFacts":
    """What is known of the update in an adapter's folder.

    Raises:
        RecycleError, OSError: it cannot be read.
        AdapterProblem: it is no adapter that a pool holds.
    """
    from recycle_cli.lora.config import AdapterProblem
    from recycle_cli.lora.folder import open_adapter
    from recycle_cli.lora.update import Lazy
    from recycle_cli.store.update_facts import facts_of

    with open_adapter(folder) as file:
        facts = facts_of(Lazy(file.shapes, file.read))
    if facts is None:
        raise AdapterProblem("non_finite", "its weights hold NaN or infinity")
    return facts


def _kept_card(document: AdapterDocument, folder: Path) -> str:
    from recycle_cli.store.cache import SOURCE_FOLDER
    from recycle_cli.store.folder import FoundFolder, read_card

    source = folder / SOURCE_FOLDER
    return read_card(FoundFolder(document.id, source, source))[1]


def list_adapters(query: AdapterQuery, settings: Settings) -> list[AdapterDocument]:
    """The adapters in the index that a query asks for.

    Raises:
        InputError: the sort key is unknown, or is relevance without a search.
        RecycleError: the index cannot be used.
    """
    with open_index(settings) as catalog:
        return catalog.query(query)


def show_adapter(name: str, settings: Settings) -> ShownAdapterDocument:
    """The adapter of this name, whatever its status, with all that is known of it.

    Args:
        name: an id, with or without `@revision`, a path or the start of a sha256.
        settings: where the index is.

    Raises:
        InputError: no adapter has this name, or several do.
        RecycleError: the index cannot be used.
    """
    with open_index(settings) as catalog:
        document = catalog.get(name)
        details = catalog.details_of(document)
        others = catalog.revisions_of(document)
    return ShownAdapterDocument(
        **dict(document),
        modules={
            module: ModuleNorm(rank=facts.rank, norm=facts.norm)
            for module, facts in details.modules.items()
        },
        card=details.card,
        others=[OtherRow(**row.model_dump(include=set(OtherRow.model_fields))) for row in others],
    )


def pool_statistics(settings: Settings, base_model: str | None = None) -> StatsDocument:
    """The index in figures, of one base model or of all.

    Raises:
        RecycleError: the index cannot be used.
    """
    with open_index(settings) as catalog:
        return catalog.statistics(base_model, codes_in_order())
