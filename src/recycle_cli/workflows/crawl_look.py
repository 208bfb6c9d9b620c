"""A look at one adapter of a crawl: what is recorded of it, or what vetting finds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.records import AdapterDocument
from recycle_cli.store.catalog import Catalog
from recycle_cli.store.holders import DUPLICATE
from recycle_cli.workflows.crawl_sources import CrawlSource

if TYPE_CHECKING:
    from recycle_cli.store.evidence import Evidence, Found
    from recycle_cli.store.vetting import VettingRules


@dataclass
class Look:
    """A look at one adapter.

    Args:
        found: the adapter.
        place: in the order of the crawl.
        stamp: what must be the same for what is recorded to hold; None where it never does.
        recorded: what is recorded of it and holds; None where it has to be vetted.
        document: what vetting made of it, once it has.
        evidence: what vetting read, likewise.
    """

    found: "Found"
    place: int
    stamp: str | None
    recorded: AdapterDocument | None = None
    document: AdapterDocument | None = None
    evidence: "Evidence | None" = None

    def recorded_in(
        self, catalog: Catalog, pool: str, stands: Callable[[AdapterDocument], bool]
    ) -> None:
        """Looks into the index: what is recorded of an unchanged adapter, and does not hang on
        what has gone, holds.

        Args:
            catalog: the index.
            pool: the base model.
            stands: whether an accepted adapter that holds the weights of this one will stay so.
        """
        from recycle_cli.store.cache import is_whole

        if self.stamp is None:
            return
        found = self.found
        row = catalog.unchanged(found.source, found.origin, self.stamp, found.revision, pool)
        if row is None or row.id != found.id:
            return
        if row.reason == DUPLICATE:
            holds = any(map(stands, catalog.holders_of(row.sha256 or "", row.id, pool=pool)))
        elif row.status == "accepted":
            path, size = row.path, row.size_bytes
            holds = path is not None and size is not None and is_whole(Path(path), size)
        else:
            holds = row.reason != "superseded" or found.newer is not None
        self.recorded = row if holds else None

    def vet(self, source: CrawlSource, rules: "VettingRules") -> "Look":
        """Vets it, unless what is recorded holds. May run in any thread; asks no index."""
        from recycle_cli.store.vetting import describe, unexpected, vet

        if self.recorded is not None:
            return self
        evidence = self.evidence = source.evidence(self.found)
        try:
            verdict = vet(evidence, rules, source.looks_at_tensors)
            if verdict.status == "accepted" and source.looks_at_tensors:
                _ = evidence.weights_path, evidence.card_text
        except Exception as error:
            if isinstance(error, RecycleError) and not isinstance(error, InputError):
                evidence.discard()
                raise  # of the disk, or of an end that was asked for: no adapter's fault
            verdict = unexpected(error)  # one bad adapter never stops the rest
        self.document = describe(evidence, verdict, rules)
        return self

    def discard(self) -> None:
        """Removes what was fetched for it, where nobody asks for the outcome any more."""
        if self.evidence is not None:
            self.evidence.discard()
