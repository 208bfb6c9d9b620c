"""Who runs adapters over rows: workers with the base model, in this process or in others.

Outcomes are values: an adapter that cannot be scored, or that takes its workers down with it, fails
alone. Only the caller writes them anywhere.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recycle_cli.errors import RecycleError
from recycle_cli.evaluation.tasks import Row
from recycle_cli.progress import Silent
from recycle_cli.settings import Settings
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.answers import answer_rows
from recycle_cli.workflows.hands import Hands, Lost, ManyProcesses, OwnHands, RayCluster, each

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.store.answers import Answer

SCORING_VERSION = 3
"""Raised when rows come to be scored in another way, so that old answers are not taken for new."""


@dataclass(frozen=True)
class Job:
    """Rows to run an adapter over."""

    source: Source
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class AskContext:
    """The question what answers hang on, asked as a job: whoever asks need not hold the model, and
    may have another device than those who do."""


Scoring = Job | AskContext
ScoringHands = Hands[Scoring, "list[Answer] | RecycleError | str"]


@dataclass
class Scorer:
    """Runs adapters over rows on a base model that it holds.

    Args:
        base: the model.
        base_model: its canonical name.
        metric: what makes an answer right.
    """

    base: "BaseModel"
    base_model: str
    metric: str

    def work(self, job: Scoring) -> "list[Answer] | RecycleError | str":
        """The answers to a job's rows, or why there are none; or the context of all answers."""
        if isinstance(job, AskContext):
            return self._context()
        try:
            return self._answers(job)
        except RecycleError as error:
            return error
        except (RuntimeError, MemoryError) as error:  # torch's, such as one that is too large
            reason = (str(error) or type(error).__name__).splitlines()[0]
            return RecycleError(f"it could not be run: {reason}", "leave it out")

    def _answers(self, job: Job) -> "list[Answer]":
        from recycle_cli.store.answers import Answer

        update = job.source.load(self.base_model)
        found = answer_rows(self.base, update, job.rows, self.metric, Silent(), likelihoods=True)
        assert found.log_likelihoods is not None
        return [Answer(*pair) for pair in zip(found.correct, found.log_likelihoods, strict=True)]

    def _context(self) -> str:
        """Stands for all that an answer hangs on, besides the adapter and the row."""
        decisive = {
            "version": SCORING_VERSION,
            "base": self.base.digest,
            "device": self.base.compute.device.type,
            "dtype": str(self.base.dtype),
            "metric": self.metric,
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Recruiter:
    """Makes a scorer in a process of its own.

    Args:
        base_model: the canonical name of what it loads.
        metric: what makes an answer right.
        settings: where it runs.
        threads: cores that it uses.
    """

    base_model: str
    metric: str
    settings: Settings
    threads: int = 1

    def __call__(self) -> Scorer:
        """The scorer."""
        import torch

        from recycle_cli.engine.base_model import load_base_model

        torch.set_num_threads(self.threads)
        base = load_base_model(self.base_model, self.settings)
        return Scorer(base, self.base_model, self.metric)


def scoring_hands(
    base: "BaseModel | None",
    base_model: str,
    metric: str,
    settings: Settings,
    workers: int = 1,
    ray: str | None = None,
) -> ScoringHands:
    """Scores on the loaded base model at hand, in so many processes, or on a Ray cluster.

    Args:
        base: the loaded base model, where the process at hand scores; the others load their own.
        base_model: its canonical name.
        metric: what makes an answer right.
        settings: where the base model runs.
        workers: how many processes; 1 for the one at hand.
        ray: the address of a Ray cluster, or None.
    """
    if ray is not None:
        return RayCluster(Recruiter(base_model, metric, settings), ray)
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        return ManyProcesses(Recruiter(base_model, metric, settings, threads), workers)
    assert base is not None
    return OwnHands(Scorer(base, base_model, metric))


def context_of(hands: ScoringHands) -> str:
    """What all answers of some hands hang on.

    Raises:
        RecycleError: not one worker could be had.
    """
    ((_, context),) = each(hands, [AskContext()])
    if isinstance(context, Lost):
        raise RecycleError(
            f"the base model could not be loaded by a worker: {context.message}",
            "see whether memory suffices for so many of them",
        )
    return str(context)
