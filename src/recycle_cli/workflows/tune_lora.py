"""The LoRA that a `recycle tune` trains, and the short runs that find its rate and rank."""

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from recycle_cli.progress import Progress
from recycle_cli.records import SweepTrial, TuneSweep
from recycle_cli.tuning.lora_catalog import LR_GRID, RANK_GRID
from recycle_cli.workflows.tune_job import Job, in_force, lora_setup, tell_budget
from recycle_cli.workflows.tune_request import LR, RANK, TuneRequest
from recycle_cli.workflows.tune_state import store_of

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.engine.training import Trained, TrainingPlan
    from recycle_cli.tuning.lora_form import LoraForm, Setup

FEWEST_STEPS = 10
"""Shorter runs tell candidates apart by chance."""


@dataclass(frozen=True)
class Ready:
    """A LoRA on the base model, and how it will be trained."""

    setup: "Setup"
    form: "LoraForm"
    plan: "TrainingPlan"


@contextlib.contextmanager
def lora_on(job: Job, base: "BaseModel", progress: Progress) -> Iterator[Ready]:
    """The job's LoRA on the base model, as long as the context lasts.

    Raises:
        InputError: the LoRA asked for does not fit the model.
        RecycleError: the memory does not suffice.
    """
    from recycle_cli.tuning.lora_form import form_budget, former_of

    setup = lora_setup(job, base)
    with former_of(job.settings)(setup) as form:
        budget = form_budget(setup, form, job.request.max_memory)
        plan = budget.fitted(setup.plan)
        tell_budget(job, plan, budget, progress)
        yield Ready(setup, form, plan)


def train_ready(
    job: Job, ready: Ready, progress: Progress
) -> "tuple[Trained, dict[str, float], dict[str, object]]":
    """Trains it; gives what came of it, its figures and the settings in force."""
    from recycle_cli.tuning.lora_form import train_form

    setup, plan = ready.setup, ready.plan
    settings = in_force(job, setup.base, plan, {**vars(setup.recipe), **job.settings})
    store = store_of(job, settings)
    trained, figures = train_form(setup, ready.form, job.valid, plan, progress, store)
    return trained, figures, settings


Candidate = Mapping[str, float]
"""A rate, a rank, or both, by the name of the option."""


def found_by_sweep(job: Job, base: "BaseModel", progress: Progress) -> tuple[Job, TuneSweep | None]:
    """The job with the rate and the rank that were left to be found; and how they were, where any
    were.

    By successive halving (arXiv 1502.07943): all candidates are trained for a few steps, the half
    with the lower validation losses for twice as many, from the start again, and so on.

    Raises:
        RecycleError: training diverged, or the disk refused.
    """
    if not job.request.auto:
        return job, None
    start, grid = time.perf_counter(), _grid(job, base)
    left: list[Candidate] = [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    steps, trials = _first_steps(job, len(left)), list[SweepTrial]()
    while True:
        found = [_trial(job, base, progress, candidate, steps) for candidate in left]
        trials += found
        best = sorted(zip(found, left, strict=True), key=lambda pair: pair[0].valid_loss)
        left = [candidate for _, candidate in best[: math.ceil(len(left) / 2)]]
        if len(best) <= 2:
            break
        steps = min(2 * steps, job.request.pace_in_force().steps)
    (chosen, *_) = left
    sweep = TuneSweep(
        grid={name: list(values) for name, values in grid.items()},
        trials=trials,
        chosen=dict(chosen),
        steps=sum(trial.steps for trial in trials),
        elapsed_s=time.perf_counter() - start,
    )
    return replace(job, request=_with(job.request, chosen)), sweep


def _grid(job: Job, base: "BaseModel") -> dict[str, list[float]]:
    request, grid = job.request, {}
    if LR in request.auto:
        usual = request.pace_in_force().lr
        grid[LR] = [times * usual for times in LR_GRID]
    if RANK in request.auto:
        side = min(min(shape) for shape in base.shapes.values())
        grid[RANK] = [rank for rank in RANK_GRID if rank <= side] or [side]
    return grid


def _first_steps(job: Job, candidates: int) -> int:
    """So many that each round takes half as many in all as the training itself."""
    steps = job.request.pace_in_force().steps
    return min(steps, max(FEWEST_STEPS, math.ceil(steps / (2 * candidates))))


def _trial(
    job: Job, base: "BaseModel", progress: Progress, candidate: Candidate, steps: int
) -> SweepTrial:
    name = ", ".join(f"{option} {value:g}" for option, value in candidate.items())
    request = _with(job.request, candidate)
    request = replace(request, pace={**request.pace, "steps": steps})
    trial = replace(job, request=request, state=job.state / f"{name}, {steps} steps")
    with lora_on(trial, base, progress) as ready:
        progress.stage(f"trying {name}", ready.plan.steps)
        trained, _, _ = train_ready(trial, ready, progress)
    return SweepTrial.model_validate(
        {**candidate, "steps": trained.history[-1][0], "valid_loss": trained.best_loss}
    )


def _with(request: TuneRequest, chosen: Candidate) -> TuneRequest:
    pace = {**request.pace, **({LR: chosen[LR]} if LR in chosen else {})}
    shape = replace(request.lora, rank=int(chosen[RANK])) if RANK in chosen else request.lora
    return replace(request, pace=pace, lora=shape)
