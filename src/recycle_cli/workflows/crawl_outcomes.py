"""What came of the adapters of a crawl: they end in any order, and are told in the crawl's own."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from recycle_cli.records import AdapterDocument
from recycle_cli.store.holders import DUPLICATE, duplicate_of

if TYPE_CHECKING:
    from recycle_cli.store.evidence import Found


class _Holder(NamedTuple):
    place: int
    id: str


class Outcomes:
    """The documents of a crawl. Of several adapters with the same weights, the first in the crawl's
    order holds them, whichever was there first; those in the index that this crawl does not look at
    come before all of them.

    A document is final when those of all earlier adapters are there. `holder_before` may be asked
    in any thread.

    Args:
        found: the adapters that are looked at, in order.
    """

    def __init__(self, found: "Sequence[Found]") -> None:
        self._places: dict[tuple[str, str], int] = {}
        for place, one in enumerate(found):
            self._places.setdefault((one.source, one.origin), place)
        self._waiting: dict[int, AdapterDocument] = {}
        self._told = 0
        self._holders: dict[str, _Holder] = {}

    def holder_before(self, sha256: str | None, adapter_id: str, place: int) -> str | None:
        """The id of another adapter, earlier in this crawl, that holds these weights."""
        holder = self._holders.get(sha256 or "")
        if holder is None or holder.id == adapter_id or holder.place > place:
            return None
        return holder.id

    def holds_against(self, recorded: AdapterDocument, place: int) -> bool:
        """Whether an adapter that the index has as accepted keeps its weights from the one at a
        place of this crawl. One that was not looked at yet may not be accepted any more."""
        other = self.place_of(recorded)
        return other is None or (other < place and self._is_there(other))

    def comes_after(self, recorded: AdapterDocument, place: int) -> bool:
        """Whether an adapter in the index is looked at by this crawl, and later than a place."""
        other = self.place_of(recorded)
        return other is not None and other > place

    def place_of(self, recorded: AdapterDocument) -> int | None:
        """The place of an adapter in the index in this crawl; None where it is not looked at."""
        return self._places.get((recorded.source, recorded.origin))

    def add(self, place: int, document: AdapterDocument) -> None:
        """One more is there. Later ones with its weights become its duplicates."""
        self._waiting[place] = document
        sha256 = document.sha256
        if document.status != "accepted" or sha256 is None:
            return
        before = self._holders.get(sha256)
        self._holders[sha256] = _Holder(place, document.id)
        if before is not None and before.place > place:
            self._make_duplicates(document.id, sha256, place)

    def final(self) -> Iterator[AdapterDocument]:
        """The documents that have become final."""
        while self._told in self._waiting:
            document = self._waiting.pop(self._told)
            self._told += 1
            yield document

    def _make_duplicates(self, holder: str, sha256: str, place: int) -> None:
        for later, other in self._waiting.items():
            has_them = other.status == "accepted" or other.reason == DUPLICATE
            if later > place and other.sha256 == sha256 and other.id != holder and has_them:
                self._waiting[later] = duplicate_of(other, holder)

    def _is_there(self, place: int) -> bool:
        return place < self._told or place in self._waiting
