"""`recycle tune`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from recycle_cli.cli import tune_options
from recycle_cli.cli.options import (
    AdaptersArgument,
    BaseModelOption,
    ForceOption,
    JsonOption,
    OutOption,
    RowsOption,
    SaveDtypeOption,
    SeedOption,
    Session,
    TaskOption,
    load_base,
    parse_size,
    read_inputs,
)
from recycle_cli.cli.output import Output
from recycle_cli.cli.parameters import with_parameters
from recycle_cli.cli.tune_options import (
    parse_pattern,
    parse_rank,
    parse_rate,
    those_given,
    those_to_find,
)
from recycle_cli.errors import InputError
from recycle_cli.lora.config import MAX_RANK
from recycle_cli.tuning.catalog import METHODS, find_tuning_method
from recycle_cli.tuning.lora_catalog import (
    OPTIONS,
    is_of_a_lora,
)
from recycle_cli.tuning.parameters import PARAMETERS

if TYPE_CHECKING:
    from recycle_cli.records import BudgetDocument, TuneDocument


@with_parameters(PARAMETERS, {**OPTIONS, **METHODS})
def tune(
    context: typer.Context,
    out: OutOption,
    adapters: AdaptersArgument = None,
    task: TaskOption = None,
    method: tune_options.Method = None,
    target: tune_options.Target = None,
    train_target: tune_options.TrainTarget = False,
    reinit: tune_options.Reinit = "none",
    base_model: BaseModelOption = None,
    rows: RowsOption = None,
    steps: tune_options.Steps = None,
    lr: tune_options.Lr = None,
    batch_size: tune_options.BatchSize = None,
    eval_every: tune_options.EvalEvery = None,
    patience: tune_options.Patience = None,
    lr_schedule: tune_options.LrSchedule = None,
    warmup: tune_options.Warmup = None,
    weight_decay: tune_options.WeightDecay = None,
    max_grad_norm: tune_options.MaxGradNorm = None,
    init_from: tune_options.InitFrom = None,
    rank: tune_options.Rank = None,
    export_rank: tune_options.ExportRank = None,
    target_rank: tune_options.TargetRank = None,
    target_steps: tune_options.TargetSteps = None,
    target_lr: tune_options.TargetLr = None,
    preset: tune_options.Preset = None,
    target_optimizer: tune_options.TargetOptimizer = None,
    alpha: tune_options.Alpha = None,
    dropout: tune_options.Dropout = None,
    rslora: tune_options.Rslora = False,
    target_module: tune_options.TargetModule = None,
    rank_pattern: tune_options.RankPattern = None,
    alpha_pattern: tune_options.AlphaPattern = None,
    micro_batch: tune_options.MicroBatch = None,
    max_memory: tune_options.MaxMemory = None,
    gradient_checkpointing: tune_options.GradientCheckpointing = False,
    dry_run: tune_options.DryRun = False,
    resume: tune_options.Resume = False,
    save_dtype: SaveDtypeOption = "float32",
    license_: tune_options.License = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    json: JsonOption = False,
    **parameters: Any,
) -> None:
    """With adapters: learn how much of each to use. Without: train a target LoRA."""
    from recycle_cli.evaluation.tasks import load_task
    from recycle_cli.workflows.adapters import resolve_names, target_of_documents
    from recycle_cli.workflows.tune import tune as run
    from recycle_cli.workflows.tune_budget import budgets
    from recycle_cli.workflows.tune_request import REINITS, LoraShape, TuneRequest, check_request

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    inputs = read_inputs(adapters)
    wanted_reinit = next((word for word in REINITS if word == reinit), None)
    if wanted_reinit is None:
        raise InputError(f"--reinit is {reinit!r}", f"use one of: {', '.join(REINITS)}")
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise InputError(f"--alpha is {alpha:g}", "use a number above 0")
    sources = inputs.sources(session.settings)
    targets = resolve_names([target], session.settings) if target else []
    if not target and not train_target:
        marked = target_of_documents(inputs.documents)
        targets = [source for source in sources if source.ref.sha256 == marked]
        sources = [source for source in sources if source.ref.sha256 != marked]
    mixes = bool(sources or targets or train_target)
    method = method or ("recycle" if mixes else "lora")
    trains_lora = not find_tuning_method(method).mixes
    if trains_lora and target_rank is not None:
        raise InputError(
            "--target-rank is about the target LoRA that --train-target trains", "use --rank"
        )
    if export_rank is not None and not trains_lora:
        raise InputError("--export-rank is about a LoRA to train", "use --rank for a mixture's")
    given = those_given(parameters)
    of_target = {n: v for n, v in given.items() if train_target and is_of_a_lora(n)}
    request = TuneRequest(
        task=load_task(inputs.task_source(task)),
        base_model=inputs.base_model(base_model),
        out=Path(out),
        method=method,
        parameters={name: value for name, value in given.items() if name not in of_target},
        pace=those_given(
            {
                "steps": steps,
                "lr": parse_rate(lr),
                "batch_size": batch_size,
                "eval_every": eval_every,
                "patience": patience,
                "lr_schedule": lr_schedule,
                "warmup": warmup,
                "weight_decay": weight_decay,
                "max_grad_norm": max_grad_norm,
            }
        ),
        rows=rows,
        reinit=wanted_reinit,
        lora=LoraShape(
            rank=parse_rank(rank) if trains_lora else target_rank,
            alpha=alpha,
            dropout=dropout,
            use_rslora=rslora,
            target_modules=tuple(target_module or ()),
            rank_pattern=parse_pattern(rank_pattern, "--rank-pattern", int, MAX_RANK),
            alpha_pattern=parse_pattern(alpha_pattern, "--alpha-pattern", float),
        ),
        preset=preset,
        auto=those_to_find({"lr": lr, "rank": rank}),
        train_target=train_target,
        target_pace=those_given({"steps": target_steps, "lr": target_lr}),
        target_parameters={**those_given({"optimizer": target_optimizer}), **of_target},
        init_from=init_from,
        export_rank=(export_rank if trains_lora else rank) or "full",
        checkpointing=gradient_checkpointing,
        micro_batch=micro_batch,
        max_memory=parse_size(max_memory, "--max-memory"),
        resume=resume,
        save_dtype=save_dtype,
        license=license_,
        seed=seed,
        force=force,
    )
    chosen = targets[0] if targets else None
    check_request(request, sources, chosen)
    base = load_base(request.base_model, session)
    if dry_run:
        _tell_budgets(output, budgets(request, sources, chosen, base))
        return
    with output.progress() as progress:
        document = run(request, sources, chosen, base, progress)
    if json:
        output.document(document)
    else:
        _tell(output, document)


def _tell(output: Output, document: "TuneDocument") -> None:
    output.text(
        f"{document.path}: {document.method}, best step {document.best.step}, "
        f"validation loss {document.best.valid_loss:.4f}, rank {document.rank}, "
        f"{document.elapsed_s:.0f} s"
    )
    if document.adapters:
        output.table(
            "What it mixes",
            ["adapter", "role", find_tuning_method(document.method).figure, "largest"],
            [(a.id, a.role, a.coefficient_mean, a.coefficient_max_abs) for a in document.adapters],
        )
    for warning in document.warnings:
        output.message(f"warning: {warning}")


def _tell_budgets(output: Output, documents: "list[BudgetDocument]") -> None:
    if output.json:
        for document in documents:
            output.document(document)
        return
    from recycle_cli.engine.budget import in_words

    rows = [
        (
            document.method,
            in_words(document.model_bytes),
            in_words(document.adapters_bytes),
            in_words(document.training_bytes),
            in_words(document.free_bytes),
            f"{document.rows_a_pass} of {document.batch_size}",
        )
        for document in documents
    ]
    headings = ["method", "model", "adapters", "training takes", "may be taken", "rows a pass"]
    output.table("Memory", headings, rows)
