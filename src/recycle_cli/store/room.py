"""How much room the adapter cache may take."""

import threading
from contextlib import suppress
from pathlib import Path

from recycle_cli.lora.folder import WEIGHTS_FILE
from recycle_cli.store.unfinished import being_written


class NoRoom(OSError):
    """An adapter does not fit into the cache any more."""

    code = "no_room"


class Room:
    """The bytes that weights in the cache take, and may take. Safe to use from several threads.

    Args:
        used: taken already.
        limit: that may be taken in all; None for whatever the disk holds.
    """

    def __init__(self, used: int = 0, limit: int | None = None) -> None:
        self.used, self.limit = used, limit
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Sets bytes aside.

        Raises:
            NoRoom: they do not fit.
        """
        with self._lock:
            if self.limit is not None and self.used + count > self.limit:
                raise NoRoom(
                    f"its {count} bytes do not fit: {self.used} of the {self.limit} that the cache "
                    "may take are taken"
                )
            self.used += count

    def give_back(self, count: int) -> None:
        """Frees what was set aside and is not needed."""
        with self._lock:
            self.used -= count


def bytes_kept(adapters_folder: Path) -> int:
    """What the weights in the cache take, with those that others are fetching just now."""
    files = [*adapters_folder.glob(f"[0-9a-f]*/{WEIGHTS_FILE}")]
    files += [folder / WEIGHTS_FILE for folder in being_written(adapters_folder)]
    total = 0
    for file in files:
        with suppress(FileNotFoundError):  # forgotten meanwhile, or not begun
            total += file.stat().st_size
    return total
