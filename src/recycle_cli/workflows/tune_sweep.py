"""The short trainings that find the rate and the rank of a LoRA."""

import contextlib
import itertools
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from recycle_cli.progress import Progress
from recycle_cli.records import SweepTrial, TuneSweep
from recycle_cli.tuning.lora_catalog import LR_GRID, RANK_GRID
from recycle_cli.workflows.tune_job import Job, in_force, training_plan
from recycle_cli.workflows.tune_lora import lora_on, train_ready
from recycle_cli.workflows.tune_request import LR, RANK, TuneRequest
from recycle_cli.workflows.tune_state import SweepState, store_of

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel

FEWEST_STEPS = 10
"""Shorter runs tell candidates apart by chance."""

Candidate = Mapping[str, float]
"""A rate, a rank, or both, by the name of the option."""


def found_by_sweep(job: Job, base: "BaseModel", progress: Progress) -> tuple[Job, TuneSweep | None]:
    """The job with the rate and the rank that were left to be found; and how they were, where any
    were.

    By successive halving (arXiv 1502.07943): all candidates are trained for a few steps, the half
    with the lower validation losses for twice as many, from the start again, and so on. A candidate
    with which a loss is no longer a finite number is out.

    Raises:
        Diverged: all candidates are out.
        RecycleError: the memory does not suffice, or the disk refused.
    """
    if not job.request.auto:
        return job, None
    grid = _grid(job, base)
    sweep = _Sweep(job, base, progress, _candidates(grid))
    chosen = sweep.chosen()
    found = TuneSweep(
        grid={name: list(values) for name, values in grid.items()},
        trials=sweep.trials,
        chosen=dict(chosen),
        steps=sum(trial.steps + trial.proxy_steps for trial in sweep.trials),
        elapsed_s=sweep.state.elapsed_s,
    )
    return replace(job, request=_with(job.request, chosen)), found


@contextlib.contextmanager
def rate_found_by(sweep: TuneSweep | None) -> Iterator[None]:
    """The training itself; where it diverges, its user has given no rate that could be lowered.

    Raises:
        Diverged: it diverged.
    """
    from recycle_cli.engine.training import Diverged

    try:
        yield
    except Diverged as error:
        rate = sweep.chosen.get(LR) if sweep else None
        if rate is None:
            raise
        raise Diverged(
            f"{error.message} at the rate of {rate:.3g} that short trainings had found",
            f"give a lower one, as in --lr {rate / 3:.1g}",
        ) from error


def _grid(job: Job, base: "BaseModel") -> dict[str, list[float]]:
    request, grid = job.request, {}
    if LR in request.auto:
        usual = request.pace_in_force().lr
        grid[LR] = [times * usual for times in LR_GRID]
    if RANK in request.auto:
        side = min(min(shape) for shape in base.shapes.values())
        grid[RANK] = [rank for rank in RANK_GRID if rank <= side] or [side]
    return grid


def _candidates(grid: Mapping[str, Sequence[float]]) -> list[Candidate]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _with(request: TuneRequest, chosen: Candidate) -> TuneRequest:
    pace = {**request.pace, **({LR: chosen[LR]} if LR in chosen else {})}
    shape = replace(request.lora, rank=int(chosen[RANK])) if RANK in chosen else request.lora
    return replace(request, pace=pace, lora=shape)


class _Sweep:
    """The trials of a job's candidates.

    Attributes:
        trials: those that have ended, in their order.
        state: the same as they are kept, with the time that they took.
    """

    def __init__(
        self, job: Job, base: "BaseModel", progress: Progress, candidates: Sequence[Candidate]
    ) -> None:
        self.job, self.base, self.progress = job, base, progress
        self.candidates = candidates
        self.steps = job.request.pace_in_force().steps
        self.trials: list[SweepTrial] = []
        self.out: list[Candidate] = []
        shape = {**job.request.shape_in_force(), **job.settings}
        settings = in_force(job, base, training_plan(job), shape)
        self.state = SweepState(job.state, store_of(job, settings).run)

    def chosen(self) -> Candidate:
        """The candidate that is left.

        Raises:
            Diverged: there is none.
        """
        left, steps = list(self.candidates), self._first_steps()
        while True:
            ranked = self._ranked(left, steps)
            if not ranked:
                # More steps were too much for all that came so far: those let go before come back.
                left = self._not_out()
                continue
            # Where steps can grow no more, another round would find the same again.
            if len(ranked) == 1 or len(left) <= 2 or steps == self.steps:
                return ranked[0]
            left = ranked[: math.ceil(len(left) / 2)]
            steps = min(2 * steps, self.steps)

    def _first_steps(self) -> int:
        """So many that each round takes half as many in all as the training itself; or the fewest
        that tell something."""
        share = math.ceil(self.steps / (2 * len(self.candidates)))
        return min(self.steps, max(FEWEST_STEPS, share))

    def _ranked(self, left: Sequence[Candidate], steps: int) -> list[Candidate]:
        """Those that can be trained for so many steps, the lowest validation loss first."""
        found: list[tuple[float, int]] = []
        for at, candidate in enumerate(left):
            trial = self._trial(candidate, steps)
            self.trials.append(trial)
            if trial.valid_loss is None:
                self.out.append(candidate)
            else:
                found.append((trial.valid_loss, at))
        return [left[at] for _, at in sorted(found)]

    def _not_out(self) -> list[Candidate]:
        from recycle_cli.engine.training import Diverged

        there = [candidate for candidate in self.candidates if candidate not in self.out]
        if not there:
            lowest = min(candidate.get(LR, math.inf) for candidate in self.candidates)
            raise Diverged(
                f"with none of the {len(self.candidates)} candidates the loss stayed a finite "
                "number",
                "lower --lr"
                if math.isinf(lowest)
                else f"--lr auto tries none below {lowest:.3g}: give a lower one",
            )
        return there

    def _trial(self, candidate: Candidate, steps: int) -> SweepTrial:
        """What a short training gives, or gave before an interruption."""
        words = ", ".join(f"{option} {value:g}" for option, value in candidate.items())
        name = f"{words}, {steps} steps"
        start = time.perf_counter()
        try:
            if name not in self.state.trials:
                self.progress.stage(f"trying {words}", steps)
                self.state.trials[name] = self._trained(candidate, steps, name)
        finally:
            self.state.elapsed_s += time.perf_counter() - start
            # What was refused before it began leaves nothing to go on with.
            if self.state.trials or self.job.state.exists():
                self.state.save()
        shutil.rmtree(self.job.state / name, ignore_errors=True)
        return self.state.trials[name]

    def _trained(self, candidate: Candidate, steps: int, name: str) -> SweepTrial:
        from recycle_cli.engine.training import Diverged

        request = _with(self.job.request, candidate)
        request = replace(request, pace={**request.pace, "steps": steps})
        job = replace(self.job, request=request, state=self.job.state / name)
        loss: float | None
        try:
            with lora_on(job, self.base, self.progress) as ready:
                trained, _, _ = train_ready(job, ready, self.progress)
            done, loss = trained.history[-1][0], trained.best_loss
        except Diverged as error:
            self.progress.message(f"{name}: {error.message}, so it is out")
            done, loss = steps, None
        scored_after = job.settings.get("proxy_steps", 0)
        return SweepTrial.model_validate(
            {**candidate, "steps": done, "proxy_steps": scored_after, "valid_loss": loss}
        )
