"""Who does jobs that need the base model: this process, several of them, or a Ray cluster.

Outcomes are values: a job that takes its worker down with it is lost alone. Jobs are given one by
one, so that what comes next may hang on what is done.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from recycle_cli.errors import RecycleError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

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


@dataclass(frozen=True)
class _Raised:
    """What a worker could not do, to be raised where its outcome is waited for."""

    error: Exception


def _serve(line: "Connection", make: Callable[[], Worker[Any, Any]]) -> None:
    """The life of a process: a worker is made, and does what comes over the line until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever hired it is told, and sends it home
    with contextlib.suppress(EOFError, ConnectionError):  # whoever hired it has gone
        worker = _tried(make)
        if isinstance(worker, _Raised):
            line.send(worker)
            return
        while True:
            job = line.recv()
            line.send(_tried(partial(worker.work, job)))


def _tried(do: Callable[[], Any]) -> Any:
    """What comes of it, an error too."""
    try:
        return do()
    except Exception as error:
        return _Raised(error)


@dataclass(eq=False)
class _Hand:
    process: "BaseProcess"
    line: "Connection"
    job: Any = None
    busy: bool = False


class ManyProcesses(Hands[J, R]):
    """Several processes of this machine. A job whose process dies is given to another one, once.

    Args:
        make: makes a worker, in its process; it is pickled.
        count: how many.
    """

    def __init__(self, make: Callable[[], Worker[J, R]], count: int) -> None:
        self.count = count
        self._make = make
        self._hands: list[_Hand] = []

    def begin(self, job: J) -> None:
        """See `Hands`."""
        idle = next((hand for hand in self._hands if not hand.busy), None)
        self._give(idle or self._hire(), job)

    def finished(self) -> tuple[J, R | Lost]:
        """See `Hands`. Raises what a worker could not do."""
        from multiprocessing.connection import wait

        busy = {hand.line: hand for hand in self._hands if hand.busy}
        hand = busy[wait(list(busy))[0]]  # type: ignore[index]  # lines are all that is waited for
        job = hand.job
        try:
            return job, self._take(hand)
        except (EOFError, ConnectionError):
            self._part_with(hand)
        again = self._hire()
        self._give(again, job)
        try:
            return job, self._take(again)
        except (EOFError, ConnectionError):
            self._part_with(again)
            return job, Lost("the process that worked on it died", "see whether memory suffices")

    def _hire(self) -> _Hand:
        from multiprocessing import get_context

        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._make), daemon=True)
        process.start()
        theirs.close()  # so that the line ends with the process
        hand = _Hand(process, ours)
        self._hands.append(hand)
        return hand

    def _give(self, hand: _Hand, job: J) -> None:
        hand.job, hand.busy = job, True
        with contextlib.suppress(ConnectionError):  # dead already, as will be seen
            hand.line.send(job)

    def _take(self, hand: _Hand) -> R:
        outcome = hand.line.recv()
        hand.busy = False
        if isinstance(outcome, _Raised):
            raise outcome.error
        taken: R = outcome
        return taken

    def _part_with(self, hand: _Hand) -> None:
        hand.line.close()
        hand.process.join()
        self._hands.remove(hand)

    def dismiss(self) -> None:
        """See `Hands`."""
        for hand in self._hands:
            hand.process.terminate()
        for hand in list(self._hands):
            self._part_with(hand)


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
        with contextlib.ExitStack() as stack:
            # Ray prints of its dead workers there.
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            self._ray = _connect(address)
            stack.callback(self._ray.shutdown)
            self._connection = stack.pop_all()
        self._make = make
        resources = self._ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self._needs = {"num_gpus": 1} if gpus else {"num_cpus": threads}
        room = gpus or int(resources.get("CPU", 1)) // threads
        self.count = max(1, min(room, most))
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, J]] = {}

    def begin(self, job: J) -> None:
        """See `Hands`."""
        actor = self._idle.pop() if self._idle else self._hire()
        self._running[actor.work.remote(job)] = actor, job

    def finished(self) -> tuple[J, R | Lost]:
        """See `Hands`. Raises what a worker could not do."""
        (reference,), _ = self._ray.wait(list(self._running), num_returns=1)
        actor, job = self._running.pop(reference)
        errors = self._ray.exceptions
        try:
            outcome: R = self._ray.get(reference)
        except errors.RayTaskError as error:
            raise error.cause from error
        except errors.RayError as error:  # the actor is dead, and stays so
            reason = str(error).splitlines()[0]
            return job, Lost(f"its worker failed: {reason}", "see Ray's logs")
        self._idle.append(actor)
        return job, outcome

    def _hire(self) -> Any:
        retries = {"max_restarts": RAY_RESTARTS, "max_task_retries": RAY_RESTARTS}
        return self._ray.remote(**self._needs, **retries)(_Actor).remote(self._make)

    def dismiss(self) -> None:
        """See `Hands`."""
        self._connection.close()


class _Actor:
    """Makes its worker for the first job, so that what it could not make is told as what it could
    not do."""

    def __init__(self, make: Callable[[], Worker[Any, Any]]) -> None:
        self._make = make

    @cached_property
    def _worker(self) -> Worker[Any, Any]:
        return self._make()

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
        ray.init(
            address=address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
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
