"""What stays of an adapter that is held already, where a crawl does not accept it this time.

Other limits, a server's bad day or a gate must not cost what took hours to fetch.
"""

from pathlib import Path

from recycle_cli.records import AdapterDocument
from recycle_cli.store.catalog import Catalog
from recycle_cli.store.holders import DUPLICATE
from recycle_cli.store.recording import MAY_CHANGE
from recycle_cli.workflows.crawl_request import HUB

OF_THE_WEIGHTS = (
    "path",
    "sha256",
    "size_bytes",
    "rank",
    "alpha",
    "use_rslora",
    "target_modules",
    "norm",
    "fingerprint",
)


def tells_nothing(document: AdapterDocument, catalog: Catalog) -> bool:
    """True where an adapter could not be looked at, and the one that is held is as good as before:
    the same revision of it, or any where not even its commit could be asked for."""
    if document.status != "failed" and document.reason not in MAY_CHANGE:
        return False
    held = catalog.at(document.source, document.origin, document.pool)
    if held is None or held.status != "accepted":
        return False
    nameless = document.source == HUB and document.revision is None
    return nameless or (held.revision == document.revision and _is_kept(held))


def with_what_is_kept(document: AdapterDocument, catalog: Catalog) -> AdapterDocument:
    """The document of an adapter that is not accepted, with the folder that the cache has of its
    very commit. A commit never changes, so other limits may let it in again: it stays, as that of a
    superseded one does, until it is forgotten."""
    if document.source != HUB or document.revision is None or document.reason == DUPLICATE:
        return document
    held = catalog.at(document.source, document.origin, document.pool, document.revision)
    if held is None or not _is_kept(held):
        return document
    return document.model_copy(update={name: getattr(held, name) for name in OF_THE_WEIGHTS})


def _is_kept(held: AdapterDocument) -> bool:
    from recycle_cli.store.cache import is_whole

    return (
        held.path is not None
        and held.size_bytes is not None
        and is_whole(Path(held.path), held.size_bytes)
    )
