"""One tuning of a `recycle tune`: what it works on, what it trains and how."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycle_cli.parameters import Value
from recycle_cli.progress import Progress
from recycle_cli.tuning.catalog import NGOPT, TuningMethod, find_tuning_method
from recycle_cli.workflows.adapters import OpenSource, Source
from recycle_cli.workflows.tune_request import TuneRequest
from recycle_cli.workflows.tune_state import start_from

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.engine.budget import Budget
    from recycle_cli.engine.encoding import Example
    from recycle_cli.engine.search import SearchPlan
    from recycle_cli.engine.training import TrainingPlan
    from recycle_cli.lora.update import ModelUpdate
    from recycle_cli.tuning.lora_form import Setup
    from recycle_cli.tuning.tuned import Ingredients, Tuned


@dataclass(frozen=True)
class Job:
    """What a run works on: `folder` is where it saves the adapter, `state` where it is kept while
    it goes on."""

    request: TuneRequest
    sources: Sequence[Source]
    target: Source | None
    train: "list[Example]"
    valid: "list[Example]"
    folder: Path
    state: Path

    @property
    def method(self) -> TuningMethod:
        """Its row in the catalog."""
        return find_tuning_method(self.request.method)

    @property
    def searches(self) -> bool:
        """Whether coefficients are searched without gradients."""
        return self.settings.get("optimizer") == NGOPT

    @property
    def mixed(self) -> list[Source]:
        """The adapters of a mixture: those of the pool, then the target LoRA."""
        return [*self.sources, *([self.target] if self.target else [])]

    @property
    def settings(self) -> dict[str, Value]:
        """The method's parameters in force."""
        started = self.request.init_from is not None
        return self.method.settings(self.request.parameters, self.target is not None, started)


def lora_setup(job: Job, base: "BaseModel") -> "Setup":
    """What the LoRA to train is made from."""
    from recycle_cli.tuning.lora_form import Setup
    from recycle_cli.tuning.target_lora import LoraRecipe

    recipe = LoraRecipe(**job.request.shape_in_force())
    return Setup(base, recipe, training_plan(job), job.train, job.request.max_memory)


def training_plan(job: Job) -> "TrainingPlan":
    """How to train, as the request and the method say."""
    from recycle_cli.engine.training import TrainingPlan

    request = job.request
    return TrainingPlan(
        **vars(request.pace_in_force()),
        micro_batch=request.micro_batch,
        checkpointing=request.checkpointing,
        seed=request.seed,
    )


def search_plan(job: Job) -> "SearchPlan":
    """How to search, likewise."""
    from recycle_cli.engine.search import SearchPlan

    pace, bound = job.request.pace_in_force(), job.settings["bound"]
    size = job.request.pace.get("batch_size", SearchPlan.batch_size)
    assert isinstance(bound, float)
    return SearchPlan(pace.steps, bound, size, seed=job.request.seed)


def build_tuned(job: Job, base: "BaseModel") -> "Tuned":
    """What is trained, at its start."""
    from recycle_cli.engine.budget import check_room

    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(s.open(job.request.base_model)) for s in job.mixed]
        entry = job.method.factor_bytes or base.dtype.itemsize
        needed = sum(one.entries for one in opened) * entry
        check_room(needed, base.compute.device, job.request.max_memory, "the adapters' factors")
        tuned = job.method.build(_ingredients(job, base, opened), job.settings)
    if job.request.init_from:
        start_from(job, job.request.init_from, tuned)
    return tuned


def mixture_plan(
    job: Job, base: "BaseModel", tuned: "Tuned"
) -> "tuple[TrainingPlan | SearchPlan, Budget]":
    """How to train it, with passes that fit into memory, and the memory that takes.

    Raises:
        RecycleError: the memory does not suffice.
    """
    from recycle_cli.engine.budget import Budget, estimate_search, free_memory, tensor_bytes
    from recycle_cli.tuning.tuned import budget_of

    limit = job.request.max_memory
    if limit is not None:
        limit = max(0, limit - tensor_bytes(tuned.held()))
    if job.searches:
        budget, searching = estimate_search(base, job.train, limit), search_plan(job)
        return budget.fitted(searching), budget
    plan = training_plan(job)
    if plan.steps == 0:  # so nothing is kept for gradients
        free = free_memory(base.compute.device) if limit is None else limit
        return plan, Budget(trained=0, fixed=0, a_row=0, free=free)
    budget = budget_of(base, tuned, job.train, plan, limit)
    return budget.fitted(plan), budget


def tell_budget(
    job: Job, plan: "TrainingPlan | SearchPlan", budget: "Budget", progress: Progress
) -> None:
    """Says what memory a training takes, and that it goes in smaller passes where it does."""
    from recycle_cli.engine.budget import in_words

    rows = plan.rows_a_pass
    asked = (search_plan(job) if job.searches else training_plan(job)).rows_a_pass
    progress.detail(
        f"training takes about {in_words(budget.needed(rows))} beyond the model and the adapters; "
        f"{in_words(budget.free)} may be taken"
    )
    if rows < asked:
        progress.message(f"memory is short: rows go {rows} at a time, where {asked} were asked for")


def _ingredients(job: Job, base: "BaseModel", opened: Sequence[OpenSource]) -> "Ingredients":
    """The adapters of a mixture, in the order of `job.mixed`."""
    from recycle_cli.tuning.tuned import Ingredients

    request = job.request
    return Ingredients(
        updates=_reinitialised(job, [one.update for one in opened]),
        target=job.mixed.index(job.target) if job.target else None,
        seed=request.seed,
        device=base.compute.device,
        dtype=base.dtype,
    )


def _reinitialised(job: Job, updates: "Sequence[ModelUpdate]") -> "list[ModelUpdate]":
    """The updates, or their random twins where the request asks for a control."""
    from recycle_cli.lora.random_twin import random_twin

    reinit, seed = job.request.reinit, job.request.seed
    return [
        update
        if reinit == "none" or (reinit != "all" and source is job.target)
        else random_twin(update, source.ref.sha256, seed, "norm" if reinit == "norm" else "spread")
        for source, update in zip(job.mixed, updates, strict=True)
    ]


def in_force(
    job: Job,
    base: "BaseModel",
    plan: "TrainingPlan | SearchPlan",
    parameters: Mapping[str, Any],
) -> dict[str, Any]:
    """Every setting that shaped the result."""
    request = job.request
    started = {"init": None} if request.init_from and "init" in parameters else {}
    return {
        **parameters,
        **started,
        **asdict(plan),
        "rows": request.rows,
        "reinit": request.reinit,
        "export_rank": request.export_rank,
        "init_from": str(request.init_from) if request.init_from else None,
        "save_dtype": request.save_dtype,
        "base_dtype": str(base.compute.dtype).removeprefix("torch."),
        "device": str(base.compute.device),
    }
