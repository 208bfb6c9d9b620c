"""Where the runs of a study are kept: a folder for each, named by a digest of all that decides it.

What is in such a folder is finished once its run.json is there, which is written last. The same run
asked for again, by this study or by one that is told to look here, is taken as it is.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycle_cli.errors import InputError, RecycleError

RUN_VERSION = 1
"""Raised when a run with the same settings would come out otherwise."""
RUN_FILE = "run.json"
FAILED_FILE = "failed.json"
ADAPTER = "adapter"
KEY_DIGITS = 24


def key_of(kind: str, inputs: Mapping[str, Any]) -> str:
    """The name of a run, in hex digits.

    Args:
        kind: of run.
        inputs: all that decides what comes out: digests, settings; of JSON's types.
    """
    whole = {"version": RUN_VERSION, "kind": kind, **inputs}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


@dataclass(frozen=True)
class RunStore:
    """The runs in a folder.

    Args:
        folder: where they are, and new ones go.
        others: where finished ones may be too.
    """

    folder: Path
    others: tuple[Path, ...] = ()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other studies from working on the same runs.

        Raises:
            InputError: one does.
            RecycleError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise RecycleError(
                f"{self.folder} cannot be written: {error}", "choose another --out"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another study is at work in {self.folder}",
                    "wait for it, or choose another --out",
                ) from error
            yield

    def place(self, key: str) -> Path:
        """The folder of a run: where it is finished, or else where it is to be."""
        for folder in (self.folder, *self.others):
            if (folder / key / RUN_FILE).exists():
                return folder / key
        return self.folder / key

    def adapter(self, key: str) -> Path:
        """Where a run has its adapter, if it was kept."""
        return self.place(key) / ADAPTER

    def has_adapter(self, key: str) -> bool:
        """Whether a run has its adapter still."""
        return any(self.adapter(key).glob("*.safetensors"))

    def read(self, key: str) -> dict[str, Any] | None:
        """What came of a run; None where it is not finished.

        Raises:
            RecycleError: it cannot be read.
        """
        file = self.place(key) / RUN_FILE
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RecycleError(
                f"{file} cannot be read: {error}", "remove its folder to have it run again"
            ) from error
        return dict(found)

    def begin(self, key: str) -> Path:
        """The folder to work in; what an interrupted run left there is still there."""
        place = self.folder / key
        place.mkdir(parents=True, exist_ok=True)
        (place / FAILED_FILE).unlink(missing_ok=True)
        return place

    def finish(self, key: str, outcome: Mapping[str, Any]) -> None:
        """Writes what came of a run, of JSON's types: from now on it is finished."""
        _write(self.folder / key / RUN_FILE, outcome)

    def fail(self, key: str, error: str, traceback: str = "") -> None:
        """Notes why a run failed, for those who look; it is tried again the next time."""
        _write(self.begin(key) / FAILED_FILE, {"error": error, "traceback": traceback})

    def drop_adapter(self, key: str) -> None:
        """Frees what the adapter of a run takes, unless it is another study's."""
        shutil.rmtree(self.folder / key / ADAPTER, ignore_errors=True)


def _write(file: Path, fields: Mapping[str, Any]) -> None:
    beside = file.with_name(f".{file.name}")
    text = json.dumps(fields, ensure_ascii=False, allow_nan=False, sort_keys=True)
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(file)
