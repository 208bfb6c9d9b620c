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
    Migration(
        "0002_pools_and_hub_facts",
        (
            "ALTER TABLE adapters RENAME TO adapters_0001",
            "DROP INDEX adapters_by_id",
            "DROP INDEX adapters_by_sha256",
            # Nothing stands for no revision and no pool, which NULL could not: it differs from
            # itself in a UNIQUE. `pool_key` and `base_key` are names as they are compared;
            # `base_key` is that of the pool, or of the base model that the adapter names.
            # `recorded` is in seconds since 1970.
            """
            CREATE TABLE adapters (
                key INTEGER PRIMARY KEY,
                source TEXT NOT NULL,
                origin TEXT NOT NULL,
                revision TEXT NOT NULL,
                pool TEXT NOT NULL,
                pool_key TEXT NOT NULL,
                id TEXT NOT NULL,
                sha256 TEXT,
                path TEXT,
                status TEXT NOT NULL CHECK (status IN ('accepted', 'rejected', 'failed')),
                reason TEXT,
                detail TEXT,
                base_model TEXT,
                base_key TEXT NOT NULL,
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
                author TEXT,
                likes INTEGER,
                created_at TEXT,
                last_modified TEXT,
                tags TEXT NOT NULL,
                stamp TEXT,
                recorded REAL NOT NULL,
                UNIQUE (source, origin, revision, pool_key)
            ) STRICT
            """,
            # A row that was refused for its base model was vetted for another one, nobody knows
            # which.
            """
            INSERT INTO adapters (
                source, origin, revision, pool, pool_key, id, sha256, path, status, reason, detail,
                base_model, base_key, rank_min, rank_max, alpha, use_rslora, target_modules,
                license, size_bytes, norm, fingerprint, downloads, tags, stamp,
                recorded
            )
            SELECT
                source, origin, coalesce(revision, ''), pool, base_key(pool), id, sha256, path,
                status, reason, detail, base_model, base_key(base_model), rank_min, rank_max,
                alpha, use_rslora, target_modules, license, size_bytes, norm, fingerprint,
                downloads, '[]', stamp, 0.0
            FROM (
                SELECT *, CASE
                    WHEN reason IN ('wrong_base', 'unknown_base') THEN ''
                    ELSE coalesce(base_model, '')
                END AS pool
                FROM adapters_0001
            )
            """,
            "DROP TABLE adapters_0001",
            "CREATE INDEX adapters_by_id ON adapters (id)",
            "CREATE INDEX adapters_by_sha256 ON adapters (sha256)",
        ),
    ),
    Migration(
        "0003_details",
        (
            # Most adapters of a base model adapt the same modules, so a list of paths is kept
            # once; `paths` is JSON.
            """
            CREATE TABLE module_sets (
                key INTEGER PRIMARY KEY,
                digest TEXT NOT NULL UNIQUE,
                paths TEXT NOT NULL
            ) STRICT
            """,
            # Little-endian arrays in the order of the paths: `ranks` int32, `norms` float64,
            # `projections` float32, those of the first module first.
            """
            CREATE TABLE details (
                adapter INTEGER PRIMARY KEY REFERENCES adapters (key) ON DELETE CASCADE,
                card TEXT NOT NULL,
                modules INTEGER REFERENCES module_sets (key),
                ranks BLOB,
                norms BLOB,
                projections BLOB
            ) STRICT
            """,
        ),
    ),
    Migration(
        "0004_full_text",
        (
            """
            CREATE VIEW searchable AS
            SELECT key, id, tags, coalesce(detail, '') AS detail, coalesce(card, '') AS card
            FROM adapters LEFT JOIN details ON details.adapter = adapters.key
            """,
            """
            CREATE VIRTUAL TABLE texts USING fts5 (
                id, tags, detail, card,
                content = 'searchable', content_rowid = 'key',
                tokenize = 'unicode61 remove_diacritics 2'
            )
            """,
            "INSERT INTO texts (rowid, id, tags, detail, card) SELECT * FROM searchable",
        ),
    ),
    Migration(
        "0005_answers",
        (
            # Of one adapter in one context (see `store.answers`) all rows in one BLOB, since they
            # are read and written together: for each a digest, right or wrong, a likelihood.
            """
            CREATE TABLE answers (
                context TEXT NOT NULL,
                adapter TEXT NOT NULL,
                answers BLOB NOT NULL,
                PRIMARY KEY (context, adapter)
            ) STRICT
            """,
        ),
    ),
)


def migrate(connection: sqlite3.Connection) -> None:
    """Brings the schema up to date; safe when two processes do it at once.

    Each migration and its record are one transaction, so a kill leaves both or neither.

    Args:
        connection: in autocommit mode (`isolation_level=None`), with the function `base_key`, which
            makes of a base model's name (or NULL) the text that such names are compared by.

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
