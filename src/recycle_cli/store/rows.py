"""Rows of the index, and the documents that they stand for."""

import json
import sqlite3
from typing import Any

from recycle_cli.records import AdapterDocument, RankRange
from recycle_cli.store.database import base_key

LISTS = ("target_modules", "tags")
"""Kept as JSON."""
EMPTY_FOR_NONE = ("revision", "pool")
PLAIN_COLUMNS = tuple(
    name for name in AdapterDocument.model_fields if name != "rank" and name not in LISTS
)
COLUMNS = (*PLAIN_COLUMNS, *LISTS, "rank_min", "rank_max")
KEY = ("source", "origin", "revision", "pool_key")
"""What tells rows apart: the base model that an adapter was vetted for is part of it."""
KEY_MATCHES = " AND ".join(f"{name} = :{name}" for name in KEY)


def to_row(document: AdapterDocument) -> dict[str, Any]:
    """Column -> value, of all columns but `key` and `stamp`."""
    rank = document.rank
    return {
        **{name: getattr(document, name) for name in PLAIN_COLUMNS},
        **{name: getattr(document, name) or "" for name in EMPTY_FOR_NONE},
        **{name: json.dumps(getattr(document, name), ensure_ascii=False) for name in LISTS},
        "rank_min": rank.min if rank else None,
        "rank_max": rank.max if rank else None,
        "pool_key": base_key(document.pool),
        "base_key": base_key(document.pool or document.base_model),
    }


def key_of(document: AdapterDocument) -> dict[str, str]:
    """The values for KEY_MATCHES."""
    return {
        "source": document.source,
        "origin": document.origin,
        "revision": document.revision or "",
        "pool_key": base_key(document.pool),
    }


def row_key(document: AdapterDocument) -> tuple[str, ...]:
    """The same, to tell rows apart by, in the order of KEY."""
    return tuple(key_of(document).values())


def to_document(row: sqlite3.Row) -> AdapterDocument:
    """The document of a row with COLUMNS. It is not validated again: it was, going in."""
    fields = {name: row[name] for name in PLAIN_COLUMNS}
    for name in EMPTY_FOR_NONE:
        fields[name] = fields[name] or None
    for name in LISTS:
        fields[name] = json.loads(row[name])
    if fields["use_rslora"] is not None:
        fields["use_rslora"] = bool(fields["use_rslora"])
    if row["rank_min"] is not None:
        fields["rank"] = RankRange.model_construct(min=row["rank_min"], max=row["rank_max"])
    return AdapterDocument.model_construct(**fields)
