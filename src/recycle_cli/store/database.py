"""The connection that the catalog works on: how SQLite is opened so that processes can share it."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from recycle_cli.errors import RecycleError
from recycle_cli.lora.base_names import normalised_base_name
from recycle_cli.store.migrations import migrate

IN_MEMORY = ":memory:"
BUSY_TIMEOUT_S = 30.0
BUSY_PAUSE_S = 0.01


def connect(name: str) -> sqlite3.Connection:
    """A connection in autocommit mode to a file with the newest schema.

    A writer waits for another one for up to 30 s. Foreign keys are enforced.

    Args:
        name: the file, made where absent; its folder must exist.

    Raises:
        RecycleError: a newer version of recycle wrote this file.
        sqlite3.Error: the file is no SQLite database, or cannot be opened.
    """
    connection = sqlite3.connect(name, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    try:
        connection.row_factory = sqlite3.Row
        _switch_to_wal(connection)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.create_function("base_key", 1, base_key, deterministic=True)
        migrate(connection)
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def base_key(name: str | None) -> str:
    """The text by which names of base models are compared; empty for no name."""
    return normalised_base_name(name) if name else ""


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """Switches the file to write-ahead logging, which lets readers and a writer work at once.

    SQLite answers "locked" here at once, without its busy timeout, when two processes open a new
    file together, so the waiting is done here.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(BUSY_PAUSE_S)


class IndexFile:
    """The index file, open. Use it as a context manager, in one thread.

    Args:
        file: the SQLite file, made with its folder where absent; None keeps an empty index in
            memory.
    """

    what = "the index"
    """What an error says cannot be used."""
    hint = (
        "check the disk and its permissions; a damaged file can be moved away, "
        "and crawling again makes a new one"
    )
    unusable: tuple[type[Exception], ...] = (sqlite3.Error, OSError)
    """What is raised where it cannot be."""

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

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._sqlite_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk may have rolled it back already.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _sqlite_errors(self) -> Iterator[None]:
        try:
            yield
        except self.unusable as error:
            raise RecycleError(
                f"{self.what} {self._name} cannot be used: {error}", self.hint
            ) from error
