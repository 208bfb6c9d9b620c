"""`recycle tune`: learn a mixture of adapters, or train a target LoRA, on a task's examples."""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recycle_cli import __version__
from recycle_cli.errors import InputError
from recycle_cli.evaluation.tasks import training_split
from recycle_cli.parameters import Value
from recycle_cli.progress import Progress
from recycle_cli.records import AdapterRef, BestStep, MixedAdapter, TuneDocument, TuneTask
from recycle_cli.tuning.catalog import NGOPT, TuningMethod, find_tuning_method
from recycle_cli.workflows.adapters import OpenSource, Source
from recycle_cli.workflows.model_card import render_card
from recycle_cli.workflows.output_folder import (
    RECORD_FILE,
    dtype_named,
    write_record,
    writing,
)
from recycle_cli.workflows.provenance import Clock, shown
from recycle_cli.workflows.tune_card import others_licenses, tune_card, tune_warnings
from recycle_cli.workflows.tune_request import TARGET_FOLDER, TuneRequest, check_request

if TYPE_CHECKING:
    from torch import Tensor

    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.engine.budget import Budget
    from recycle_cli.engine.encoding import Example
    from recycle_cli.engine.search import SearchPlan
    from recycle_cli.engine.store import Store
    from recycle_cli.engine.training import Trained, TrainingPlan
    from recycle_cli.lora.routed import RoutedAdapter
    from recycle_cli.lora.update import ModelUpdate
    from recycle_cli.tuning.target_lora import LoraRecipe
    from recycle_cli.tuning.tuned import Ingredients, Tuned

STATE_FILE = "mixture.safetensors"
# The logits of the exported adapter are compared with those of the model as trained on this many
# training rows.
COMPARED_ROWS = 8


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
    def mixed(self) -> list[Source]:
        """The adapters of a mixture: those of the pool, then the target LoRA."""
        return [*self.sources, *([self.target] if self.target else [])]

    @property
    def settings(self) -> dict[str, Value]:
        """The method's parameters in force."""
        return self.method.settings(self.request.parameters, self.target is not None)


@dataclass(frozen=True)
class _Outcome:
    """What a run gives to the document. `logits` are those of the model as trained on
    `_compared_logits`; `energy_kept` is that of the export's rank limit."""

    trained: "Trained"
    settings: dict[str, Any]
    logits: "Tensor"
    adapters: list[MixedAdapter] = field(default_factory=list)
    energy_kept: float = 1.0
    figures: dict[str, float] = field(default_factory=dict)


def tune(
    request: TuneRequest,
    sources: Sequence[Source],
    target: Source | None,
    base: "BaseModel",
    progress: Progress,
) -> TuneDocument:
    """Tunes and writes the result as a PEFT folder.

    Args:
        request: what to tune.
        sources: the adapters of the pool to mix; empty to train a LoRA.
        target: the target LoRA to mix in, told apart from the pool by name, never by position.
        base: the loaded base model.
        progress: told of every step.

    Raises:
        InputError: the method does not fit the adapters given, an adapter cannot be used, the
            task has too few rows, or `out` exists.
        RecycleError: training diverged, or the disk refused.
    """
    from recycle_cli.engine.encoding import encode_examples

    check_request(request, sources, target)
    train, valid = training_split(request.task, request.seed, request.rows)
    rows = encode_examples(base, train), encode_examples(base, valid)
    with _unfinished(request, progress) as state, writing(request.out, request.force) as folder:
        if request.train_target:
            first = Job(request.of_target(), (), None, *rows, folder / TARGET_FOLDER, state)
            target = _train_target(first, base, progress)
        return _run(Job(request, sources, target, *rows, folder, state), base, progress)


@contextlib.contextmanager
def _unfinished(request: TuneRequest, progress: Progress) -> Iterator[Path]:
    """Where the state of the run is kept until it has ended well, or cannot."""
    from recycle_cli.engine.training import Diverged

    state = request.state_folder
    if not request.resume:
        shutil.rmtree(state, ignore_errors=True)
    try:
        yield state
    except Diverged:
        shutil.rmtree(state, ignore_errors=True)
        raise
    except BaseException:
        if state.exists():
            progress.message(f"The run is kept in {shown(state)}: go on with it with --resume.")
        raise
    shutil.rmtree(state, ignore_errors=True)


