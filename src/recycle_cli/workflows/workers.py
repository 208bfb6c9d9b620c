"""Work done side by side, its results taken in order."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 4
"""How many items a worker may be ahead of the result that is waited for."""


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    unused: Callable[[Result], None] = lambda result: None,
) -> Generator[Result]:
    """The results of some work on each item, in the order of the items.

    One worker is the caller's own thread, and no item is begun before it is asked for. More are
    threads that no interrupted process has to wait for; what is under way when the iterator is
    closed goes on, but nothing else is begun.

    Args:
        work: what is done; what it raises is raised here.
        items: taken one by one, a bounded number ahead of the results.
        workers: how many items at once, at least 1.
        unused: called, in any thread, with each result that nobody takes any more.
    """
    if workers == 1:
        yield from map(work, items)
        return
    pool, waiting = _Pool(work, workers), deque[Future[Result]]()
    try:
        for item in items:
            waiting.append(pool.begin(item))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
            future.add_done_callback(partial(_pass_on, unused))
        pool.end()


def _pass_on(unused: Callable[[Result], None], future: Future[Result]) -> None:
    if not future.cancelled() and future.exception() is None:
        unused(future.result())


class _Pool(Generic[Item, Result]):
    """Threads that die with the process, unlike those of `concurrent.futures`."""

    def __init__(self, work: Callable[[Item], Result], workers: int) -> None:
        self._work, self._workers = work, workers
        self._queue: SimpleQueue[tuple[Future[Result], Item] | None] = SimpleQueue()
        for _ in range(workers):
            threading.Thread(target=self._run, daemon=True).start()

    def begin(self, item: Item) -> Future[Result]:
        future: Future[Result] = Future()
        self._queue.put((future, item))
        return future

    def end(self) -> None:
        for _ in range(self._workers):
            self._queue.put(None)

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            future, item = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._work(item))
            except BaseException as error:  # handed to whoever waits for the result
                future.set_exception(error)
