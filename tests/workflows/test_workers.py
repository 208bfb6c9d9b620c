import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_cli.workflows.workers import AHEAD, in_order


@given(st.lists(st.integers(), max_size=40), st.integers(1, 6))
def test_results_come_in_order(items: list[int], workers: int) -> None:
    assert list(in_order(lambda item: item * 2, items, workers)) == [item * 2 for item in items]


def test_work_goes_on_side_by_side() -> None:
    together = threading.Barrier(3, timeout=10)
    assert list(in_order(lambda _: together.wait() >= 0, range(3), 3)) == [True] * 3


def test_it_is_not_far_ahead_of_the_results() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    results = in_order(lambda item: item, items(), 2)
    assert next(results) == 0
    assert len(taken) <= 2 * AHEAD + 1
    results.close()  # type: ignore[attr-defined]


def test_one_worker_begins_nothing_before_it_is_asked() -> None:
    begun: list[int] = []
    results = in_order(lambda item: begun.append(item), range(5), 1)
    assert begun == []
    next(results)
    assert begun == [0]


@pytest.mark.parametrize("workers", [1, 3])
def test_what_work_raises_is_raised_and_ends_it(workers: int) -> None:
    done: list[int] = []

    def work(item: int) -> int:
        if item == 2:
            raise ValueError(item)
        done.append(item)
        return item

    with pytest.raises(ValueError, match="2"):
        list(in_order(work, range(100), workers))
    time.sleep(0.05)
    assert len(done) <= 2 + (1 + AHEAD) * workers