def _train_target(job: Job, base: "BaseModel", progress: Progress) -> Source:
    """Trains the target LoRA into a folder of its own within the result's."""
    job.folder.mkdir()
    document = _run(job, base, progress)
    name = f"{job.request.out.parent.name}/{TARGET_FOLDER}"
    ref = AdapterRef(id=name, sha256=document.sha256, path=document.path)
    return Source(ref, place=job.folder)


def _run(job: Job, base: "BaseModel", progress: Progress) -> TuneDocument:
    clock = Clock()
    outcome = (_mix if job.method.mixes else _train_lora)(job, base, progress)
    return _describe(job, base, outcome, clock)


def _train_lora(job: Job, base: "BaseModel", progress: Progress) -> _Outcome:
    from recycle_cli.tuning.target_lora import (
        lora_budget,
        save_target_lora,
        target_lora,
        train_target_lora,
    )

    request, recipe, plan = job.request, lora_recipe(job), training_plan(job)
    with target_lora(base, recipe, request.seed) as peft_model:
        budget = lora_budget(base, peft_model, job.train, plan, request.max_memory)
        plan = budget.fitted(plan)
        _tell(job, plan, budget, progress)
        progress.stage("training a target LoRA", plan.steps)
        settings = _in_force(job, base, plan, vars(recipe))
        store = _store(job, settings)
        trained = train_target_lora(base, peft_model, job.train, job.valid, plan, progress, store)
        save_target_lora(peft_model, job.folder, dtype_named(request.save_dtype))
        return _Outcome(trained, settings, _compared_logits(job, base))


def lora_recipe(job: Job) -> "LoraRecipe":
    """The shape of the LoRA to train."""
    from recycle_cli.tuning.target_lora import LoraRecipe

    shape = vars(job.request.lora)
    return LoraRecipe(**{name: value for name, value in shape.items() if value is not None})


def _mix(job: Job, base: "BaseModel", progress: Progress) -> _Outcome:
    from recycle_cli.tuning.tuned import fit, tokens_a_pass

    tuned = build_tuned(job, base)
    plan, budget = mixture_plan(job, base, tuned)
    _tell(job, plan, budget, progress)
    progress.detail(tuned.told(base, tokens_a_pass(job.train, plan)))
    progress.stage(f"mixing {len(job.mixed)} adapters", plan.steps)
    settings = _in_force(job, base, plan, job.settings)
    trained = fit(base, tuned, job.train, job.valid, plan, progress, _store(job, settings))
    figures = tuned.finish()
    energy_kept = _export(job, tuned)
    with tuned.attached(base):
        logits = _compared_logits(job, base)
    return _Outcome(trained, settings, logits, _shares(tuned, job), energy_kept, figures)


def build_tuned(job: Job, base: "BaseModel") -> "Tuned":
    """What is trained, at its start."""
    from recycle_cli.engine.budget import check_room

    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(s.open(job.request.base_model)) for s in job.mixed]
        needed = sum(one.entries for one in opened) * base.dtype.itemsize
        check_room(needed, base.compute.device, job.request.max_memory, "the adapters' factors")
        tuned = job.method.build(_ingredients(job, base, opened), job.settings)
    if job.request.init_from:
        _start_from(job, tuned)
    return tuned


def mixture_plan(
    job: Job, base: "BaseModel", tuned: "Tuned"
) -> "tuple[TrainingPlan | SearchPlan, Budget]":
    """How to train it, with passes that fit into memory, and the memory that takes.

    Raises:
        RecycleError: the memory does not suffice.
    """
    from recycle_cli.engine.budget import Budget, free_memory
    from recycle_cli.engine.search import SearchPlan
    from recycle_cli.tuning.tuned import budget_of

    limit = job.request.max_memory
    searches = job.settings.get("optimizer") == NGOPT
    plan = _search_plan(job) if searches else training_plan(job)
    if isinstance(plan, SearchPlan) or plan.steps == 0:  # so nothing is kept for gradients
        free = free_memory(base.compute.device) if limit is None else limit
        return plan, Budget(trained=0, fixed=0, a_row=0, free=free)
    budget = budget_of(base, tuned, job.train, plan, limit)
    return budget.fitted(plan), budget


