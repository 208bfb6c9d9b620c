"""The LoRA that a `recycle tune` trains."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from recycle_cli.progress import Progress
from recycle_cli.workflows.tune_job import Job, in_force, lora_setup, tell_budget
from recycle_cli.workflows.tune_state import store_of

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.engine.training import Trained, TrainingPlan
    from recycle_cli.tuning.lora_form import LoraForm, Setup


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
