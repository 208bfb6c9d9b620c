"""`recycle tune`: learn a mixture of adapters, or train a target LoRA, on a task's examples."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recycle_cli.evaluation.tasks import training_split
from recycle_cli.progress import Progress
from recycle_cli.records import (
    AdapterRef,
    BestStep,
    MixedAdapter,
    TuneDocument,
    TuneSweep,
    TuneTask,
)
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.model_card import render_card
from recycle_cli.workflows.output_folder import (
    RECORD_FILE,
    dtype_named,
    write_record,
    writing,
)
from recycle_cli.workflows.provenance import Clock
from recycle_cli.workflows.tune_card import others_licenses, tune_card, tune_warnings
from recycle_cli.workflows.tune_job import (
    Job,
    build_tuned,
    in_force,
    mixture_plan,
    tell_budget,
)
from recycle_cli.workflows.tune_lora import lora_on, train_ready
from recycle_cli.workflows.tune_request import FULL, TARGET_FOLDER, TuneRequest, check_request
from recycle_cli.workflows.tune_state import store_of, unfinished, write_mixture
from recycle_cli.workflows.tune_sweep import found_by_sweep, rate_found_by

if TYPE_CHECKING:
    from torch import Tensor

    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.engine.training import Trained
    from recycle_cli.lora.routed import RoutedAdapter
    from recycle_cli.lora.update import ModelUpdate
    from recycle_cli.tuning.lora_form import LoraForm
    from recycle_cli.tuning.tuned import Tuned

# The logits of the exported adapter are compared with those of the model as trained on this many
# training rows.
COMPARED_ROWS = 8
# Where they differ by more than this, the adapter is another model than the trained one.
ROUNDING = 1e-2


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
    sweep: TuneSweep | None = None


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
    with unfinished(request, progress) as state, writing(request.out, request.force) as folder:
        if request.train_target:
            first = Job(request.of_target(), (), None, *rows, folder / TARGET_FOLDER, state)
            target = _train_target(first, base, progress)
        return _run(Job(request, sources, target, *rows, folder, state), base, progress)


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
    job, sweep = found_by_sweep(job, base, progress)
    with rate_found_by(sweep), lora_on(job, base, progress) as ready:
        progress.stage("training a target LoRA", ready.plan.steps)
        trained, figures, settings = train_ready(job, ready, progress)
        kept = _export_lora(job, ready.form)
        logits = _compared_logits(job, base)
        return _Outcome(trained, settings, logits, [], kept, figures, sweep)


def _export_lora(job: Job, form: "LoraForm") -> float:
    """Writes the LoRA; gives the share of the squared norm that its rank limit kept."""
    policy, dtype = job.request.export_rank, dtype_named(job.request.save_dtype)
    if form.save and policy == FULL:
        form.save(job.folder, dtype)
        return 1.0
    return _write_cut(job, form.update())


def _mix(job: Job, base: "BaseModel", progress: Progress) -> _Outcome:
    from recycle_cli.tuning.tuned import fit, tokens_a_pass

    tuned = build_tuned(job, base)
    plan, budget = mixture_plan(job, base, tuned)
    tell_budget(job, plan, budget, progress)
    progress.detail(tuned.told(base, tokens_a_pass(job.train, plan)))
    progress.stage(f"mixing {len(job.mixed)} adapters", plan.steps)
    settings = in_force(job, base, plan, {**job.settings, **tuned.chosen()})
    store = store_of(job, settings)
    trained, figures = fit(base, tuned, job.train, job.valid, plan, progress, store)
    energy_kept = _export(job, tuned)
    with tuned.attached(base):
        logits = _compared_logits(job, base)
    given, new = _shares(tuned, job)
    return _Outcome(trained, settings, logits, given, energy_kept, {**figures, **new})


def _export(job: Job, tuned: "Tuned") -> float:
    """Writes the adapter, and the state to start from again beside it; gives the share of the
    squared norm that its rank limit kept, all of it where it is no LoRA."""
    from recycle_cli.lora.routed import RoutedAdapter, write_routed

    request, dtype = job.request, dtype_named(job.request.save_dtype)
    write_mixture(job, tuned)
    result = tuned.result()
    if isinstance(result, RoutedAdapter):
        refs = [source.ref for source in job.mixed]
        write_routed(job.folder, result, request.base_model, refs, dtype)
        return 1.0
    return _write_cut(job, result)


def _write_cut(job: Job, update: "ModelUpdate") -> float:
    """Writes an update, cut to the rank asked for; gives the share of its squared norm left."""
    from recycle_cli.lora.folder import write_adapter
    from recycle_cli.lora.truncation import parse_rank_policy, truncate

    request = job.request
    cut = truncate(update, parse_rank_policy(request.export_rank))
    write_adapter(job.folder, cut.update, request.base_model, dtype_named(request.save_dtype))
    return cut.energy_kept


def _compared_logits(job: Job, base: "BaseModel") -> "Tensor":
    """Logits on the first training rows, of the model as it stands."""
    import torch

    from recycle_cli.engine.forward import answer_logits, collate

    with torch.no_grad():
        return answer_logits(base, collate(base, job.train[:COMPARED_ROWS])).float()


def _shares(tuned: "Tuned", job: Job) -> tuple[list[MixedAdapter], dict[str, float]]:
    """How much of each adapter is used, and, as a figure, of the one that the method added."""
    shares = tuned.shares()
    given, new = shares[: len(job.mixed)], shares[len(job.mixed) :]
    mixed = [
        MixedAdapter(
            **source.ref.model_dump(),
            role="target" if source is job.target else "pool",
            license=source.license,
            coefficient_mean=share.mean,
            coefficient_max_abs=share.max_abs,
        )
        for source, share in zip(job.mixed, given, strict=True)
    ]
    return mixed, {"new_lora_coefficient": new[0].mean} if new else {}


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


def _lost(job: Job, base: "BaseModel", energy_kept: float) -> dict[str, float]:
    """What is left of the model as trained in the adapter that is on it: its validation loss, and
    the relative error of an update that was cut."""
    from recycle_cli.engine.training import validation_loss

    found = {"written_valid_loss": validation_loss(base, job.valid, job.train)}
    return {**found, **({"relative_error": (1 - energy_kept) ** 0.5} if energy_kept < 1 else {})}


def _describe(job: Job, base: "BaseModel", outcome: _Outcome, clock: Clock) -> TuneDocument:
    """Reads the adapter back, compares it with the model as trained, and writes the rest."""
    from recycle_cli.engine.routing import put_on

    request, task = job.request, job.request.task
    written = _read_back(job)
    with put_on(base, written.adapter):
        deviation = float((_compared_logits(job, base) - outcome.logits).abs().max())
        lost = _lost(job, base, outcome.energy_kept) if deviation > ROUNDING else {}
    there = {str(p.relative_to(job.folder)) for p in job.folder.rglob("*") if not p.is_dir()}
    document = TuneDocument(
        method=request.method,
        settings=outcome.settings,
        base_model=request.base_model,
        task=TuneTask(
            name=task.name,
            sha256=task.sha256,
            path=str(task.path),
            revision=task.revision,
            train_rows=len(job.train),
            valid_rows=len(job.valid),
        ),
        adapters=outcome.adapters,
        target=job.target.ref if job.target else None,
        best=BestStep(step=outcome.trained.best_step, valid_loss=outcome.trained.best_loss),
        history=outcome.trained.history,
        figures={**outcome.figures, **lost},
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
            outcome.sweep,
        ),
        sweep=outcome.sweep,
        **clock.fields(request.seed, request.command(job.sources, job.target)),
    )
    card = render_card(tune_card(request, document))
    (job.folder / "README.md").write_text(card, encoding="utf-8")
    write_record(job.folder / RECORD_FILE, document)
    return document