def _tell(
    job: Job, plan: "TrainingPlan | SearchPlan", budget: "Budget", progress: Progress
) -> None:
    """Says what memory a training takes, and that it goes in smaller passes where it does."""
    from recycle_cli.engine.budget import in_words

    rows = plan.rows_a_pass
    progress.detail(
        f"training takes about {in_words(budget.needed(rows))} beyond the model and the adapters; "
        f"{in_words(budget.free)} may be taken"
    )
    if rows < (job.request.micro_batch or plan.batch_size):
        progress.message(
            f"memory is short: the {plan.batch_size} rows of a step go {rows} at a time"
        )


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


def _export(job: Job, tuned: "Tuned") -> float:
    """Writes the adapter, and the state to start from again beside it; gives the share of the
    squared norm that its rank limit kept, all of it where it is no LoRA."""
    from recycle_cli.lora.folder import save_tensors, write_adapter
    from recycle_cli.lora.routed import RoutedAdapter, write_routed
    from recycle_cli.lora.truncation import parse_rank_policy, truncate

    request, dtype = job.request, dtype_named(job.request.save_dtype)
    save_tensors(tuned.state(), job.folder / STATE_FILE, _origin(job))
    result = tuned.result()
    if isinstance(result, RoutedAdapter):
        refs = [source.ref for source in job.mixed]
        write_routed(job.folder, result, request.base_model, refs, dtype)
        return 1.0
    cut = truncate(result, parse_rank_policy(request.export_rank))
    write_adapter(job.folder, cut.update, request.base_model, dtype)
    return cut.energy_kept


def _origin(job: Job) -> dict[str, str]:
    """What the tensors of a state are about."""
    adapters = [source.ref.sha256 for source in job.mixed]
    return {"format": "pt", "method": job.request.method, "adapters": json.dumps(adapters)}


def _start_from(job: Job, tuned: "Tuned") -> None:
    from safetensors import SafetensorError

    from recycle_cli.lora.folder import read_tensors

    assert job.request.init_from is not None
    path = job.request.init_from / STATE_FILE
    try:
        state, origin = read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"--init-from {job.request.init_from} has no readable {STATE_FILE}: {error}",
            "name a folder that recycle tune wrote from adapters",
        ) from error
    for key, words in (("method", "another method"), ("adapters", "other adapters or their order")):
        if origin.get(key) != _origin(job)[key]:
            raise InputError(
                f"{path} is about {words}: {origin.get(key)}",
                "use the same method and adapters as there",
            )
    tuned.load(state)


def _compared_logits(job: Job, base: "BaseModel") -> "Tensor":
    """Logits on the first training rows, of the model as it stands."""
    import torch

    from recycle_cli.engine.forward import answer_logits, collate

    with torch.no_grad():
        return answer_logits(base, collate(base, job.train[:COMPARED_ROWS])).float()


def _shares(tuned: "Tuned", job: Job) -> list[MixedAdapter]:
    # A method may add an adapter of its own after the given ones.
    shares = tuned.shares()[: len(job.mixed)]
    return [
        MixedAdapter(
            **source.ref.model_dump(),
            role="target" if source is job.target else "pool",
            license=source.license,
            coefficient_mean=share.mean,
            coefficient_max_abs=share.max_abs,
        )
        for source, share in zip(job.mixed, shares, strict=True)
    ]


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


def _search_plan(job: Job) -> "SearchPlan":
    from recycle_cli.engine.search import SearchPlan

    pace, bound = job.request.pace_in_force(), job.settings["bound"]
    size = job.request.pace.get("batch_size", SearchPlan.batch_size)
    assert isinstance(bound, float)
    return SearchPlan(pace.steps, bound, size, seed=job.request.seed)


