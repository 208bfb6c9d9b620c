"""Folders in the adapter cache that somebody is still writing, and what killed writers left.

A writer holds a lock on its folder for as long as it lives, so nobody has to guess who is dead.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = ".unfinished-"
AGE_S = 24 * 3600.0


@contextlib.contextmanager
def unfinished_folder(adapters_folder: Path) -> Iterator[Path]:
    """A new folder in the cache, locked within the block, and gone behind it unless it was renamed.

    Args:
        adapters_folder: an existing folder.
    """
    folder, lock = _new(adapters_folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def sweep(adapters_folder: Path, older_than_s: float = AGE_S) -> int:
    """Removes what killed writers left behind; returns how many went.

    Args:
        adapters_folder: the cache.
        older_than_s: the age in seconds from which a folder goes on a disk that knows no locks.
    """
    swept = 0
    for path in adapters_folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _opened(path) as lock:  # others may be sweeping too
            if _has_no_writer(lock, older_than_s):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                swept += 1
    return swept


def being_written(adapters_folder: Path) -> Iterator[Path]:
    """The folders that somebody is writing."""
    for path in adapters_folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _opened(path) as lock:
            if not _has_no_writer(lock, AGE_S):
                yield path


def _new(adapters_folder: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=adapters_folder))
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a disk that knows no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            return folder, lock
        os.close(lock)  # it was swept before the lock was there


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _has_no_writer(descriptor: int, older_than_s: float) -> bool:
    """Whether an open folder is nobody's. It stays so until the descriptor is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return os.fstat(descriptor).st_mtime <= time.time() - older_than_s
    return True
