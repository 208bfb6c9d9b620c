"""`recycle tune`: learn a mixture of adapters, or train a target LoRA, on a task's examples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recycle_cli.errors import InputError, unknown_name
from recycle_cli.evaluation.tasks import Task, training_split
from recycle_cli.progress import Progress
from recycle_cli.records import BestStep, MixedAdapter, TuneDocument, TuneTask
from recycle_cli.tuning.catalog import TuningMethod, find_tuning_method
from recycle_cli.workflows.adapters import Source, load_updates
from recycle_cli.workflows.licenses import card_licenses, license_warnings
from recycle_cli.workflows.model_card import Card, CardSource, render_card
from recycle_cli.workflows.output_folder import (
    RECORD_FILE,
    check_output,
    check_save_dtype,
    dtype_named,
    write_record,
    writing,
)
from recycle_cli.workflows.provenance import Clock, shown

if TYPE_CHECKING:
    from torch import Tensor

    from recycle_cli.engine.base_model import BaseModel
    from recycle_cli.engine.encoding import Example
    from recycle_cli.engine.training import Trained, TrainingPlan
    from recycle_cli.lora.update import ModelUpdate
    from recycle_cli.tuning.mixture import Mixture, MixtureRecipe

Reinit = Literal["none", "experts", "all"]
# The logits of the exported adapter are compared with those of the model as trained on this many
# training rows.
COMPARED_ROWS = 8


@dataclass(frozen=True)
class LoraShape:
    """The shape of a LoRA to train; None takes the paper's value (arXiv 2602.12323)."""

    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    use_rslora: bool = False
    target_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MixtureShape:
    """The form of a mixture; None takes the method's. See `tuning.mixture.MixtureRecipe`."""

    granularity: str | None = None
    activation: str | None = None
    init: str | None = None
    affine: bool | None = None
    l1: float | None = None

    def given(self) -> dict[str, Any]:
        """What is not left to the method."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class TuneRequest:
    """What to tune.

    Args:
        task: the task, with training rows.
        base_model: the canonical name of the base model.
        out: the folder to write.
        method: a name in the tuning catalog.
        rows: how many of the task's training rows may be used, validation rows included.
        steps: optimizer steps, or None for the method's own number.
        lr: peak learning rate, or None for the method's own.
        batch_size: examples a step.
        eval_every: steps between two validations.
        reinit: replace the adapters (`experts`), or the target LoRA too (`all`), by random ones
            of the same spread: the control.
        lora: the LoRA's shape, for `--method lora`.
        mixture: the mixture's form, for methods that mix.
        schedule: how the rate goes on after the warm-up: `cosine`, `linear` or `constant`.
        save_dtype: of the factors on disk.
        license: of the result, for its card; a mixture's is found from its sources.
        seed: of the split, the order of rows, the initial weights and the random control.
        force: replace `out` where it exists.
    """

    task: Task
    base_model: str
    out: Path
    method: str = "recycle"
    rows: int | None = None
    steps: int | None = None
    lr: float | None = None
    batch_size: int = 8
    eval_every: int = 10
    reinit: Reinit = "none"
    lora: LoraShape = field(default_factory=LoraShape)
    mixture: MixtureShape = field(default_factory=MixtureShape)
    schedule: str = "cosine"
    save_dtype: str = "float32"
    license: str | None = None
    seed: int = 0
    force: bool = False

    def command(self, sources: Sequence[Source], target: Source | None) -> list[str]:
        """The command line that asks for the same."""
        words = ["recycle", "tune", *(source.word for source in sources)]
        words += ["--target", target.word] if target else []
        words += ["--task", shown(self.task.path), "--base-model", self.base_model]
        words += ["--method", self.method, "--seed", str(self.seed)]
        optional: dict[str, object] = {
            "--rows": self.rows,
            "--steps": self.steps,
            "--lr": self.lr,
            "--batch-size": self.batch_size,
            "--eval-every": self.eval_every,
            "--rank": self.lora.rank,
            "--alpha": self.lora.alpha,
            "--dropout": self.lora.dropout,
            "--license": self.license,
        }
        for name, value in optional.items():
            words += [name, f"{value:g}" if isinstance(value, float) else str(value)] * (
                value is not None
            )
        for name, value in self.mixture.given().items():
            if name == "affine":
                words += ["--affine" if value else "--no-affine"]
            else:
                words += [f"--{name}", f"{value:g}" if isinstance(value, float) else str(value)]
        words += ["--schedule", self.schedule] * (self.schedule != "cosine")
        words += ["--reinit", self.reinit] * (self.reinit != "none")
        words += ["--rslora"] * self.lora.use_rslora
        for module in self.lora.target_modules:
            words += ["--target-module", module]
        for key, rank in self.lora.rank_pattern.items():
            words += ["--rank-pattern", f"{key}={rank}"]
        for key, alpha in self.lora.alpha_pattern.items():
            words += ["--alpha-pattern", f"{key}={alpha:g}"]
        words += ["--save-dtype", self.save_dtype] * (self.save_dtype != "float32")
        return [*words, "--out", shown(self.out)]


@dataclass(frozen=True)
class _Job:
    """What a run of either kind works on. `folder` is where it saves the adapter."""

    request: TuneRequest
    sources: Sequence[Source]
    target: Source | None
    train: "list[Example]"
    valid: "list[Example]"
    folder: Path

    @property
    def mixed(self) -> list[Source]:
        """The adapters of a mixture: those of the pool, then the target LoRA."""
        return [*self.sources, *([self.target] if self.target else [])]


@dataclass(frozen=True)
class _Outcome:
    """What a run of either kind gives to the document. `logits` are those of the model as trained
    on `_compared_batch`."""

    trained: "Trained"
    settings: dict[str, Any]
    adapters: list[MixedAdapter]
    logits: "Tensor"


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

    clock = Clock()
    check_request(request, sources, target)
    method = find_tuning_method(request.method)
    train, valid = training_split(request.task, request.seed, request.rows)
    with writing(request.out, request.force) as folder:
        job = _Job(
            request,
            sources,
            target,
            encode_examples(base, train),
            encode_examples(base, valid),
            folder,
        )
        outcome = (_mix if method.mixes else _train_lora)(job, base, progress)
        return _describe(job, base, outcome, clock)


def check_request(request: TuneRequest, sources: Sequence[Source], target: Source | None) -> None:
    """Checks, before anything is loaded, that the request makes sense.

    Raises:
        InputError: the method is unknown or does not fit the adapters given, the task has too few
            training rows, or `out` exists.
    """
    used = [*sources, *([target] if target else [])]
    check_output(request.out, request.force, [source.ref.path for source in used])
    training_split(request.task, request.seed, request.rows)
    method = find_tuning_method(request.method)
    check_save_dtype(request.save_dtype)
    if not method.mixes and (sources or target or request.reinit != "none"):
        raise InputError(
            f"--method {method.name} trains a LoRA of its own and takes no adapters",
            "leave them out, or mix them: --method recycle",
        )
    if method.mixes and request.license:
        raise InputError(
            f"--license is {request.license!r}, but a mixture's licence is that of its sources",
            "leave it out; the card lists every source's licence",
        )
    if method.mixes and request.lora != LoraShape():
        given = [name for name, value in vars(request.lora).items() if value]
        raise InputError(
            f"--method {method.name} trains no LoRA, so it has no use for {', '.join(given)}",
            "leave out the options that shape a LoRA, or train one: --method lora",
        )
    _check_mixture(request, method, target)
    if request.reinit == "experts" and not sources:
        raise InputError(
            "--reinit experts redraws the pool's adapters, and there are none",
            "name some, or redraw the target LoRA: --reinit all",
        )
    if method.target_only and (sources or target is None):
        raise InputError(
            f"--method {method.name} takes the target LoRA alone", "give it with --target"
        )
    if method.mixes and not sources and target is None:
        raise InputError(
            f"--method {method.name} needs adapters",
            "name some or pipe in a selection; to train a LoRA of its own: --method lora",
        )
    if target and target.ref.sha256 in {source.ref.sha256 for source in sources}:
        raise InputError(
            f"the target LoRA {target.ref.id!r} also stands among the adapters", "name it once"
        )


def _check_mixture(request: TuneRequest, method: TuningMethod, target: Source | None) -> None:
    """Checks the options that shape a mixture.

    Raises:
        InputError: one is out of range, or has no effect.
    """
    from recycle_cli.tuning.choices import ACTIVATIONS, AFFINE, GRANULARITIES, INITS, SCHEDULES

    given = request.mixture.given()
    if given and not method.mixes:
        raise InputError(
            f"--method {method.name} mixes nothing, so it has no use for "
            f"{', '.join(f'--{name}' for name in given)}",
            "leave out the options that shape a mixture",
        )
    choices = {
        "granularity": GRANULARITIES,
        "activation": ACTIVATIONS,
        "init": INITS,
        "schedule": SCHEDULES,
    }
    for name, allowed in choices.items():
        value = {**given, "schedule": request.schedule}.get(name)
        if value is not None and value not in allowed:
            raise unknown_name(f"--{name}", str(value), allowed)
    form = {**method.mixture, **given}
    if form.get("affine") and form.get("activation") not in AFFINE:
        raise InputError(
            "--affine has no effect with this activation",
            f"leave it out, or use --activation {' or '.join(AFFINE)}",
        )
    if form.get("init") == "one-hot" and target is None:
        raise InputError("--init one-hot starts at the target LoRA", "give it with --target")
    if request.mixture.l1 is not None and not 0 <= request.mixture.l1 < math.inf:
        raise InputError(f"--l1 is {request.mixture.l1:g}", "use a number from 0")


def _train_lora(job: _Job, base: "BaseModel", progress: Progress) -> _Outcome:
    from recycle_cli.tuning.target_lora import (
        LoraRecipe,
        save_target_lora,
        target_lora,
        train_target_lora,
    )

    request = job.request
    given = {name: value for name, value in vars(request.lora).items() if value is not None}
    recipe = LoraRecipe(**given)
    plan = _plan(request)
    progress.stage("training a target LoRA", plan.steps)
    with target_lora(base, recipe, request.seed) as peft_model:
        trained = train_target_lora(base, peft_model, job.train, job.valid, plan, progress)
        save_target_lora(peft_model, job.folder, dtype_named(request.save_dtype))
        settings = _in_force(request, base, plan, vars(recipe))
        return _Outcome(trained, settings, [], _compared_logits(job, base))


def _mix(job: _Job, base: "BaseModel", progress: Progress) -> _Outcome:
    from recycle_cli.engine.adapted import attached
    from recycle_cli.lora.folder import write_adapter
    from recycle_cli.tuning.mixture import Mixture, train_mixture

    request = job.request
    recipe = mixture_recipe(request)
    plan = _plan(request)
    updates = _reinitialised(job, load_updates(job.mixed, request.base_model))
    target = job.mixed.index(job.target) if job.target else None
    mixture = Mixture(updates, recipe, base.compute.device, target, request.seed)
    progress.stage(f"mixing {len(updates)} adapters", plan.steps)
    trained = train_mixture(base, mixture, job.train, job.valid, plan, progress)
    write_adapter(job.folder, mixture.folded(), request.base_model, dtype_named(request.save_dtype))
    settings = _in_force(request, base, plan, vars(recipe))
    with attached(base, mixture.components, mixture.gates()):
        return _Outcome(trained, settings, _coefficients(mixture, job), _compared_logits(job, base))


def _compared_logits(job: _Job, base: "BaseModel") -> "Tensor":
    """Logits on the first training rows, of the model as it stands."""
    import torch

    from recycle_cli.engine.forward import answer_logits, collate

    with torch.no_grad():
        return answer_logits(base, collate(base, job.train[:COMPARED_ROWS])).float()


def _reinitialised(job: _Job, updates: "list[ModelUpdate]") -> "list[ModelUpdate]":
    """The updates, or their random twins where the request asks for the control."""
    from recycle_cli.lora.random_twin import random_twin

    reinit, seed = job.request.reinit, job.request.seed
    return [
        update
        if reinit == "none" or (reinit == "experts" and source is job.target)
        else random_twin(update, source.ref.sha256, seed)
        for source, update in zip(job.mixed, updates, strict=True)
    ]


def _coefficients(mixture: "Mixture", job: _Job) -> list[MixedAdapter]:
    values = mixture.activated()
    return [
        MixedAdapter(
            **source.ref.model_dump(),
            role="target" if source is job.target else "pool",
            license=source.license,
            coefficient_mean=float(column.mean()),
            coefficient_max_abs=float(column.abs().max()),
        )
        for source, column in zip(job.mixed, values.T, strict=True)
    ]


def _plan(request: TuneRequest) -> "TrainingPlan":
    from recycle_cli.engine.training import TrainingPlan

    method = find_tuning_method(request.method)
    return TrainingPlan(
        steps=request.steps or method.steps,
        lr=request.lr or method.lr,
        schedule=request.schedule,
        batch_size=request.batch_size,
        eval_every=request.eval_every,
        seed=request.seed,
    )


def mixture_recipe(request: TuneRequest) -> "MixtureRecipe":
    """The form of the mixture: the method's, with what the request says otherwise."""
    from recycle_cli.tuning.mixture import MixtureRecipe

    method = find_tuning_method(request.method)
    return replace(MixtureRecipe(), **{**method.mixture, **request.mixture.given()})


