import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_cli.selection.halving import FEWEST_ROWS, rounds
from recycle_cli.selection.words import MOST, words_of


@given(st.integers(1, 2000), st.integers(1, 500), st.integers(1, 60))
def test_fewer_and_fewer_on_more_and_more(adapters: int, rows: int, k: int) -> None:
    plan = rounds(adapters, rows, k)
    assert plan[0][0] == adapters
    assert plan[-1][1] == rows
    for (many, few_rows), (fewer, more_rows) in itertools.pairwise(plan):
        assert fewer == max(min(k, adapters), -(-many // 2))
        assert few_rows < more_rows <= 2 * few_rows
    assert plan[-1][0] >= min(k, adapters)
    assert plan[0][1] >= min(rows, FEWEST_ROWS)


@given(st.integers(1, 2000), st.integers(1, 500), st.integers(1, 60))
def test_it_never_takes_more_than_the_full_ranking(adapters: int, rows: int, k: int) -> None:
    seen, work = 0, 0
    for left, count in rounds(adapters, rows, k):
        work += left * (count - seen)
        seen = count
    assert work <= adapters * rows


@pytest.mark.parametrize(
    ("adapters", "rows", "k", "plan"),
    [
        (25, 80, 5, [(25, 20), (13, 40), (7, 80)]),
        (960, 80, 30, [(960, 10), (480, 20), (240, 40), (120, 80)]),
        (5, 80, 10, [(5, 80)]),
        (200, 10, 1, [(200, 10)]),
    ],
)
def test_rounds_by_hand(adapters: int, rows: int, k: int, plan: list[tuple[int, int]]) -> None:
    assert rounds(adapters, rows, k) == plan


def test_the_words_of_a_task_are_those_of_most_of_its_texts() -> None:
    texts = ["The service was GOOD, good", "the room: bad_1 2024", "good rooms, naïve staff"]
    assert words_of(texts)[:2] == ["good", "the"]
    assert "naïve" in words_of(texts)
    assert not {"was_", "1", "2024"} & set(words_of(texts))
    assert len(words_of([f"word{'abcdefghij'[n % 10] * (1 + n)}" for n in range(200)])) == MOST
