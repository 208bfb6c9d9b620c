"""The index file, looked at with plain SQLite."""

import sqlite3
from contextlib import closing
from pathlib import Path


def check_texts(file: Path) -> None:
    """The full-text index holds the words of the rows as they are, and no others; no reference
    leads nowhere."""
    with closing(sqlite3.connect(file)) as connection:
        # FTS5 compares every word with the texts that the view gives.
        connection.execute("INSERT INTO texts (texts, rank) VALUES ('integrity-check', 1)")
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