def _in_force(
    request: TuneRequest, base: "BaseModel", plan: "TrainingPlan", recipe: Mapping[str, Any]
) -> dict[str, Any]:
    """Every setting that shaped the result."""
    return {
        **recipe,
        **vars(plan),
        "rows": request.rows,
        "reinit": request.reinit,
        "save_dtype": request.save_dtype,
        "base_dtype": str(base.compute.dtype).removeprefix("torch."),
        "device": str(base.compute.device),
    }


def _describe(job: _Job, base: "BaseModel", outcome: _Outcome, clock: Clock) -> TuneDocument:
    """Reads the adapter back, compares it with the model as trained, and writes the rest."""
    from recycle_cli.engine.adapted import with_adapter
    from recycle_cli.lora.folder import read_adapter, weights_sha256
    from recycle_cli.lora.update import largest_rank

    request, task = job.request, job.request.task
    written = read_adapter(job.folder).update
    with with_adapter(base, written):
        deviation = float((_compared_logits(job, base) - outcome.logits).abs().max())
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
        rank=largest_rank(written),
        max_logit_deviation=deviation,
        path=str(request.out.absolute()),
        sha256=weights_sha256(job.folder),
        warnings=_warnings(outcome),
        **clock.fields(request.seed, request.command(job.sources, job.target)),
    )
    card = render_card(_card(request, document))
    (job.folder / "README.md").write_text(card, encoding="utf-8")
    write_record(job.folder / RECORD_FILE, document)
    return document


