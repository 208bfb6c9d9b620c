"""The index: every adapter that a crawl looked at, in SQLite. The only place with SQL."""

import difflib
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from recycle_cli.errors import InputError, RecycleError, unknown_name
from recycle_cli.records import AdapterDocument, AdapterStatus, StatsDocument
from recycle_cli.store.database import IN_MEMORY, connect

MIN_PREFIX = 8
SHA256_PREFIX = "sha256:"
HEX = re.compile(r"[0-9a-f]+")
MAX_CANDIDATES = 10
UNKNOWN = "unknown"

PLAIN_COLUMNS = tuple(
    name for name in AdapterDocument.model_fields if name not in {"rank", "target_modules"}
)
COLUMNS = (*PLAIN_COLUMNS, "rank_min", "rank_max", "target_modules")

SORT_KEYS = {
    "id": "id",
    "rank": "rank_max",
    "norm": "norm",
    "size": "size_bytes",
    "downloads": "downloads",
    "license": "license",
}


@dataclass(frozen=True)
class AdapterQuery:
    """Which adapters to list; None asks nothing.

    Args:
        base_model: adapters of this base model, under any of its names.
        license: this licence, whatever its case.
        min_rank: every module has at least this rank.
        max_rank: every module has at most this rank.
        target_module: a module name that the adapter changes, as in `q_proj`.
        search: text that the id, origin, base model, licence or detail holds, whatever its case.
        status: "accepted", "rejected" or "failed".
        sort: a key of SORT_KEYS; with a `-` before it, the largest first. Unknown values and ties
            come last and by id.
        limit: at most this many.
    """

    base_model: str | None = None
    license: str | None = None
    min_rank: int | None = None
    max_rank: int | None = None
    target_module: str | None = None
    search: str | None = None
    status: AdapterStatus | None = "accepted"
    sort: str = "id"
    limit: int | None = None


