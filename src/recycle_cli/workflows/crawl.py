"""`recycle crawl`: vet every adapter of a folder or of the Hub, keep the good ones, record all."""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError
from recycle_cli.progress import Progress, Silent
from recycle_cli.records import AdapterDocument, CrawlDocument
from recycle_cli.settings import Settings
from recycle_cli.store.catalog import Catalog
from recycle_cli.store.holders import DUPLICATE, duplicate_of
from recycle_cli.store.recording import MAY_CHANGE
from recycle_cli.workflows.crawl_held import tells_nothing, with_what_is_kept
from recycle_cli.workflows.crawl_keep import details_of, keep_evidence
from recycle_cli.workflows.crawl_look import Look
from recycle_cli.workflows.crawl_outcomes import Outcomes
from recycle_cli.workflows.crawl_request import CrawlRequest
from recycle_cli.workflows.crawl_sources import CrawlSource, FolderSource, HubSource
from recycle_cli.workflows.hub_messages import waits_told
from recycle_cli.workflows.reclaim import reclaim
from recycle_cli.workflows.workers import as_finished

if TYPE_CHECKING:
    from recycle_cli.store.evidence import Evidence, Found
    from recycle_cli.store.hub import Hub
    from recycle_cli.store.room import Room
    from recycle_cli.store.vetting import VettingRules

VETTING_VERSION = 4
"""Raised when a check changes its mind, so that adapters vetted before are looked at again."""
USUAL_QUOTAS = {"resolvers": (3000, 300), "api": (500, 300)}
"""Requests to files, and to listings and the like, that the Hub's documentation allows in so many
seconds without a token."""
REQUESTS_TO_KEEP = 3
"""To the Hub for an adapter that is kept: configuration, weights, card."""


def crawl(
    request: CrawlRequest,
    settings: Settings,
    base_shapes: Mapping[str, tuple[int, int]],
    progress: Progress | None = None,
    hub: "Hub | None" = None,
) -> Iterator[AdapterDocument | CrawlDocument]:
    """Vets the adapters of a folder or of the Hub.

    What there is is found at once; the adapters are vetted as the iterator is advanced. One that
    has not changed since it was last vetted under the same rules is not read again.

    Args:
        request: what to crawl, and what to let in.
        settings: where the cache and the index are.
        base_shapes: the (out, in) of every linear module of the base model, by module path.
        progress: told of each adapter.
        hub: the Hub to crawl; None for the one that the environment names.

    Returns:
        One AdapterDocument for each adapter, in order, and one CrawlDocument at the end.

    Raises:
        InputError: there is no such folder, or no adapter.
        RecycleError: the Hub cannot be asked; from the iterator, when the index or the cache cannot
            be written.
    """
    from recycle_cli.store.room import Room, bytes_kept
    from recycle_cli.store.unfinished import sweep

    progress = progress or Silent()
    if not request.dry_run:
        sweep(settings.adapters_folder)
    room = Room(bytes_kept(settings.adapters_folder), request.max_cache_bytes)
    source: CrawlSource = (
        HubSource(request, settings, room, hub)
        if request.folder is None
        else FolderSource(request, settings)
    )
    with waits_told(progress):
        found = list(source.find(progress))
    outcomes = Outcomes(found)
    return _Crawl(request, settings, base_shapes, progress, source, room, outcomes).run(found)