def _in_force(
    job: Job,
    base: "BaseModel",
    plan: "TrainingPlan | SearchPlan",
    parameters: Mapping[str, Any],
) -> dict[str, Any]:
    """Every setting that shaped the result."""
    request = job.request
    return {
        **parameters,
        **asdict(plan),
        "rows": request.rows,
        "reinit": request.reinit,
        "export_rank": request.export_rank,
        "init_from": str(request.init_from) if request.init_from else None,
        "save_dtype": request.save_dtype,
        "base_dtype": str(base.compute.dtype).removeprefix("torch."),
        "device": str(base.compute.device),
    }


def _store(job: Job, settings: Mapping[str, Any]) -> "Store":
    """Where the run is kept while it goes on, known by all that shapes it."""
    from recycle_cli.engine.store import Store

    request = job.request
    # How many rows a pass takes depends on what memory is free; it changes no more than rounding.
    run = {
        **{name: value for name, value in settings.items() if name != "micro_batch"},
        "method": request.method,
        "base_model": request.base_model,
        "task": request.task.sha256,
        "adapters": [source.ref.sha256 for source in job.mixed],
        "target": job.target.ref.sha256 if job.target else None,
        "version": __version__,
    }
    return Store(job.state / request.method, run)


@dataclass(frozen=True)
class _Written:
    """An adapter as it was written: the largest rank of its modules, which is the sum of the ranks
    where it routes, and the sha256 of its weights."""

    adapter: "ModelUpdate | RoutedAdapter"
    rank: int
    sha256: str


def _read_back(job: Job) -> _Written:
    from recycle_cli.lora.folder import read_adapter, weights_sha256
    from recycle_cli.lora.routed import ROUTED_WEIGHTS_FILE, read_routed
    from recycle_cli.lora.update import largest_rank

    if not job.method.routed:
        update = read_adapter(job.folder).update
        return _Written(update, largest_rank(update), weights_sha256(job.folder))
    routed, _ = read_routed(job.folder)
    rank = max(len(module.owner) for module in routed.modules.values())
    return _Written(routed, rank, weights_sha256(job.folder, ROUTED_WEIGHTS_FILE))


def _describe(job: Job, base: "BaseModel", outcome: _Outcome, clock: Clock) -> TuneDocument:
    """Reads the adapter back, compares it with the model as trained, and writes the rest."""
    from recycle_cli.engine.routing import put_on

    request, task = job.request, job.request.task
    written = _read_back(job)
    with put_on(base, written.adapter):
        deviation = float((_compared_logits(job, base) - outcome.logits).abs().max())
    there = {str(p.relative_to(job.folder)) for p in job.folder.rglob("*") if not p.is_dir()}
    document = TuneDocument(
        method=request.method,
        settings=outcome.settings,
        base_model=request.base_model,
        task=TuneTask(
            name=task.name,
            sha256=task.sha256,
            path=str(task.path),
            train_rows=len(job.train),
            valid_rows=len(job.valid),
        ),
        adapters=outcome.adapters,
        target=job.target.ref if job.target else None,
        best=BestStep(step=outcome.trained.best_step, valid_loss=outcome.trained.best_loss),
        history=outcome.trained.history,
        figures=outcome.figures,
        rank=written.rank,
        energy_kept=outcome.energy_kept,
        max_logit_deviation=deviation,
        path=str(request.out.absolute()),
        files=sorted(there | {"README.md", RECORD_FILE}),
        sha256=written.sha256,
        warnings=tune_warnings(
            outcome.trained,
            others_licenses(request, outcome.adapters),
            outcome.energy_kept,
            job.method.routed,
        ),
        **clock.fields(request.seed, request.command(job.sources, job.target)),
    )
    card = render_card(tune_card(request, document))
    (job.folder / "README.md").write_text(card, encoding="utf-8")
    write_record(job.folder / RECORD_FILE, document)
    return document