class Catalog:
    """The index file, open. Use it as a context manager, in one thread.

    Several processes may hold it open: each change is one transaction, and a writer waits for
    another for up to 30 s. Every method raises RecycleError when the file cannot be used.

    Args:
        file: the SQLite file, made with its folder where absent; None keeps an empty index in
            memory.
    """

    def __init__(self, file: Path | None) -> None:
        self._name = str(file) if file is not None else IN_MEMORY
        with self._sqlite_errors():
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
            self._connection = connect(self._name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Nothing is pending: every change was committed when it was made."""
        self._connection.close()

    # --- changes ---------------------------------------------------------------------------

    def record(self, document: AdapterDocument, stamp: str | None = None) -> None:
        """Records an adapter; the same source and origin seen again replaces its row.

        An accepted adapter that turns up with its id and weights at another place has moved, so
        the row of its old place goes.

        Args:
            document: what the crawl found.
            stamp: what `unchanged` shall compare, or None to have it looked at again.
        """
        row = {**_to_row(document), "stamp": stamp}
        names, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
        with self._transaction():
            if document.status == "accepted":
                self._connection.execute(
                    "DELETE FROM adapters WHERE source = :source AND id = :id"
                    " AND sha256 = :sha256 AND revision IS :revision AND origin <> :origin",
                    row,
                )
            self._connection.execute(
                f"INSERT OR REPLACE INTO adapters ({names}) VALUES ({marks})", row
            )

    def set_derived(self, document: AdapterDocument, norm: float, fingerprint: str) -> None:
        """Sets the columns that are computed from an adapter's tensors."""
        with self._transaction():
            self._connection.execute(
                "UPDATE adapters SET norm = ?, fingerprint = ? WHERE source = ? AND origin = ?",
                (norm, fingerprint, document.source, document.origin),
            )

    def set_failed(self, document: AdapterDocument, reason: str, detail: str) -> None:
        """Takes an adapter out of the pool; the next crawl looks at it again."""
        with self._transaction():
            self._connection.execute(
                "UPDATE adapters SET status = 'failed', path = NULL, stamp = NULL,"
                " reason = ?, detail = ? WHERE source = ? AND origin = ?",
                (reason, detail, document.source, document.origin),
            )

    def forget(self, name: str) -> AdapterDocument:
        """Removes an adapter from the index and returns what it held. Files stay.

        Raises:
            InputError: no adapter has this name, or several do.
        """
        document = self.get(name)
        with self._transaction():
            self._connection.execute(
                "DELETE FROM adapters WHERE source = ? AND origin = ?",
                (document.source, document.origin),
            )
        return document

    # --- questions -------------------------------------------------------------------------

    def unchanged(self, source: str, origin: str, stamp: str) -> AdapterDocument | None:
        """The document recorded for this place under this very stamp, or None."""
        rows = self._documents("source = ? AND origin = ? AND stamp = ?", (source, origin, stamp))
        return rows[0] if rows else None

    def at(self, source: str, origin: str) -> AdapterDocument | None:
        """The document recorded for this place, or None."""
        rows = self._documents("source = ? AND origin = ?", (source, origin))
        return rows[0] if rows else None

    def holder_of(self, sha256: str, other_than: str) -> str | None:
        """The id of an accepted adapter with these weights under another id than the given."""
        rows = self._documents(
            "sha256 = ? AND status = 'accepted' AND id <> ?", (sha256, other_than)
        )
        return rows[0].id if rows else None

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
        for condition, values in _readings_of(name):
            rows = self._documents(condition, values)
            if rows:
                return _single(name, rows)
        return None

    def query(self, query: AdapterQuery) -> list[AdapterDocument]:
        """The adapters that a query asks for, in its order.

        Raises:
            InputError: the sort key is unknown.
        """
        key = query.sort.removeprefix("-")
        if key not in SORT_KEYS:
            raise unknown_name("sort key", key, SORT_KEYS)
        conditions = _conditions(query)
        direction = "DESC" if query.sort.startswith("-") else "ASC"
        return self._documents(
            " AND ".join(conditions) or "TRUE",
            tuple(value for values in conditions.values() for value in values),
            f"{SORT_KEYS[key]} {direction} NULLS LAST, id, origin",
            query.limit,
        )

    def statistics(self, base_model: str | None = None) -> StatsDocument:
        """The index in figures; histograms, sizes and norms are of accepted adapters.

        Args:
            base_model: count only adapters of this base model, under any of its names.
        """
        rows = self.query(AdapterQuery(base_model=base_model, status=None))
        pool = [row for row in rows if row.status == "accepted"]
        norms = [row.norm for row in pool if row.norm is not None]
        return StatsDocument(
            adapters=len(pool),
            counts=_histogram(row.status for row in rows),
            reasons=_histogram(row.reason for row in rows if row.reason is not None),
            base_models=_histogram(row.base_model for row in pool),
            ranks=_histogram(str(row.rank.max) for row in pool if row.rank is not None),
            licenses=_histogram(row.license for row in pool),
            target_modules=_histogram(name for row in pool for name in row.target_modules),
            size_bytes=sum(row.size_bytes or 0 for row in pool),
            norm={"min": min(norms), "median": median(norms), "max": max(norms)} if norms else None,
        )

    # --- the connection --------------------------------------------------------------------

    def _documents(
        self,
        condition: str,
        values: Sequence[Any],
        order: str = "id, origin",
        limit: int | None = None,
    ) -> list[AdapterDocument]:
        with self._sqlite_errors():
            rows = self._connection.execute(
                f"SELECT {', '.join(COLUMNS)} FROM adapters WHERE {condition}"
                f" ORDER BY {order} LIMIT ?",
                (*values, -1 if limit is None else limit),
            ).fetchall()
        return [_to_document(row) for row in rows]

    def _hint_for_unknown(self, name: str) -> str:
        ids = [row.id for row in self._documents("TRUE", ())]
        near = difflib.get_close_matches(name, ids, n=3, cutoff=0.5)
        if near:
            return f"did you mean {' or '.join(near)}?"
        return f"the index knows {len(ids)} adapters: recycle index list; recycle crawl adds more"

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._sqlite_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _sqlite_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise RecycleError(
                f"the index {self._name} cannot be used: {error}",
                "check the disk and its permissions; a damaged file can be moved away, "
                "and crawling again makes a new one",
            ) from error


def _to_row(document: AdapterDocument) -> dict[str, Any]:
    rank = document.rank
    return {
        **{name: getattr(document, name) for name in PLAIN_COLUMNS},
        "rank_min": rank.min if rank else None,
        "rank_max": rank.max if rank else None,
        "target_modules": json.dumps(document.target_modules),
    }


def _to_document(row: sqlite3.Row) -> AdapterDocument:
    fields = {name: row[name] for name in PLAIN_COLUMNS}
    if row["rank_min"] is not None:
        fields["rank"] = {"min": row["rank_min"], "max": row["rank_max"]}
    fields["target_modules"] = json.loads(row["target_modules"])
    return AdapterDocument.model_validate(fields)


def _readings_of(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What a name may mean, the likeliest first, as conditions and their values."""
    if name.startswith(SHA256_PREFIX):
        digits = name.removeprefix(SHA256_PREFIX).lower()
        if len(digits) < MIN_PREFIX or not HEX.fullmatch(digits):
            raise InputError(
                f"{name!r} is no sha256", f"give at least {MIN_PREFIX} hex digits after sha256:"
            )
        yield "sha256 GLOB ?", (digits + "*",)
        return
    yield "id = ?", (name,)
    plain, at, revision = name.rpartition("@")
    if at:
        yield "id = ? AND revision = ?", (plain, revision)
    path = str(Path(name).expanduser().absolute())
    yield "origin = ? OR path = ?", (path, path)
    resolved = str(Path(name).expanduser().resolve())
    yield "origin = ? OR path = ?", (resolved, resolved)
    if len(name) >= MIN_PREFIX and HEX.fullmatch(name.lower()):
        yield "sha256 GLOB ?", (name.lower() + "*",)


def _single(name: str, rows: list[AdapterDocument]) -> AdapterDocument:
    """The one adapter meant, of those that a name fits.

    Rejected duplicates share the digest of an accepted adapter and do not compete with it.
    """
    rows = [row for row in rows if row.status == "accepted"] or rows
    if len({row.sha256 or row.origin for row in rows}) > 1:
        named = [f"{_digest(row)} ({row.id}, {row.origin})" for row in rows[:MAX_CANDIDATES]]
        raise InputError(
            f"{name!r} fits {len(rows)} adapters", f"name one of them: {'; '.join(named)}"
        )
    return rows[0]


def _digest(row: AdapterDocument) -> str:
    return f"{SHA256_PREFIX}{row.sha256[:16]}" if row.sha256 else "no digest"


def _conditions(query: AdapterQuery) -> dict[str, tuple[Any, ...]]:
    """SQL condition -> its values, for what a query asks."""
    text = query.search or ""
    searched = ("id", "origin", "base_model", "license", "detail")
    asked: list[tuple[Any, str, tuple[Any, ...]]] = [
        (query.base_model, "same_base_model(base_model, ?)", (query.base_model,)),
        (query.license, "lower(license) = lower(?)", (query.license,)),
        (query.min_rank, "rank_min >= ?", (query.min_rank,)),
        (query.max_rank, "rank_max <= ?", (query.max_rank,)),
        (
            query.target_module,
            "EXISTS (SELECT 1 FROM json_each(target_modules) WHERE value = ?)",
            (query.target_module,),
        ),
        (
            query.search,
            f"({' OR '.join(f'instr(lower({name}), lower(?))' for name in searched)})",
            (text,) * len(searched),
        ),
        (query.status, "status = ?", (query.status,)),
    ]
    return {condition: values for value, condition, values in asked if value is not None}


def _histogram(values: Iterable[str | None]) -> dict[str, int]:
    """Value -> count, the commonest first."""
    return dict(Counter(value or UNKNOWN for value in values).most_common())
