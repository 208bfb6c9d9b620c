"""Who runs adapters over rows: this process, several of them, or a Ray cluster.

Results are values: an adapter that cannot be scored, or that takes its worker down with it, fails
alone. Only the caller writes them anywhere.
"""

import contextlib
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recycle_cli.errors import RecycleError
from recycle_cli.evaluation.tasks import Row
from recycle_cli.progress import Silent
from recycle_cli.settings import Settings
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.answers import answer_rows

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor

    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.store.answers import Answer


REACH_S = 10.0


@dataclass(frozen=True)
class Job:
    """Rows to run an adapter over."""

    source: Source
    rows: tuple[Row, ...]


class Scorer(ABC):
    """Runs jobs, in no particular order."""

    @abstractmethod
    def score(self, jobs: Sequence[Job]) -> "Iterator[tuple[Job, list[Answer] | str]]":
        """Each job with its answers, or why there are none, as they are done."""


def score_job(base: "BaseModel", base_model: str, metric: str, job: Job) -> "list[Answer] | str":
    """One job on a loaded base model."""
    from recycle_cli.store.answers import Answer

    try:
        update = job.source.load(base_model)
        answers = answer_rows(base, update, job.rows, metric, Silent(), likelihoods=True)
    except RecycleError as error:
        return error.message
    assert answers.log_likelihoods is not None
    return [Answer(*pair) for pair in zip(answers.correct, answers.log_likelihoods, strict=True)]


class OneProcess(Scorer):
    """Jobs one after the other, on a base model that is loaded already."""

    def __init__(self, base: "BaseModel", base_model: str, metric: str) -> None:
        self._base, self._base_model, self._metric = base, base_model, metric

    def score(self, jobs: Sequence[Job]) -> "Iterator[tuple[Job, list[Answer] | str]]":
        """See `Scorer`."""
        for job in jobs:
            yield job, score_job(self._base, self._base_model, self._metric, job)


@dataclass(frozen=True)
class Assignment:
    """What a worker needs to know: the base model to load, and how to score."""

    base_model: str
    metric: str
    settings: Settings
    threads: int


class Worker:
    """Holds the base model in a process of its own, and scores one job after the other."""

    def __init__(self, assignment: Assignment) -> None:
        import torch

        from recycle_cli.engine.base_model import load_base_model

        torch.set_num_threads(assignment.threads)
        self._assignment = assignment
        self._base = load_base_model(assignment.base_model, assignment.settings)

    def score(self, job: Job) -> "list[Answer] | str":
        """One job."""
        return score_job(self._base, self._assignment.base_model, self._assignment.metric, job)


_worker: Worker | None = None


def _begin(assignment: Assignment) -> None:
    global _worker  # a process has one, which lives as long as it
    _worker = Worker(assignment)


def _work(job: Job) -> "list[Answer] | str":
    assert _worker is not None
    return _worker.score(job)


class ManyProcesses(Scorer):
    """Jobs on several processes of this machine, each with the base model."""

    def __init__(self, assignment: Assignment, workers: int) -> None:
        self._assignment, self._workers = assignment, workers

    def score(self, jobs: Sequence[Job]) -> "Iterator[tuple[Job, list[Answer] | str]]":
        """See `Scorer`."""
        from concurrent.futures.process import BrokenProcessPool

        waiting = list(jobs)
        while waiting:
            running: dict[Future[Any], Job] = {}
            try:
                with self._pool(self._workers) as pool:
                    yield from self._run(pool, waiting, running)
            except BrokenProcessPool:
                yield from self._one_by_one(list(running.values()))

    def _one_by_one(self, jobs: Sequence[Job]) -> "Iterator[tuple[Job, list[Answer] | str]]":
        """Those that were running when a worker died: which of them it died of shows alone."""
        from concurrent.futures.process import BrokenProcessPool

        for job in jobs:
            try:
                with self._pool(1) as pool:
                    yield job, pool.submit(_work, job).result()
            except BrokenProcessPool:
                yield job, "the worker that scored it died"

    def _run(
        self, pool: "ProcessPoolExecutor", waiting: list[Job], running: "dict[Future[Any], Job]"
    ) -> "Iterator[tuple[Job, list[Answer] | str]]":
        """Runs as many jobs at once as there are workers, so that few are under suspicion when one
        dies."""
        from concurrent.futures import FIRST_COMPLETED, wait

        while waiting or running:
            while waiting and len(running) < self._workers:
                job = waiting.pop(0)
                running[pool.submit(_work, job)] = job
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                outcome = future.result()
                yield running.pop(future), outcome

    def _pool(self, workers: int) -> "ProcessPoolExecutor":
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import get_context

        return ProcessPoolExecutor(
            workers, get_context("spawn"), initializer=_begin, initargs=(self._assignment,)
        )


class RayCluster(Scorer):
    """Jobs on actors of a Ray cluster, each with the base model; those that die are begun anew."""

    def __init__(self, assignment: Assignment, address: str) -> None:
        self._assignment, self._address = assignment, address

    def score(self, jobs: Sequence[Job]) -> "Iterator[tuple[Job, list[Answer] | str]]":
        """See `Scorer`."""
        if not jobs:
            return
        with _cluster(self._address) as ray:
            actors = self._actors(ray, len(jobs))
            waiting, running = list(jobs), dict[Any, tuple[Any, Job]]()
            idle = list(actors)
            while waiting or running:
                while waiting and idle:
                    actor, job = idle.pop(), waiting.pop(0)
                    running[actor.score.remote(job)] = actor, job
                (reference,), _ = ray.wait(list(running), num_returns=1)
                actor, job = running.pop(reference)
                try:
                    outcome = ray.get(reference)
                except ray.exceptions.RayError as error:
                    outcome = f"its worker failed: {str(error).splitlines()[0]}"
                idle.append(actor)
                yield job, outcome

    def _actors(self, ray: Any, most: int) -> list[Any]:
        """As many as the cluster has room for; with a GPU each where there are any."""
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        needs = {"num_gpus": 1} if gpus else {"num_cpus": self._assignment.threads}
        count = gpus or int(resources.get("CPU", 1)) // self._assignment.threads
        remote = ray.remote(**needs, max_restarts=2, max_task_retries=2)(Worker)
        return [remote.remote(self._assignment) for _ in range(max(1, min(count, most)))]


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Any]:
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
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Asks for a connection, since Ray itself tries for minutes.

    Raises:
        RecycleError: there is none.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # auto, local
        return
    try:
        socket.create_connection((host, int(port)), REACH_S).close()
    except OSError as error:
        raise _unreached(address, str(error)) from error


def _unreached(address: str, reason: str) -> RecycleError:
    return RecycleError(
        f"the Ray cluster {address!r} cannot be reached: {reason}",
        "give its address as host:port, auto, or local for one of this machine's own",
    )


def make_scorer(
    base: "BaseModel",
    base_model: str,
    metric: str,
    settings: Settings,
    workers: int = 1,
    ray: str | None = None,
) -> Scorer:
    """Scores in the process at hand, in so many others, or on a Ray cluster at an address."""
    cores = os.cpu_count() or 1
    if ray is not None:
        return RayCluster(Assignment(base_model, metric, settings, 1), ray)
    if workers > 1:
        threads = max(1, cores // workers)
        return ManyProcesses(Assignment(base_model, metric, settings, threads), workers)
    return OneProcess(base, base_model, metric)
