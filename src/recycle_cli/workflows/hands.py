"""Who does jobs that need the base model: this process, several of them, or a Ray cluster.

Outcomes are values: a job that takes its worker down with it is lost alone. Jobs are given one by
one, so that what comes next may hang on what is done.
"""

import contextlib
import os
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from recycle_cli.errors import RecycleError

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor

J = TypeVar("J")
R = TypeVar("R")
J_in = TypeVar("J_in", contravariant=True)
R_out = TypeVar("R_out", covariant=True)
REACH_S = 10.0
RAY_RESTARTS = 2


class Worker(Protocol[J_in, R_out]):
    """Does one job after the other, with the base model in its hands."""

    def work(self, job: J_in) -> R_out:
        """One job."""


class Lost(RecycleError):
    """The worker that had a job died, and another one too."""


class Hands(ABC, Generic[J, R]):
    """So many workers, each with one job at a time. A context manager: they go home at its end.

    Attributes:
        count: how many jobs may be under way at once.
    """

    count: int

    @abstractmethod
    def begin(self, job: J) -> None:
        """Gives a job to an idle worker; no more than `count` may be under way."""

    @abstractmethod
    def finished(self) -> tuple[J, R | Lost]:
        """Waits for a job that is under way, and gives it with its outcome."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.dismiss()

    def dismiss(self) -> None:
        """Sends the workers home."""


def each(hands: Hands[J, R], jobs: Iterable[J]) -> Iterator[tuple[J, R | Lost]]:
    """All of some jobs with their outcomes, as they are done."""
    under_way = 0
    for job in jobs:
        if under_way == hands.count:
            yield hands.finished()
            under_way -= 1
        hands.begin(job)
        under_way += 1
    for _ in range(under_way):
        yield hands.finished()


class OwnHands(Hands[J, R]):
    """The process at hand, with a worker that it has already."""

    count = 1

    def __init__(self, worker: Worker[J, R]) -> None:
        self._worker = worker
        self._waiting: deque[J] = deque()

    def begin(self, job: J) -> None:
        """See `Hands`."""
        self._waiting.append(job)

    def finished(self) -> tuple[J, R | Lost]:
        """See `Hands`."""
        job = self._waiting.popleft()
        return job, self._worker.work(job)


_worker: Any = None


def _employ(make: Callable[[], Worker[Any, Any]]) -> None:
    global _worker  # a process has one, which lives as long as it
    _worker = make()


def _work(job: Any) -> Any:
    return _worker.work(job)


class ManyProcesses(Hands[J, R]):
    """Several processes of this machine.

    Args:
        make: makes a worker, in its process; it is pickled.
        count: how many.
    """

    def __init__(self, make: Callable[[], Worker[J, R]], count: int) -> None:
        self.count = count
        self._make = make
        self._pool: ProcessPoolExecutor | None = None
        self._running: dict[Future[R], J] = {}
        self._suspects: deque[J] = deque()

    def begin(self, job: J) -> None:
        """See `Hands`."""
        from concurrent.futures.process import BrokenProcessPool

        if self._pool is None:
            self._pool = self._open(self.count)
        try:
            self._running[self._pool.submit(_work, job)] = job
        except BrokenProcessPool:
            self._break_up()
            self._suspects.append(job)

    def finished(self) -> tuple[J, R | Lost]:
        """See `Hands`."""
        from concurrent.futures import FIRST_COMPLETED, wait
        from concurrent.futures.process import BrokenProcessPool

        if not self._suspects:
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            future = next(iter(done))
            try:
                outcome = future.result()
                return self._running.pop(future), outcome
            except BrokenProcessPool:
                self._break_up()
        return self._alone(self._suspects.popleft())

    def _break_up(self) -> None:
        """Whoever was at work when a process died is suspected of its death."""
        self._suspects.extend(self._running.values())
        self._running.clear()
        self.dismiss()

    def _alone(self, job: J) -> tuple[J, R | Lost]:
        """A job in a process of its own, which shows whether it was the one."""
        from concurrent.futures.process import BrokenProcessPool

        try:
            with self._open(1) as pool:
                return job, pool.submit(_work, job).result()
        except BrokenProcessPool:
            return job, Lost("the process that worked on it died", "see whether memory suffices")

    def _open(self, count: int) -> "ProcessPoolExecutor":
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        return ProcessPoolExecutor(
            count, get_context("spawn"), initializer=_employ, initargs=(self._make,)
        )

    def dismiss(self) -> None:
        """See `Hands`."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class RayCluster(Hands[J, R]):
    """Actors of a Ray cluster, with a GPU each where there are any; those that die are begun anew.

    Args:
        make: makes a worker, in its actor; it is pickled.
        address: of the cluster: host:port, `auto`, or `local` for one of this machine's own.
        threads: cores of an actor, where there are no GPUs.
        most: no more actors than this.

    Raises:
        RecycleError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(
        self, make: Callable[[], Worker[J, R]], address: str, threads: int = 1, most: int = 64
    ) -> None:
        self._ray = _connect(address)
        self._actors = self._hire(make, threads, most)
        self.count = len(self._actors)
        self._idle = list(self._actors)
        self._running: dict[Any, tuple[Any, J]] = {}

    def begin(self, job: J) -> None:
        """See `Hands`."""
        actor = self._idle.pop()
        self._running[actor.work.remote(job)] = actor, job

    def finished(self) -> tuple[J, R | Lost]:
        """See `Hands`."""
        (reference,), _ = self._ray.wait(list(self._running), num_returns=1)
        actor, job = self._running.pop(reference)
        outcome: R | Lost
        try:
            outcome = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            outcome = Lost(f"its worker failed: {str(error).splitlines()[0]}", "see Ray's logs")
        self._idle.append(actor)
        return job, outcome

    def _hire(self, make: Callable[[], Worker[J, R]], threads: int, most: int) -> list[Any]:
        """As many actors as the cluster has room for."""
        resources = self._ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        needs = {"num_gpus": 1} if gpus else {"num_cpus": threads}
        count = gpus or int(resources.get("CPU", 1)) // threads
        retries = {"max_restarts": RAY_RESTARTS, "max_task_retries": RAY_RESTARTS}
        remote = self._ray.remote(**needs, **retries)(_Actor)
        return [remote.remote(make) for _ in range(max(1, min(count, most)))]

    def dismiss(self) -> None:
        """See `Hands`."""
        self._ray.shutdown()


class _Actor:
    def __init__(self, make: Callable[[], Worker[Any, Any]]) -> None:
        self._worker = make()

    def work(self, job: Any) -> Any:
        return self._worker.work(job)


def _connect(address: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise RecycleError(
            "--ray needs Ray, which is not installed", "pip install 'recycle-cli[ray]'"
        ) from error
    _check_reachable(address)
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _unreached(address, str(error).splitlines()[0]) from error
    return ray


def _check_reachable(address: str) -> None:
    """Asks for a connection, since Ray itself tries for minutes.

    Raises:
        RecycleError: there is none.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # auto, local
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(socket.create_connection((host, int(port)), REACH_S))
        except OSError as error:
            raise _unreached(address, str(error)) from error


def _unreached(address: str, reason: str) -> RecycleError:
    return RecycleError(
        f"the Ray cluster {address!r} cannot be reached: {reason}",
        "give its address as host:port, auto, or local for one of this machine's own",
    )
