"""The index in figures."""

import sqlite3
from collections.abc import Sequence
from statistics import median

from recycle_cli.records import FunnelStep, StatsDocument

UNKNOWN = "unknown"
# Of the revisions of an adapter in a pool, the accepted one, or else the latest.
COUNTED = """
    WITH counted AS (
        SELECT * FROM adapters AS one
        WHERE (:base = '' OR base_key = :base) AND (status = 'accepted' OR NOT EXISTS (
            SELECT 1 FROM adapters AS other
            WHERE other.source = one.source AND other.origin = one.origin
                AND other.pool_key = one.pool_key AND other.key <> one.key
                AND (other.status = 'accepted' OR other.recorded > one.recorded)
        ))
    ),
    pool AS (SELECT * FROM counted WHERE status = 'accepted')
"""


def figures(
    connection: sqlite3.Connection, base: str, reasons_in_order: Sequence[str]
) -> StatsDocument:
    """Counts an index. An adapter counts once for each base model that it was vetted for.

    Args:
        connection: to the index, in one transaction.
        base: the base model as `base_key` has it; empty for all.
        reasons_in_order: the reason codes in the order of the checks that give them.
    """
    ask = _Questions(connection, base)
    counts = ask.histogram("status", "counted")
    refused = ask.histogram("reason", "counted WHERE status = 'rejected'")
    failed = ask.histogram("reason", "counted WHERE status = 'failed'")
    place = {code: number for number, code in reversed(list(enumerate(reasons_in_order)))}
    in_order = sorted(refused, key=lambda code: place.get(code, len(place)))
    steps = [*((code, refused[code]) for code in in_order), *failed.items()]
    norms = ask.column("norm", "pool WHERE norm IS NOT NULL")
    return StatsDocument(
        adapters=counts.get("accepted", 0),
        counts=counts,
        reasons=ask.histogram("reason", "counted WHERE reason IS NOT NULL"),
        found=sum(counts.values()),
        funnel=_funnel(sum(counts.values()), steps),
        base_models=ask.histogram("base_model", "pool"),
        ranks=ask.histogram("rank_max", "pool WHERE rank_max IS NOT NULL"),
        alpha_over_rank=ask.histogram(
            "printf('%.6g', alpha / rank_max)", "pool WHERE alpha IS NOT NULL AND rank_max > 0"
        ),
        licenses=ask.histogram("license", "pool"),
        target_modules=ask.histogram("value", "pool, json_each(pool.target_modules)"),
        size_bytes=ask.size_bytes(),
        norm={"min": min(norms), "median": median(norms), "max": max(norms)} if norms else None,
    )


class _Questions:
    """SELECTs over what is counted."""

    def __init__(self, connection: sqlite3.Connection, base: str) -> None:
        self._connection, self._base = connection, {"base": base}

    def histogram(self, value: str, source: str) -> dict[str, int]:
        """Value -> count, the commonest first."""
        rows = self._connection.execute(
            f"{COUNTED} SELECT {value}, count(*) FROM {source} GROUP BY 1"
            " ORDER BY 2 DESC, min(origin), 1",
            self._base,
        )
        return {UNKNOWN if one is None else str(one): count for one, count in rows}

    def size_bytes(self) -> int:
        """What the weights of the pool take, each file once."""
        row = self._connection.execute(
            f"{COUNTED}, files AS (SELECT max(size_bytes) AS size FROM pool GROUP BY"
            " coalesce(sha256, key)) SELECT coalesce(sum(size), 0) FROM files",
            self._base,
        ).fetchone()
        return int(row[0])

    def column(self, value: str, source: str) -> list[float]:
        """One value a row."""
        return [
            one
            for (one,) in self._connection.execute(
                f"{COUNTED} SELECT {value} FROM {source}", self._base
            )
        ]


def _funnel(found: int, steps: Sequence[tuple[str, int]]) -> list[FunnelStep]:
    funnel = []
    for reason, adapters in steps:
        found -= adapters
        funnel.append(FunnelStep(reason=reason, adapters=adapters, left=found))
    return funnel
