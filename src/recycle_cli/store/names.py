"""What an adapter's name may mean to the index, and which adapter it is."""

import difflib
import re
from collections.abc import Iterator, Sequence

from recycle_cli.errors import InputError
from recycle_cli.records import AdapterDocument
from recycle_cli.store.text import expanded

MIN_PREFIX = 8
SHA256_PREFIX = "sha256:"
HEX = re.compile(r"[0-9a-f]+")
MAX_CANDIDATES = 10
SUPERSEDED = "superseded"


def readings_of(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What a name may mean, the likeliest first, as SQL conditions and their values.

    Raises:
        InputError: it begins with `sha256:` and goes on with fewer than 8 hex digits.
    """
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
    path = str(expanded(name).absolute())
    yield "origin = ? OR path = ?", (path, path)
    resolved = str(expanded(name).resolve())
    yield "origin = ? OR path = ?", (resolved, resolved)
    if len(name) >= MIN_PREFIX and HEX.fullmatch(name.lower()):
        yield "sha256 GLOB ?", (name.lower() + "*",)


def names_all(name: str, document: AdapterDocument) -> bool:
    """Whether a name means an adapter in all its revisions: its id or where it was found."""
    path = expanded(name)
    return name == document.id or document.origin in (str(path.absolute()), str(path.resolve()))


def single(name: str, rows: Sequence[AdapterDocument]) -> AdapterDocument:
    """The one adapter meant, of those that a name fits; there is at least one.

    Rejected duplicates share the digest of an accepted adapter and do not compete with it, nor
    do revisions that another one took the place of. Of the revisions of an adapter whose name
    says none, the one recorded last is meant.

    Args:
        name: what the user typed.
        rows: the latest recorded first.

    Raises:
        InputError: several with different weights fit.
    """
    rows = (
        [row for row in rows if row.status == "accepted"]
        or [row for row in rows if row.reason != SUPERSEDED]
        or rows
    )
    latest = {(row.source, row.origin): row for row in reversed(rows) if names_all(name, row)}
    rows = list(latest.values()) or rows
    if len({row.sha256 or row.origin for row in rows}) > 1:
        named = [f"{_digest(row)} ({row.id}, {row.origin})" for row in rows[:MAX_CANDIDATES]]
        raise InputError(
            f"{name!r} fits {len(rows)} adapters", f"name one of them: {'; '.join(named)}"
        )
    return rows[0]


def hint_for_unknown(name: str, ids: Sequence[str]) -> str:
    """The ids nearest to a name that is none, or where to find more."""
    near = difflib.get_close_matches(name, ids, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"the index knows {len(ids)} adapters: recycle index list; recycle crawl adds more"


def _digest(row: AdapterDocument) -> str:
    return f"{SHA256_PREFIX}{row.sha256[:16]}" if row.sha256 else "no digest"
