"""Which adapters a listing asks for, and the SQL that asks."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from recycle_cli.errors import InputError, unknown_name
from recycle_cli.records import AdapterStatus
from recycle_cli.store.database import base_key
from recycle_cli.store.full_text import WEIGHTS, match_expression
from recycle_cli.store.rows import COLUMNS

RELEVANCE = "relevance"
SORT_KEYS = {
    "id": "id",
    "rank": "rank_max",
    "norm": "norm",
    "size": "size_bytes",
    "downloads": "downloads",
    "likes": "likes",
    "license": "license",
    "created": "created_at",
    "modified": "last_modified",
    RELEVANCE: RELEVANCE,
}
LARGEST = 2**63 - 1
SEARCHED = ("id", "origin", "base_model", "license", "reason", "detail")
RANKED = (
    "WITH ranked (found, relevance) AS MATERIALIZED ("
    f" SELECT rowid, bm25(texts, {', '.join(map(str, WEIGHTS))}) FROM texts WHERE texts MATCH ?)"
)
# An adapter may state several.
ONE_LICENSE = "instr(', ' || lower(license) || ', ', ', ' || lower(?) || ', ')"
JOINED = " LEFT JOIN ranked ON found = adapters.key"


@dataclass(frozen=True)
class AdapterQuery:
    """Which adapters to list; None asks nothing.

    Args:
        base_model: adapters vetted for this base model, under any of its names; where that is not
            known, adapters that name it as theirs.
        license: this licence, whatever its case, among those that the adapter states.
        author: this author, whatever the case.
        source: "hub" or "folder".
        min_rank: every module has at least this rank.
        max_rank: every module has at most this rank.
        target_module: a module name that the adapter changes, as in `q_proj`.
        search: words that id, tags, detail and card hold together (see `match_expression`), or
            text that the id, origin, base model, licence, reason or detail holds, in any case.
        status: "accepted", "rejected" or "failed".
        sort: a key of SORT_KEYS; with a `-` before it, the largest first. Unknown values and ties
            come last and by id. None sorts a search by relevance, the best first, all else by id.
        limit: at most this many.
    """

    base_model: str | None = None
    license: str | None = None
    author: str | None = None
    source: Literal["hub", "folder"] | None = None
    min_rank: int | None = None
    max_rank: int | None = None
    target_module: str | None = None
    search: str | None = None
    status: AdapterStatus | None = "accepted"
    sort: str | None = None
    limit: int | None = None


class Selection(NamedTuple):
    """A statement and the values of its marks."""

    sql: str
    values: tuple[Any, ...]


def select(query: AdapterQuery) -> Selection:
    """The statement that lists what a query asks for.

    Raises:
        InputError: the sort key is unknown, or is relevance where nothing is searched for.
    """
    expression = match_expression(query.search or "")
    by_relevance = _sort_key(query) == RELEVANCE and expression is not None
    conditions = _conditions(query, expression)
    values: list[Any] = [expression] * by_relevance
    for more in conditions.values():
        values += more
    values.append(-1 if query.limit is None else query.limit)
    return Selection(
        f"{RANKED * by_relevance} SELECT {', '.join(COLUMNS)} FROM adapters{JOINED * by_relevance}"
        f" WHERE {' AND '.join(conditions) or 'TRUE'}"
        f" ORDER BY {_order(query, expression)} LIMIT ?",
        tuple(map(storable, values)),
    )


def relevances(expression: str) -> Selection:
    """The statement that lists the accepted adapters which an expression of FTS5 finds: their
    sha256 and BM25, the best of each first. As SQLite has it, lower is better."""
    return Selection(
        f"{RANKED} SELECT sha256, min(relevance) AS relevance FROM adapters{JOINED}"
        " WHERE status = 'accepted' AND found IS NOT NULL GROUP BY sha256",
        (expression,),
    )


def storable(value: Any) -> Any:
    """A value that SQLite takes: what a terminal passed on that is no text becomes question
    marks, and a number beyond its own the largest."""
    if isinstance(value, int):
        return min(value, LARGEST)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def _conditions(query: AdapterQuery, expression: str | None) -> dict[str, tuple[Any, ...]]:
    """SQL condition -> its values, for what a query asks."""
    asked: list[tuple[Any, str, tuple[Any, ...]]] = [
        (query.base_model, "base_key = ?", (base_key(query.base_model),)),
        (query.license, ONE_LICENSE, (query.license,)),
        (query.author, "lower(author) = lower(?)", (query.author,)),
        (query.source, "source = ?", (query.source,)),
        (query.min_rank, "rank_min >= ?", (query.min_rank,)),
        (query.max_rank, "rank_max <= ?", (query.max_rank,)),
        (
            query.target_module,
            "EXISTS (SELECT 1 FROM json_each(target_modules) WHERE value = ?)",
            (query.target_module,),
        ),
        (query.search, *_searched(query.search, expression)),
        (query.status, "status = ?", (query.status,)),
    ]
    return {condition: values for value, condition, values in asked if value is not None}


def _searched(text: str | None, expression: str | None) -> tuple[str, tuple[Any, ...]]:
    tests = [f"instr(lower({name}), lower(?))" for name in SEARCHED]
    values = (text,) * len(SEARCHED)
    if expression is not None:
        # Not over the join: with another order, SQLite would look through it for every row.
        tests.append("key IN (SELECT rowid FROM texts WHERE texts MATCH ?)")
        values += (expression,)
    return f"({' OR '.join(tests)})", values


def _sort_key(query: AdapterQuery) -> str:
    sort = query.sort or ("id" if query.search is None else RELEVANCE)
    return sort.removeprefix("-")


def _order(query: AdapterQuery, expression: str | None) -> str:
    key = _sort_key(query)
    if key not in SORT_KEYS:
        raise unknown_name("sort key", key, SORT_KEYS)
    if key == RELEVANCE and query.search is None:
        raise InputError(
            "--sort is relevance, but nothing is searched for", "say what with --search TEXT"
        )
    ties = "id, origin, revision, pool_key"
    if key == RELEVANCE and expression is None:
        return ties
    direction = "DESC" if (query.sort or "").startswith("-") else "ASC"
    return f"{SORT_KEYS[key]} {direction} NULLS LAST, {ties}"