def _warnings(outcome: _Outcome) -> list[str]:
    warnings = license_warnings([adapter.license for adapter in outcome.adapters])
    if outcome.trained.best_step == 0:
        warnings.append(
            "No step had a lower validation loss than the start, so the start was kept: "
            "training changed nothing."
        )
    return warnings


def _card(request: TuneRequest, document: TuneDocument) -> Card:
    method, task = find_tuning_method(document.method), document.task
    control = {
        "none": "",
        "experts": " Control: the pool's adapters were replaced by noise.",
        "all": " Control: all adapters were replaced by noise.",
    }[request.reinit]
    licenses = [adapter.license for adapter in document.adapters]
    what = method.summary[0].upper() + method.summary[1:]
    return Card(
        title=Path(document.path).name,
        summary=f"{what} ({method.paper}), tuned on {task.train_rows} rows of {task.name}."
        + control,
        base_model=document.base_model,
        sources=[
            CardSource(a.id, a.revision, a.sha256, a.coefficient_mean, a.license)
            for a in document.adapters
        ],
        figure="mean coefficient",
        facts=[
            f"Task {task.name} (rows sha256 `{task.sha256[:12]}`): {task.train_rows} rows to train "
            f"on, {task.valid_rows} to validate.",
            f"Best step {document.best.step}, validation loss {document.best.valid_loss:.4f} nats.",
            f"Largest rank {document.rank}; the written adapter's logits are within "
            f"{document.max_logit_deviation:.2g} of the trained model's.",
        ],
        command=" ".join(document.command),
        warnings=document.warnings,
        licenses=[request.license] if request.license else card_licenses(licenses),
    )
