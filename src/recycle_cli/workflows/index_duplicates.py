"""`recycle index duplicates`: adapters that are the same or nearly so."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recycle_cli.records import AdapterDocument, Duplicate, DuplicatesDocument
from recycle_cli.settings import Settings
from recycle_cli.store.catalog import AdapterQuery
from recycle_cli.store.names import SUPERSEDED
from recycle_cli.store.rows import row_key
from recycle_cli.workflows.index import open_index

if TYPE_CHECKING:
    from recycle_cli.store.details import StoredProjections
    from recycle_cli.store.duplicates import Group

Key = tuple[str, ...]


@dataclass(frozen=True)
class Duplicates:
    """The groups found, and how many accepted adapters have no projections to be compared by."""

    groups: list[DuplicatesDocument]
    not_compared: int


def find_duplicates(
    settings: Settings, threshold: float, base_model: str | None = None
) -> Duplicates:
    """Looks for duplicates among the adapters of each base model.

    Those refused as duplicates stand in the groups of identical ones too. An adapter leads its
    group that is accepted before one that is not, then the one downloaded most, then the oldest.

    Args:
        settings: where the index is.
        threshold: the least cosine of near ones, in (0, 1].
        base_model: look among adapters of this base model only.

    Raises:
        RecycleError: the index cannot be used.
    """
    with open_index(settings) as catalog:
        rows = catalog.query(AdapterQuery(base_model=base_model, status=None))
        projections, paths = catalog.projections(), catalog.module_paths()
    rows = sorted((row for row in rows if row.reason != SUPERSEDED), key=_leads)
    pools: dict[str | None, list[AdapterDocument]] = {}
    for row in rows:
        pools.setdefault(_base(row), []).append(row)
    accepted = [row for row in rows if row.status == "accepted"]
    return Duplicates(
        [
            _told(group, pool, threshold)
            for pool in pools.values()
            for group in _groups(pool, projections, paths, threshold)
        ],
        sum(row_key(row) not in projections for row in accepted),
    )


def _leads(row: AdapterDocument) -> tuple[object, ...]:
    return row.status != "accepted", -(row.downloads or 0), row.created_at or "~", row.id


def _base(row: AdapterDocument) -> str | None:
    from recycle_cli.store.database import base_key

    return base_key(row.pool or row.base_model) or None


def _groups(
    pool: Sequence[AdapterDocument],
    projections: Mapping[Key, "StoredProjections"],
    paths: Mapping[int, Sequence[str]],
    threshold: float,
) -> "Iterator[Group]":
    from recycle_cli.store.duplicates import identical_groups, similar_groups

    places = {(row.source, row.origin, row.sha256): n for n, row in reversed(list(enumerate(pool)))}
    first = set(places.values())
    yield from identical_groups([row.sha256 if n in first else None for n, row in enumerate(pool)])
    files: set[str | None] = set()
    compared = {}
    for place, row in enumerate(pool):
        stored = projections.get(row_key(row))
        if stored is not None and row.sha256 not in files:
            files.add(row.sha256)
            compared[place] = stored
    yield from similar_groups(compared, paths, threshold)


def _told(group: "Group", pool: Sequence[AdapterDocument], threshold: float) -> DuplicatesDocument:
    members = [pool[place] for place in group.places]
    return DuplicatesDocument(
        relation=group.relation,
        base_model=members[0].pool or members[0].base_model,
        threshold=threshold,
        adapters=[
            Duplicate(
                **row.model_dump(include=set(Duplicate.model_fields) - {"cosine"}), cosine=cosine
            )
            for row, cosine in zip(members, group.cosines, strict=True)
        ],
    )
