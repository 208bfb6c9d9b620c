import threading
import time
from collections.abc import Iterator

import pytest

from recycle_cli.workflows.workers import AHEAD, as_finished


def wait_for(event: threading.Event) -> None:
    assert event.wait(10)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_result_comes_once(workers: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.001 * (item % 3))
        return item * item

    results = sorted(as_finished(work, range(60), workers))
    assert results == [item * item for item in range(60)]


@pytest.mark.parametrize("hanging", [1, 2])
def test_results_do_not_wait_for_items_that_hang(hanging: int) -> None:
    go_on = threading.Event()

    def work(item: int) -> int:
        if item < hanging:
            wait_for(go_on)
        return item

    results = as_finished(work, range(100), 3)
    assert {next(results) for _ in range(100 - hanging)} == set(range(hanging, 100))
    go_on.set()
    assert set(results) == set(range(hanging))


@pytest.mark.parametrize("workers", [1, 3])
def test_nothing_comes_of_nothing(workers: int) -> None:
    assert list(as_finished(str, [], workers)) == []


def test_several_items_are_worked_on_at_once() -> None:
    together = threading.Barrier(4)
    assert list(as_finished(lambda _: together.wait(10) >= 0, range(4), 4)) == [True] * 4


def test_one_worker_is_the_caller_and_begins_nothing_early() -> None:
    begun: list[int] = []
    me = threading.get_ident()

    def work(item: int) -> int:
        begun.append(item)
        return threading.get_ident()

    results = as_finished(work, iter(range(3)), 1)
    assert begun == []
    assert next(results) == me
    assert begun == [0]


def test_items_are_taken_a_bounded_number_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    results = as_finished(str, items(), 2)
    for place in range(50):
        next(results)
        assert len(taken) <= place + AHEAD * 2
    results.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_what_work_raises_ends_it(workers: int) -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    results = as_finished(work, range(100), workers)
    with pytest.raises(ValueError, match="two"):
        list(results)
    assert list(results) == []


def test_what_the_items_raise_ends_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(as_finished(str, items(), 2))


def test_nothing_is_begun_after_the_end_and_what_nobody_took_is_passed_on() -> None:
    begun: list[int] = []
    unused: list[int] = []
    go_on, last = threading.Event(), threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item > 1:
            wait_for(go_on)
        return item

    def pass_on(item: int) -> None:
        unused.append(item)
        if len(unused) == 3:
            last.set()

    results = as_finished(work, range(100), 2, unused=pass_on)
    first = next(results)
    while len(begun) < 4:
        time.sleep(0.001)
    results.close()
    go_on.set()
    wait_for(last)
    assert sorted(begun) == [0, 1, 2, 3]
    assert sorted([first, *unused]) == [0, 1, 2, 3]


def test_the_threads_end_with_the_work_and_never_hold_up_the_process() -> None:
    before = set(threading.enumerate())
    results = as_finished(str, range(20), 3)
    next(results)
    mine = set(threading.enumerate()) - before
    assert len(mine) == 3
    assert all(thread.daemon for thread in mine)
    list(results)
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()