@dataclass
class _Crawl:
    """A crawl under way, and what it has counted so far."""

    request: CrawlRequest
    settings: Settings
    base_shapes: Mapping[str, tuple[int, int]]
    progress: Progress
    source: CrawlSource
    room: "Room"
    outcomes: Outcomes
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    to_come: int = 0
    bytes_to_come: int = 0
    unchanged: set[int] = field(default_factory=set)
    """The places of those that what is recorded of them holds for."""
    orphans: set[str] = field(default_factory=set)
    """Folders that rows named before. They go in the end, since somebody may be reading one."""

    def run(self, found: "list[Found]") -> Iterator[AdapterDocument | CrawlDocument]:
        started = time.monotonic()
        self.progress.stage("vetting adapters", len(found))
        with ExitStack() as stack:
            catalog = stack.enter_context(self._open_catalog())
            stack.callback(self._reclaim, catalog)
            stack.callback(self.source.stop)
            stack.enter_context(waits_told(self.progress))
            rules = self._rules()
            digest = _digest_of(rules)
            looks = (
                Look(one, place, self.source.stamp(one, digest)) for place, one in enumerate(found)
            )
            asked = (self._recorded(look, catalog) for look in looks)
            looked_at = as_finished(
                lambda look: look.vet(self.source, self._rules_for(look, rules)),
                asked,
                self.source.workers,
                unused=Look.discard,
            )
            for look in stack.enter_context(closing(looked_at)):
                document = self._finish(look, catalog)
                self.progress.advance(f"{document.id}: {document.reason or document.status}")
                self.outcomes.add(look.place, document)
                for final in self.outcomes.final():
                    self._count(final)
                    yield final
        yield self._summary(time.monotonic() - started)

    def _open_catalog(self) -> Catalog:
        """The index; a dry run reads it where there is one, and makes none."""
        file = self.settings.catalog_file
        return Catalog(None if self.request.dry_run and not file.exists() else file)

    def _rules(self) -> "VettingRules":
        from recycle_cli.store.vetting import VettingRules

        request = self.request
        return VettingRules(
            request.base_model,
            self.base_shapes,
            request.limits(),
            lambda sha256, adapter_id: None,
            request.also_bases,
        )

    def _rules_for(self, look: Look, rules: "VettingRules") -> "VettingRules":
        """The rules for those who look, who cannot ask the index: they know what this crawl has
        accepted so far, and `_finish` asks for the rest."""

        def holder_of(sha256: str, adapter_id: str) -> str | None:
            return self.outcomes.holder_before(sha256, adapter_id, look.place)

        return replace(rules, holder_of=holder_of)

    def _recorded(self, look: Look, catalog: Catalog) -> Look:
        """The look, with what is recorded where that holds; asked in the order of the crawl."""
        look.recorded_in(catalog, self.request.base_model, self._stands)
        if look.recorded is not None:
            self.unchanged.add(look.place)
        return look

    def _stands(self, holder: AdapterDocument) -> bool:
        """Whether an adapter that was accepted before is sure to be so still. One that this crawl
        looks at anew, or has not come to, is not: who was refused for its sake is looked at too."""
        place = self.outcomes.place_of(holder)
        return place is None or place in self.unchanged

    def _finish(self, look: Look, catalog: Catalog) -> AdapterDocument:
        """The document of an adapter that was looked at, kept and recorded."""
        if look.recorded is not None:
            return self._confirm(look.recorded, look, catalog)
        document, evidence = look.document, look.evidence
        assert document is not None and evidence is not None
        try:
            holders = self._holders(document, catalog)
            document = self._unless_held(document, look.place, holders)
            if document.status == "accepted":
                document = self._keep(document, evidence)
            else:
                document = with_what_is_kept(document, catalog)
            if not self.request.dry_run and not tells_nothing(document, catalog):
                again = document.status == "failed" or document.reason in MAY_CHANGE
                details = details_of(evidence) if document.status == "accepted" else None
                later = self._later(holders, look)
                stamp = None if again else look.stamp
                self.orphans |= set(catalog.record(document, stamp, details, later))
        finally:
            evidence.discard()
        self.bytes_read += evidence.bytes_read
        return document

    def _confirm(self, recorded: AdapterDocument, look: Look, catalog: Catalog) -> AdapterDocument:
        """The document of an adapter that has not changed. A crawl that was killed, or another one
        at the same time, may have left it one of several that hold the same weights."""
        holders = self._holders(recorded, catalog)
        document = self._unless_held(recorded, look.place, holders)
        later = self._later(holders, look)
        if not self.request.dry_run and (later or document.status != recorded.status):
            self.orphans |= set(catalog.record(document, look.stamp, None, later))
        return document

    def _holders(self, document: AdapterDocument, catalog: Catalog) -> list[AdapterDocument]:
        """The adapters in the index that hold the weights of an accepted one too."""
        if document.status != "accepted" or document.sha256 is None:
            return []
        return catalog.holders_of(document.sha256, document.id, pool=self.request.base_model)

    def _later(self, holders: Sequence[AdapterDocument], look: Look) -> list[AdapterDocument]:
        return [one for one in holders if self.outcomes.comes_after(one, look.place)]

    def _unless_held(
        self, document: AdapterDocument, place: int, recorded: Sequence[AdapterDocument] = ()
    ) -> AdapterDocument:
        """The document, refused where an adapter that comes before holds the same weights.

        Args:
            document: of the adapter at this place.
            place: in the order of this crawl.
            recorded: who holds the same weights by the index.
        """
        if document.status != "accepted" and document.reason != DUPLICATE:
            return document
        holder = self.outcomes.holder_before(document.sha256, document.id, place) or next(
            (one.id for one in recorded if self.outcomes.holds_against(one, place)), None
        )
        return document if holder is None else duplicate_of(document, holder)

    def _keep(self, document: AdapterDocument, evidence: "Evidence") -> AdapterDocument:
        """Keeps an accepted adapter; its document with the path it is kept under."""
        if self.request.dry_run:
            return document
        from recycle_cli.store.room import NoRoom
        from recycle_cli.store.vetting import UNREADABLE

        try:
            path = keep_evidence(evidence, self.request.base_model, self.settings, self.room)
        except (InputError, NoRoom) as error:
            reason = getattr(error, "code", UNREADABLE)
            return document.model_copy(
                update={"status": "failed", "reason": reason, "detail": str(error)}
            )
        return document.model_copy(update={"path": str(path)})

    def _reclaim(self, catalog: Catalog) -> None:
        folders = map(Path, sorted(self.orphans))
        for problem in reclaim(folders, self.settings.adapters_folder, catalog):
            self.progress.message(f"a folder that nothing needs any more stays: {problem}")

    def _count(self, document: AdapterDocument) -> None:
        self.counts[document.status] += 1
        if document.reason is not None:
            self.reasons[document.reason] += 1
        if document.status == "accepted" and document.path is None:
            # A dry run, and it is not in the cache yet.
            self.to_come += 1
            self.bytes_to_come += document.size_bytes or 0

    def _summary(self, elapsed_s: float) -> CrawlDocument:
        request = self.request
        document = CrawlDocument(
            source=request.source,
            base_model=request.base_model,
            counts=dict(self.counts),
            reasons=dict(self.reasons),
            requests=0,
            bytes=self.bytes_read,
            elapsed_s=elapsed_s,
        )
        if not isinstance(self.source, HubSource):
            return document
        hub = self.source.hub
        update: dict[str, object] = {
            "requests": hub.traffic.requests,
            "storage_requests": hub.traffic.storage_requests,
            "passed_over": hub.passed_over,
            "bytes": hub.traffic.bytes,
        }
        if request.dry_run:
            requests = REQUESTS_TO_KEEP * self.to_come
            # The listing, or the commits of a list, have to be asked for again.
            asked = {"resolvers": requests, "api": hub.traffic.api_requests}
            update |= {
                "requests_to_come": requests,
                "bytes_to_come": self.bytes_to_come,
                "rate_limited_s": max(_limited_s(hub, *one) for one in asked.items()),
            }
        return document.model_copy(update=update)


def _limited_s(hub: "Hub", bucket: str, requests: int) -> int:
    """The least seconds that so many requests of a kind have to wait for the Hub's rate limit."""
    quota, window = hub.quotas.get(bucket, USUAL_QUOTAS[bucket])
    return max(0, math.ceil(requests / quota) - 1) * window


def _digest_of(rules: "VettingRules") -> str:
    """A digest of all that decides a verdict beside the adapter's own files."""
    limits = {**asdict(rules.limits), "licenses": sorted(rules.limits.licenses or ())}
    decisive = {
        "version": VETTING_VERSION,
        "base_model": rules.base_model,
        "also_bases": sorted(rules.also_bases),
        "base_shapes": sorted(rules.base_shapes.items()),
        "any_license": rules.limits.licenses is None,
        "limits": limits,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
