"""What a crawl keeps of an adapter: its files in the cache, and what the index holds of it."""

from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import RecycleError
from recycle_cli.records import AdapterDocument
from recycle_cli.settings import Settings

if TYPE_CHECKING:
    from recycle_cli.store.details import Details
    from recycle_cli.store.evidence import Evidence
    from recycle_cli.store.hub import Hub
    from recycle_cli.store.room import Room


def keep_evidence(evidence: "Evidence", base_model: str, settings: Settings, room: "Room") -> Path:
    """Puts a vetted adapter into the cache; gives its folder.

    Raises:
        InputError: its files changed meanwhile.
        NoRoom: it does not fit any more.
        RecycleError: the cache cannot be written.
    """
    from recycle_cli.store.cache import CacheEntry, clean_config, is_whole, keep

    ours = evidence.weights_are_ours  # whose room was taken when they were fetched
    if not ours and not is_whole(settings.adapters_folder / evidence.sha256, evidence.size_bytes):
        room.take(evidence.size_bytes)
    ranks = {module: a.shape[0] for module, (a, _) in evidence.pairs.items()}
    entry = CacheEntry(
        sha256=evidence.sha256,
        weights=evidence.weights_path,
        config=clean_config(evidence.config, ranks, base_model),
        source_config=evidence.config_text,
        source_card=evidence.card_text,
        move=ours,
    )
    return keep(settings.adapters_folder, entry)


def details_of(evidence: "Evidence") -> "Details":
    """What the index holds of an adapter beside its document."""
    from recycle_cli.store.details import Details

    return Details(card=evidence.card_text, modules=evidence.modules)


def fetch_again(document: AdapterDocument, settings: Settings, hub: "Hub | None" = None) -> None:
    """Puts an adapter that the index holds, and that the cache has lost, into it again.

    Args:
        document: the adapter.
        settings: where the cache is.
        hub: where the Hub is; None for the one that the environment names.

    Raises:
        RecycleError: its place no longer has these weights, or cannot be read.
    """
    from recycle_cli.lora.config import AdapterProblem
    from recycle_cli.store.room import Room

    evidence = _evidence_of(document, settings, hub)
    try:
        evidence.check_access()
        if evidence.sha256 != document.sha256:
            raise RecycleError(
                f"{document.origin} holds other weights now: sha256 {evidence.sha256[:16]}",
                "crawl it again, or forget the adapter",
            )
        if document.fingerprint not in (None, evidence.fingerprint):
            raise RecycleError(
                f"the configuration in {document.origin} makes another update of these weights now",
                "crawl it again, or forget the adapter",
            )
        keep_evidence(evidence, document.pool or document.base_model or "", settings, Room())
    except (OSError, AdapterProblem) as error:
        raise RecycleError(
            f"{document.id} cannot be fetched again: {error}", "crawl it again, or forget it"
        ) from error
    finally:
        evidence.discard()


def _evidence_of(document: AdapterDocument, settings: Settings, hub: "Hub | None") -> "Evidence":
    from recycle_cli.store.evidence import FolderEvidence
    from recycle_cli.store.folder import FoundFolder

    if document.source == "folder":
        folder = Path(document.origin)
        return FolderEvidence(FoundFolder(document.id, folder, folder.parent))
    if settings.offline:
        raise RecycleError(
            f"{document.id} is on the Hub, and there is no network", "try again online"
        )
    from recycle_cli.store.hub import Hub
    from recycle_cli.store.hub_evidence import HubEvidence
    from recycle_cli.store.hub_repository import HubRepository
    from recycle_cli.store.room import Room

    repository = HubRepository(document.id, document.revision or "", listed=False)
    return HubEvidence(repository, hub or Hub(), settings.adapters_folder, Room())
