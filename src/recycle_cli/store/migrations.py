"""The catalog's schema, as an ordered list of named steps that is only ever appended to."""

import sqlite3
from datetime import UTC, datetime
from typing import NamedTuple

from recycle_cli.errors import RecycleError


class Migration(NamedTuple):
    """One step of the schema: its name, under which it is recorded, and its statements."""

    name: str
    statements: tuple[str, ...]


MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        "0001_adapters",
        (
            """
            CREATE TABLE adapters (
                source TEXT NOT NULL,
                origin TEXT NOT NULL,
                id TEXT NOT NULL,
                revision TEXT,
                sha256 TEXT,
                path TEXT,
                status TEXT NOT NULL CHECK (status IN ('accepted', 'rejected', 'failed')),
                reason TEXT,
                detail TEXT,
                base_model TEXT,
                rank_min INTEGER,
                rank_max INTEGER,
                alpha REAL,
                use_rslora INTEGER,
                target_modules TEXT NOT NULL,
                license TEXT,
                size_bytes INTEGER,
                norm REAL,
                fingerprint TEXT,
                downloads INTEGER,
                stamp TEXT,
                PRIMARY KEY (source, origin)
            ) STRICT
            """,
            "CREATE INDEX adapters_by_id ON adapters (id)",
            "CREATE INDEX adapters_by_sha256 ON adapters (sha256)",
        ),
    ),
)


def migrate(connection: sqlite3.Connection) -> None:
    """Brings the schema up to date; safe when two processes do it at once.

    Each migration and its record are one transaction, so a kill leaves both or neither.

    Args:
        connection: in autocommit mode (`isolation_level=None`).

    Raises:
        RecycleError: a newer version of recycle wrote this catalog.
        sqlite3.Error: the file is no SQLite database, or cannot be written.
    """
    connection.execute(
        "CREATE TABLE IF NOT EXISTS migrations (name TEXT PRIMARY KEY, applied_at TEXT NOT NULL)"
    )
    unknown = _applied(connection) - {migration.name for migration in MIGRATIONS}
    if unknown:
        raise RecycleError(
            f"the catalog holds changes that this version does not know: {', '.join(unknown)}",
            "update recycle, or use another --home",
        )
    for migration in MIGRATIONS:
        _apply(connection, migration)


def _applied(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM migrations")}


def _apply(connection: sqlite3.Connection, migration: Migration) -> None:
    if migration.name in _applied(connection):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        # Asked again under the lock: another process may have been faster.
        if migration.name not in _applied(connection):
            for statement in migration.statements:
                connection.execute(statement)
            connection.execute(
                "INSERT INTO migrations VALUES (?, ?)",
                (migration.name, datetime.now(UTC).isoformat(timespec="seconds")),
            )
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
