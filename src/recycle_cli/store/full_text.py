"""The full-text index: what a search asks of it, and how it is kept in step with the rows.

It holds words alone. Their texts are those of the view `searchable`, so words have to be taken out
while their text still stands there.
"""

import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

WEIGHTS = (10.0, 5.0, 2.0, 1.0)
"""How much a word counts in the id, the tags, the detail and the card."""
TERM = re.compile(r'"([^"]*)"|([^\s"]+)')


@contextmanager
def texts_change(connection: sqlite3.Connection, keys: Sequence[int]) -> Iterator[list[int]]:
    """Within it, the texts of rows with these keys may change or go. Needs a transaction.

    Gives a list of the keys, to which those of new rows are to be added.
    """
    changed = list(keys)
    connection.execute(
        "INSERT INTO texts (texts, rowid, id, tags, detail, card)"
        f" SELECT 'delete', key, id, tags, detail, card FROM ({_texts_of(changed)})"
    )
    yield changed
    connection.execute(f"INSERT INTO texts (rowid, id, tags, detail, card) {_texts_of(changed)}")


def _texts_of(keys: Sequence[int]) -> str:
    chosen = ", ".join(map(str, keys))
    return f"SELECT key, id, tags, detail, card FROM searchable WHERE key IN ({chosen})"


def match_expression(text: str) -> str | None:
    """What FTS5 is asked for a search that a user typed, or None where it holds no word.

    All words have to be there, in any order and place; `word*` stands for all words that begin so,
    and words in double quotes for that very sequence. All else is no syntax but text, so that no
    search is an error.
    """
    terms = [
        _phrase(quoted or word, prefix=not quoted and word.endswith("*"))
        for quoted, word in TERM.findall(text.replace("\0", " "))
        if any(map(str.isalnum, quoted or word))
    ]
    return " AND ".join(terms) or None


def any_of(words: Sequence[str]) -> str | None:
    """What FTS5 is asked for texts that hold at least one of some words; None where there is none.

    The words are letters and digits alone.
    """
    return " OR ".join(_phrase(word, prefix=False) for word in words) or None


def _phrase(text: str, prefix: bool) -> str:
    # A word that the tokenizer divides, as in `q_proj`, is a sequence too.
    return f'"{text}"{" *" if prefix else ""}'
