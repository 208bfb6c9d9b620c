import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_cli.errors import RecycleError
from recycle_cli.store.answers import Answer, AnswerBook

DIGESTS = st.binary(min_size=16, max_size=16)
ANSWERS = st.dictionaries(
    DIGESTS, st.builds(Answer, st.booleans(), st.floats(allow_nan=False)), max_size=6
)


@given(st.lists(ANSWERS, max_size=4))
def test_what_is_added_is_there_beside_what_was(parts: list[dict[bytes, Answer]]) -> None:
    file = Path(":memory:")
    with AnswerBook(file) as book:
        whole: dict[bytes, Answer] = {}
        for part in parts:
            book.add("context", "adapter", part)
            whole |= part
        assert book.of("context", "adapter") == whole
        assert book.of("other", "adapter") == book.of("context", "other") == {}


def test_it_is_there_for_the_next_process(tmp_path: Path) -> None:
    file = tmp_path / "deep/catalog.sqlite"
    answer = {b"r" * 16: Answer(True, -1.5)}
    with AnswerBook(file) as book:
        book.add("context", "adapter", answer)
    with AnswerBook(file) as book:
        assert book.of("context", "adapter") == answer


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    file = tmp_path / "catalog.sqlite"
    with AnswerBook(file) as book:
        book.add("context", "adapter", {b"r" * 16: Answer(True, -1.5)})
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE answers SET answers = x'0102'")
    with AnswerBook(file) as book, pytest.raises(RecycleError, match="cannot be used"):
        book.of("context", "adapter")
