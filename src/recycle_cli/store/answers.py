"""How adapters answered rows, kept so that no selection computes an answer twice."""

import struct
from collections.abc import Mapping
from typing import NamedTuple

from recycle_cli.store.database import IndexFile

KEPT = struct.Struct("<16s?d")
"""One row's answer: the row's digest, whether it was right, the log-likelihood in nats."""


class Answer(NamedTuple):
    """What came of one row: whether it was right, and the log-likelihood of the right answer."""

    correct: bool
    log_likelihood: float


class AnswerBook(IndexFile):
    """The answers in the index file, open. Use it as a context manager, in one thread.

    An answer belongs to a context (a base model, how it is computed, the metric), an adapter, and
    a row, each of them a digest; so the rows of several tasks may be mixed, and more rows of a task
    be added later. Every method raises RecycleError when the file cannot be used.

    Args:
        file: the index; made with its folder where absent.
    """

    what = "the answers in"
    hint = "check the disk and its permissions; a damaged file can be moved away"
    unusable = (*IndexFile.unusable, struct.error)

    def of(self, context: str, adapter: str) -> dict[bytes, Answer]:
        """What is known of an adapter: the digest of a row, 16 bytes, -> its answer."""
        with self._sqlite_errors():
            row = self._connection.execute(
                "SELECT answers FROM answers WHERE context = ? AND adapter = ?", (context, adapter)
            ).fetchone()
            return {
                digest: Answer(correct, likelihood)
                for digest, correct, likelihood in KEPT.iter_unpack(row[0] if row else b"")
            }

    def add(self, context: str, adapter: str, answers: Mapping[bytes, Answer]) -> None:
        """Keeps answers, beside those that are there, in one transaction."""
        with self._transaction():
            known = {**self.of(context, adapter), **answers}
            packed = b"".join(KEPT.pack(digest, *known[digest]) for digest in sorted(known))
            self._connection.execute(
                "INSERT OR REPLACE INTO answers (context, adapter, answers) VALUES (?, ?, ?)",
                (context, adapter, packed),
            )
