"""The connection that the catalog works on: how SQLite is opened so that processes can share it."""

import sqlite3
import time

from recycle_cli.lora.base_names import same_base_model
from recycle_cli.store.migrations import migrate

IN_MEMORY = ":memory:"
BUSY_TIMEOUT_S = 30.0
BUSY_PAUSE_S = 0.01


def connect(name: str) -> sqlite3.Connection:
    """A connection in autocommit mode to a file with the newest schema.

    A writer waits for another one for up to 30 s. SQL gets the function `same_base_model`.

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
        connection.create_function("same_base_model", 2, _same_base, deterministic=True)
        migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


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


def _same_base(one: str | None, other: str) -> bool:
    return one is not None and same_base_model(one, other)
