"""The index: every adapter that a crawl looked at, in SQLite.

SQL stands in this package alone: here, and in what this file is made of (`recording`, `query`,
`names`, `figures`, `full_text`, `rows`, `details`).
"""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from recycle_cli.errors import InputError
from recycle_cli.records import AdapterDocument, StatsDocument
from recycle_cli.store.database import IndexFile, base_key
from recycle_cli.store.details import Details, ModuleFacts, StoredProjections, unpack_modules
from recycle_cli.store.figures import figures
from recycle_cli.store.full_text import any_of, texts_change
from recycle_cli.store.names import hint_for_unknown, names_all, readings_of, single
from recycle_cli.store.query import AdapterQuery, relevances, select, storable
from recycle_cli.store.recording import delete, hand_over, keys_where, put, put_details, unnamed
from recycle_cli.store.rows import COLUMNS, KEY, KEY_MATCHES, key_of, to_document

__all__ = ["AdapterQuery", "Catalog"]

LIKELIEST_FIRST = "status = 'accepted' DESC, recorded DESC, key DESC"


class Catalog(IndexFile):
    """The index file, open. Use it as a context manager, in one thread.

    A row stands for an adapter at a revision, vetted for a base model, its pool. Several processes
    may hold the file open: each change is one transaction, and a writer waits for another for up
    to 30 s. Every method raises RecycleError when the file cannot be used.

    Args:
        file: the SQLite file, made with its folder where absent; None keeps an empty index in
            memory.
    """

    # --- changes ---------------------------------------------------------------------------

    def record(
        self,
        document: AdapterDocument,
        stamp: str | None = None,
        details: Details | None = None,
        instead_of: Sequence[AdapterDocument] = (),
    ) -> list[str]:
        """Records an adapter; the same source, origin, revision and pool again replaces its row.

        Another revision of the same place and pool takes the place of what was accepted there:
        the older row is rejected as `superseded`, and keeps its folder. One that failed does not,
        nor one that could not be looked into, for it says nothing of the adapter. An accepted
        adapter that turns up with its id and weights at another place has moved, so the row of its
        old place goes.

        Args:
            document: what the crawl found.
            stamp: what `unchanged` shall compare, or None to have it looked at again.
            details: its card and modules; None leaves those recorded with the same weights.
            instead_of: recorded adapters that held its weights until now. They become its
                duplicates, and so do theirs.

        Returns:
            The paths of kept folders that no row names any more. They stay where they are.
        """
        with self._transaction():
            paths = put(self._connection, document, stamp, details)
            if instead_of and document.status == "accepted":
                paths += hand_over(self._connection, document, instead_of)
            return unnamed(self._connection, paths)

    def set_derived(
        self,
        document: AdapterDocument,
        norm: float,
        fingerprint: str,
        details: Details | None = None,
    ) -> None:
        """Sets what is computed from an adapter's files; None leaves the details as they are."""
        with self._changed_row(document) as key:
            self._connection.execute(
                "UPDATE adapters SET norm = ?, fingerprint = ? WHERE key = ?",
                (norm, fingerprint, key),
            )
            if details is not None and key is not None:
                put_details(self._connection, key, details)

    def set_failed(self, document: AdapterDocument, reason: str, detail: str) -> None:
        """Takes an adapter out of the pool; the next crawl looks at it again."""
        with self._changed_row(document) as key:
            self._connection.execute(
                "UPDATE adapters SET status = 'failed', path = NULL, stamp = NULL,"
                " reason = ?, detail = ? WHERE key = ?",
                (reason, detail, key),
            )

    def forget(self, name: str) -> list[AdapterDocument]:
        """Removes what `meant_by` gives for a name, and returns it. Files stay.

        Raises:
            InputError: no adapter has this name, or several do.
        """
        documents = self.meant_by(name)
        self.remove(documents)
        return documents

    def remove(self, documents: Sequence[AdapterDocument]) -> None:
        """Removes the rows of these adapters, all or none. Files stay."""
        with self._transaction():
            keys = [
                key
                for document in documents
                for key in keys_where(self._connection, KEY_MATCHES, key_of(document))
            ]
            with texts_change(self._connection, keys) as changed:
                delete(self._connection, changed)

    # --- questions -------------------------------------------------------------------------

    def unchanged(
        self,
        source: str,
        origin: str,
        stamp: str,
        revision: str | None = None,
        pool: str | None = None,
    ) -> AdapterDocument | None:
        """The document recorded for this place under this very stamp, or None; where they are
        given, at this revision and for this base model."""
        return self._first(
            "source = ? AND origin = ? AND stamp = ?"
            " AND (?4 IS NULL OR revision = ?4) AND (?5 = '' OR pool_key = ?5)",
            (source, origin, stamp, revision, base_key(pool)),
        )

    def at(
        self, source: str, origin: str, pool: str | None = None, revision: str | None = None
    ) -> AdapterDocument | None:
        """The document recorded for this place, or None: an accepted one, else the latest; of
        this base model's pool and at this revision, where they are given."""
        return self._first(
            "source = ? AND origin = ? AND (?3 = '' OR pool_key = ?3)"
            " AND (?4 IS NULL OR revision = ?4)",
            (source, origin, base_key(pool), revision),
        )

    def holder_of(self, sha256: str, other_than: str, pool: str | None = None) -> str | None:
        """The id of an accepted adapter with these weights under another id than the given; of
        this base model's pool, where it is given."""
        return next((row.id for row in self.holders_of(sha256, other_than, pool)), None)

    def holders_of(
        self, sha256: str, other_than: str, pool: str | None = None
    ) -> list[AdapterDocument]:
        """All such adapters, the latest recorded first. There is one as a rule; while a crawl is
        under way, an earlier one may be recorded before it is known which of them stays."""
        return self._documents(
            "sha256 = ? AND status = 'accepted' AND id <> ? AND (?3 = '' OR pool_key = ?3)",
            (sha256, other_than, base_key(pool)),
            LIKELIEST_FIRST,
        )

    def get(self, name: str) -> AdapterDocument:
        """The adapter of this name, whatever its status; an accepted one goes first.

        Args:
            name: an id, optionally with `@revision`; a path, of the original folder or the cached
                one; or at least 8 hex digits of the weights' sha256, `sha256:` before them or not.

        Raises:
            InputError: no adapter has this name, or several with different weights do.
        """
        document = self.find(name)
        if document is None:
            raise InputError(f"no adapter {name!r} in the index", self._hint_for_unknown(name))
        return document

    def find(self, name: str) -> AdapterDocument | None:
        """As `get`, but None where no adapter has this name.

        Raises:
            InputError: several adapters with different weights have this name, or a `sha256:`
                has fewer than 8 hex digits.
        """
        for condition, values in readings_of(name):
            rows = self._documents(condition, values, "id, origin, recorded DESC, key DESC")
            if rows:
                return single(name, rows)
        return None

    def meant_by(self, name: str) -> list[AdapterDocument]:
        """All rows that a name means. An id or an origin means all revisions and pools of its
        adapter; a revision, a kept path or a sha256 the pools of that revision.

        Raises:
            InputError: no adapter has this name, or several do.
        """
        one = self.get(name)
        revision = None if names_all(name, one) else one.revision or ""
        return self._documents(
            "source = ? AND origin = ? AND (?3 IS NULL OR revision = ?3)",
            (one.source, one.origin, revision),
        )

    def query(self, query: AdapterQuery) -> list[AdapterDocument]:
        """The adapters that a query asks for, in its order.

        Raises:
            InputError: the sort key is unknown, or is relevance without a search.
        """
        statement = select(query)
        with self._sqlite_errors():
            rows = self._connection.execute(statement.sql, statement.values)
            return [to_document(row) for row in rows]

    def relevance(self, words: Sequence[str]) -> dict[str, float]:
        """How well accepted adapters' ids, tags and cards fit some words: sha256 -> BM25, higher
        for better. Those that hold none of the words are absent."""
        expression = any_of(words)
        if expression is None:
            return {}
        with self._sqlite_errors():
            rows = self._connection.execute(*relevances(expression)).fetchall()
        return {row["sha256"]: -row["relevance"] for row in rows}

    def details_of(self, document: AdapterDocument) -> Details:
        """The card and the modules of a recorded adapter; empty where nobody read them."""
        with self._sqlite_errors():
            row = self._connection.execute(
                "SELECT card, paths, ranks, norms, projections FROM details"
                " LEFT JOIN module_sets ON module_sets.key = modules"
                f" WHERE adapter = (SELECT key FROM adapters WHERE {KEY_MATCHES})",
                key_of(document),
            ).fetchone()
        return _to_details(row) if row is not None else Details()

    def revisions_of(self, document: AdapterDocument) -> list[AdapterDocument]:
        """The other rows of an adapter: revisions and pools, the latest recorded first."""
        rows = self._documents(
            "source = ? AND id = ?", (document.source, document.id), "recorded DESC, key DESC"
        )
        return [row for row in rows if key_of(row) != key_of(document)]

    def lacking_derived(self) -> list[AdapterDocument]:
        """Accepted adapters whose norm, fingerprint or modules are not known yet."""
        return self._documents(
            "status = 'accepted' AND (norm IS NULL OR fingerprint IS NULL OR NOT EXISTS"
            " (SELECT 1 FROM details WHERE adapter = adapters.key AND modules IS NOT NULL))",
            (),
        )

    def kept(self, sha256: str | None = None) -> list[AdapterDocument]:
        """Every adapter that has a folder, superseded ones too; with these weights, if given."""
        condition = "path IS NOT NULL AND sha256 IS NOT NULL"
        if sha256 is None:
            return self._documents(condition, ())
        return self._documents(f"{condition} AND sha256 = ?", (sha256,))

    def projections(self) -> dict[tuple[str, ...], StoredProjections]:
        """What `duplicates` compares, by `row_key`; of accepted adapters."""
        with self._sqlite_errors():
            rows = self._connection.execute(
                f"SELECT {', '.join(KEY)}, modules, ranks, projections FROM adapters"
                " JOIN details ON adapter = key WHERE status = 'accepted' AND modules IS NOT NULL"
            )
            return {tuple(row)[:4]: StoredProjections(*tuple(row)[4:]) for row in rows}

    def module_paths(self) -> dict[int, list[str]]:
        """The paths of every set of modules, sorted."""
        with self._sqlite_errors():
            rows = self._connection.execute("SELECT key, paths FROM module_sets")
            return {key: json.loads(paths) for key, paths in rows}

    def statistics(
        self, base_model: str | None = None, reasons_in_order: Sequence[str] = ()
    ) -> StatsDocument:
        """The index in figures; histograms, sizes and norms are of accepted adapters.

        Args:
            base_model: count only adapters of this base model's pool, under any of its names.
            reasons_in_order: the reason codes in the order of the checks that give them.
        """
        with self._reading():
            return figures(self._connection, base_key(base_model), reasons_in_order)

    # --- the connection --------------------------------------------------------------------

    def _documents(
        self, condition: str, values: Sequence[Any], order: str = "id, origin, recorded DESC"
    ) -> list[AdapterDocument]:
        with self._sqlite_errors():
            rows = self._connection.execute(
                f"SELECT {', '.join(COLUMNS)} FROM adapters WHERE {condition} ORDER BY {order}",
                tuple(map(storable, values)),
            )
            return [to_document(row) for row in rows]

    def _first(self, condition: str, values: Sequence[Any]) -> AdapterDocument | None:
        rows = self._documents(condition, values, f"{LIKELIEST_FIRST} LIMIT 1")
        return rows[0] if rows else None

    @contextmanager
    def _changed_row(self, document: AdapterDocument) -> Iterator[int | None]:
        """A transaction that changes a row; its key, or None where it has gone."""
        with self._transaction():
            keys = keys_where(self._connection, KEY_MATCHES, dict(key_of(document)))
            with texts_change(self._connection, keys):
                yield keys[0] if keys else None

    def _hint_for_unknown(self, name: str) -> str:
        with self._sqlite_errors():
            rows = self._connection.execute("SELECT DISTINCT id FROM adapters").fetchall()
        return hint_for_unknown(name, [row["id"] for row in rows])

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One state of the index for several questions, whoever writes meanwhile."""
        with self._sqlite_errors():
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")


def _to_details(row: sqlite3.Row) -> Details:
    modules: dict[str, ModuleFacts] = {}
    if row["paths"] is not None:
        modules = unpack_modules(row["paths"], row["ranks"], row["norms"], row["projections"])
    return Details(row["card"], modules)
