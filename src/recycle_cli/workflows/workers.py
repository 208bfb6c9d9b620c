"""Work done side by side, its results taken as they come."""

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2
"""How many items a worker may have begun or ended that nobody took the results of."""


def as_finished(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    unused: Callable[[Result], None] = lambda result: None,
) -> Generator[Result]:
    """The results of some work on each item, whichever is there first.

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
    pool, under_way = _Pool(work, workers, unused), 0
    try:
        for item in items:
            pool.begin(item)
            under_way += 1
            if under_way == AHEAD * workers:
                yield pool.take()
                under_way -= 1
        for _ in range(under_way):
            yield pool.take()
    finally:
        pool.end()


class _Pool(Generic[Item, Result]):
    """Threads that die with the process, unlike those of `concurrent.futures`."""

    def __init__(
        self, work: Callable[[Item], Result], workers: int, unused: Callable[[Result], None]
    ) -> None:
        self._work, self._workers, self._unused = work, workers, unused
        self._begun: SimpleQueue[tuple[Item] | None] = SimpleQueue()
        self._finished: SimpleQueue[Future[Result]] = SimpleQueue()
        self._lock, self._ended = threading.Lock(), False
        for _ in range(workers):
            threading.Thread(target=self._run, daemon=True).start()

    def begin(self, item: Item) -> None:
        self._begun.put((item,))

    def take(self) -> Result:
        return self._finished.get().result()

    def end(self) -> None:
        with self._lock:
            self._ended = True
        with contextlib.suppress(Empty):
            while True:
                self._begun.get_nowait()
        for _ in range(self._workers):
            self._begun.put(None)
        with contextlib.suppress(Empty):
            while True:
                self._pass_on(self._finished.get_nowait())

    def _run(self) -> None:
        while (begun := self._begun.get()) is not None:
            future: Future[Result] = Future()
            try:
                future.set_result(self._work(*begun))
            except BaseException as error:  # handed to whoever takes the result
                future.set_exception(error)
            with self._lock:
                ended = self._ended
                if not ended:
                    self._finished.put(future)
            if ended:
                self._pass_on(future)

    def _pass_on(self, future: Future[Result]) -> None:
        if future.exception() is None:
            self._unused(future.result())
