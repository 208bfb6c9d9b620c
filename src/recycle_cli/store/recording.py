"""How an adapter comes into the index: its row, its details, and what becomes of older rows.

Everything here needs a transaction.
"""

import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recycle_cli.records import AdapterDocument
from recycle_cli.store.details import Details, pack_modules
from recycle_cli.store.full_text import texts_change
from recycle_cli.store.holders import DUPLICATE, duplicate_of
from recycle_cli.store.names import SUPERSEDED
from recycle_cli.store.rows import COLUMNS, KEY, KEY_MATCHES, key_of, to_document, to_row

MAY_CHANGE = ("gated", "not_found", "disabled")
"""Refusals that hang on who asks, and when, and say nothing of the adapter."""
SHA256_DIGITS = 64
SAME_PLACE = "source = :source AND origin = :origin"
# The plus keeps SQLite from looking through all of a source instead of asking for the sha256.
MOVED = (
    "+source = :source AND +id = :id AND sha256 = :sha256 AND revision = :revision"
    " AND pool_key = :pool_key AND origin <> :origin AND :status = 'accepted'"
)
WITHOUT_POOL = f"{SAME_PLACE} AND revision = :revision AND pool_key = '' AND :pool_key <> ''"


def put(
    connection: sqlite3.Connection,
    document: AdapterDocument,
    stamp: str | None,
    details: Details | None,
) -> list[str]:
    """Puts an adapter in, as `Catalog.record` describes it; gives the paths that rows of its place
    had."""
    row = {**to_row(document), "stamp": stamp, "recorded": time.time()}
    outdated = [
        key for which in (MOVED, WITHOUT_POOL) for key in keys_where(connection, which, row)
    ]
    touched = [*outdated, *keys_where(connection, SAME_PLACE, row)]
    paths = _paths_of(connection, touched)
    with texts_change(connection, touched) as changed:
        delete(connection, outdated)
        if document.status != "failed" and document.reason not in MAY_CHANGE:
            _supersede(connection, row)
        changed.append(_put_row(connection, row, details))
    return paths


def hand_over(
    connection: sqlite3.Connection, holder: AdapterDocument, former: Sequence[AdapterDocument]
) -> list[str]:
    """Makes adapters with the weights of another one its duplicates, and theirs too; gives the
    paths that they had."""
    condition = (
        f"sha256 = :sha256 AND pool_key = :pool_key AND id <> :id AND reason = '{DUPLICATE}'"
    )
    keys = keys_where(connection, condition, to_row(holder))
    for one in former:
        keys += keys_where(connection, KEY_MATCHES, key_of(one))
    with texts_change(connection, keys):
        for key in keys:
            row = connection.execute(
                f"SELECT {', '.join(COLUMNS)}, stamp, recorded FROM adapters WHERE key = ?", (key,)
            ).fetchone()
            document = duplicate_of(to_document(row), holder.id)
            kept = {"stamp": row["stamp"], "recorded": row["recorded"]}
            _put_row(connection, {**to_row(document), **kept}, None)
            connection.execute("DELETE FROM details WHERE adapter = ?", (key,))
    return [one.path for one in former if one.path is not None]


def unnamed(connection: sqlite3.Connection, paths: Sequence[str]) -> list[str]:
    """Those of some paths of kept folders that no row has."""
    asked = "SELECT 1 FROM adapters WHERE sha256 = ? AND path = ?"
    return [
        path
        for path in dict.fromkeys(paths)
        if connection.execute(asked, (Path(path).name[:SHA256_DIGITS], path)).fetchone() is None
    ]


def put_details(connection: sqlite3.Connection, key: int, details: Details) -> None:
    """Sets the details of a row."""
    connection.execute(
        "INSERT OR REPLACE INTO details (adapter, card) VALUES (?, ?)", (key, details.card)
    )
    if not details.modules:
        return
    packed = pack_modules(details.modules)
    connection.execute(
        "INSERT OR IGNORE INTO module_sets (digest, paths) VALUES (?, ?)",
        (packed.digest, packed.paths),
    )
    connection.execute(
        "UPDATE details SET ranks = ?, norms = ?, projections = ?,"
        " modules = (SELECT key FROM module_sets WHERE digest = ?) WHERE adapter = ?",
        (packed.ranks, packed.norms, packed.projections, packed.digest, key),
    )


def keys_where(
    connection: sqlite3.Connection, condition: str, values: Mapping[str, Any]
) -> list[int]:
    """The keys of rows, by a condition on named values."""
    found = connection.execute(f"SELECT key FROM adapters WHERE {condition}", values)
    return [key for (key,) in found]


def delete(connection: sqlite3.Connection, keys: Sequence[int]) -> None:
    """Deletes rows with their details."""
    if not keys:  # SQLite would look through all rows for none
        return
    connection.execute(f"DELETE FROM adapters WHERE key IN ({', '.join(map(str, keys))})")


def _paths_of(connection: sqlite3.Connection, keys: Sequence[int]) -> list[str]:
    chosen = ", ".join(map(str, keys))
    found = connection.execute(
        f"SELECT path FROM adapters WHERE key IN ({chosen}) AND path IS NOT NULL"
    )
    return [path for (path,) in found]


def _supersede(connection: sqlite3.Connection, row: Mapping[str, Any]) -> None:
    sentence = f"revision {row['revision'] or 'without a name'} took its place"
    # Without a stamp it is looked at again where somebody asks for that very revision.
    connection.execute(
        "UPDATE adapters SET status = 'rejected', reason = :code, detail = :sentence, stamp = NULL"
        f" WHERE {SAME_PLACE} AND status = 'accepted' AND pool_key = :pool_key"
        " AND revision <> :revision",
        {**row, "code": SUPERSEDED, "sentence": sentence},
    )


def _put_row(
    connection: sqlite3.Connection, row: Mapping[str, Any], details: Details | None
) -> int:
    before = connection.execute(
        f"SELECT key, sha256 FROM adapters WHERE {KEY_MATCHES}", row
    ).fetchone()
    names, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
    changes = ", ".join(f"{name} = excluded.{name}" for name in row if name not in KEY)
    key: int
    (key,) = connection.execute(
        f"INSERT INTO adapters ({names}) VALUES ({marks})"
        f" ON CONFLICT ({', '.join(KEY)}) DO UPDATE SET {changes} RETURNING key",
        row,
    ).fetchone()
    if details is not None:
        put_details(connection, key, details)
    elif before is not None and before["sha256"] != row["sha256"]:
        connection.execute("DELETE FROM details WHERE adapter = ?", (key,))
    return key
