"""`recycle tune`."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

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
from recycle_cli.errors import InputError
from recycle_cli.lora.config import MAX_RANK
from recycle_cli.tuning.catalog import METHODS, find_tuning_method
from recycle_cli.tuning.choices import LR_SCHEDULES
from recycle_cli.tuning.lora_catalog import (
    AUTO,
    LR_GRID,
    OPTIONS,
    PRESETS,
    RANK_GRID,
    is_of_a_lora,
    names_on,
)
from recycle_cli.tuning.parameters import PARAMETERS

if TYPE_CHECKING:
    from recycle_cli.records import BudgetDocument

HELP = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
MODULE_NAME = re.compile(r"[\w.]+")
Number = TypeVar("Number", int, float)


def _defaults(of: str) -> str:
    """The default of a field of the pace, by method."""
    found: dict[Any, list[str]] = {}
    for method in METHODS.values():
        found.setdefault(getattr(method.pace, of), []).append(method.name)
    usual = max(found, key=lambda value: len(found[value]))
    others = [f"{v:g} for {', '.join(names)}" for v, names in found.items() if v != usual]
    return "; ".join([f"Default: {usual:g}", *others]) + "."


def _own_rates() -> str:
    """The rates that optimizers of a LoRA bring, and presets."""
    found: dict[float, list[str]] = {}
    for words, pace in (
        *((option.name, option.pace) for option in OPTIONS.values()),
        *((f"--preset {one.name}", one.pace) for one in PRESETS.values()),
    ):
        if "lr" in pace:
            found.setdefault(pace["lr"], []).append(words)
    return "; ".join(f"{rate:g} with {', '.join(words)}" for rate, words in found.items())


@with_parameters(PARAMETERS, {**OPTIONS, **METHODS})
def tune(
    context: typer.Context,
    out: OutOption,
    adapters: AdaptersArgument = None,
    task: TaskOption = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help=f"{HELP}. Default: recycle with adapters, lora without."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="ADAPTER", help="The target LoRA, to mix in or rescale."),
    ] = None,
    train_target: Annotated[
        bool,
        typer.Option(
            "--train-target",
            help="Train the target LoRA first, on the same rows, into OUT/target.",
        ),
    ] = False,
    reinit: Annotated[
        str,
        typer.Option(
            "--reinit",
            help="Control: redraw adapters at random. experts: the pool's, with the spread of "
            "each factor. norm: the pool's, with the norm of each module's update. all: as "
            "experts, the target LoRA too. none.",
        ),
    ] = "none",
    base_model: BaseModelOption = None,
    rows: RowsOption = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=0,
            help=f"Optimizer steps, or evaluations of a search. {_defaults('steps')}",
        ),
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            "--lr",
            help=f"Peak rate. {_defaults('lr')} For a LoRA to train: {_own_rates()}; auto tries "
            f"{', '.join(f'{times:.3g}' for times in LR_GRID)} times its default in short runs.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Rows a step: 8; of a search, rows a pass: 32."),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", min=1, help="Steps between two validations: 10.")
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            "--patience",
            min=1,
            help=f"Stop after so many validations without a better loss. {_defaults('patience')}",
        ),
    ] = None,
    lr_schedule: Annotated[
        str | None,
        typer.Option(
            "--lr-schedule",
            help=f"Of the rate, after the warm-up: {', '.join(LR_SCHEDULES)} (0.85 of itself after "
            "each epoch). Default: the method's.",
        ),
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(
            "--warmup",
            help=f"Share of the steps over which the rate rises from 0. {_defaults('warmup')}",
        ),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="Decoupled weight decay: 0.")
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option("--max-grad-norm", help="Gradients are clipped to this norm: 1.")
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            "--init-from",
            metavar="DIR",
            help="Start from the mixture that an earlier run of the same method and adapters "
            "wrote to DIR.",
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            help="Of a LoRA to train: 64; auto tries "
            f"{', '.join(map(str, RANK_GRID))} in short runs. Of what a mixture is written as: "
            "full (exact, the sum of the ranks), N, or energy:0.99.",
        ),
    ] = None,
    export_rank: Annotated[
        str | None,
        typer.Option(
            "--export-rank",
            help="Of a LoRA to train: the rank it is written with: full (as it is trained), N, or "
            "energy:0.99.",
        ),
    ] = None,
    target_rank: Annotated[
        int | None,
        typer.Option(
            "--target-rank",
            min=1,
            max=MAX_RANK,
            help="With --train-target: its rank. Default: 64.",
        ),
    ] = None,
    target_steps: Annotated[
        int | None,
        typer.Option("--target-steps", min=0, help="With --train-target: its steps: 400."),
    ] = None,
    target_lr: Annotated[
        float | None,
        typer.Option(
            "--target-lr",
            help=f"With --train-target: its rate: {METHODS['lora'].pace.lr:g}; {_own_rates()}.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="Other defaults for a LoRA to train: "
            + "; ".join(f"{one.name}: {one.summary}" for one in PRESETS.values())
            + ".",
        ),
    ] = None,
    target_optimizer: Annotated[
        str | None,
        typer.Option(
            "--target-optimizer",
            help=f"With --train-target: its optimizer, one of {', '.join(names_on('optimizer'))}. "
            "--architecture, --schedule and --allocation are about it too, and so are the "
            "parameters of all four.",
        ),
    ] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="LoRA alpha: 16.")] = None,
    dropout: Annotated[
        float | None, typer.Option("--dropout", min=0, max=0.99, help="LoRA dropout: 0.1.")
    ] = None,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="LoRA scale alpha / sqrt(rank), not alpha / rank.")
    ] = False,
    target_module: Annotated[
        list[str] | None,
        typer.Option(
            "--target-module",
            help="Adapt this module, as in q_proj; may be given several times. All linear ones.",
        ),
    ] = None,
    rank_pattern: Annotated[
        list[str] | None,
        typer.Option("--rank-pattern", metavar="MODULE=RANK", help="Another rank for a module."),
    ] = None,
    alpha_pattern: Annotated[
        list[str] | None,
        typer.Option("--alpha-pattern", metavar="MODULE=ALPHA", help="Another alpha for a module."),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            "--micro-batch",
            min=1,
            help="Rows a pass. Default: all of a step's, or fewer where memory is short; the "
            "result is the same up to rounding.",
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory",
            metavar="SIZE",
            help="What training may take beyond the model, as in 8GB. Default: what is free.",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations again in the backward pass: less memory, more time.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Tell the memory that it would take, and stop."),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with a run that was interrupted, from where it was."),
    ] = False,
    save_dtype: SaveDtypeOption = "float32",
    license_: Annotated[
        str | None, typer.Option("--license", help="The licence to state in the result's card.")
    ] = None,
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
    given = _given(parameters)
    of_target = {n: v for n, v in given.items() if train_target and is_of_a_lora(n)}
    request = TuneRequest(
        task=load_task(inputs.task_source(task)),
        base_model=inputs.base_model(base_model),
        out=Path(out),
        method=method,
        parameters={name: value for name, value in given.items() if name not in of_target},
        pace=_given(
            {
                "steps": steps,
                "lr": _rate(lr),
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
            rank=_lora_rank(rank) if trains_lora else target_rank,
            alpha=alpha,
            dropout=dropout,
            use_rslora=rslora,
            target_modules=tuple(target_module or ()),
            rank_pattern=_parse_pattern(rank_pattern, "--rank-pattern", int, MAX_RANK),
            alpha_pattern=_parse_pattern(alpha_pattern, "--alpha-pattern", float),
        ),
        preset=preset,
        auto=_auto({"lr": lr, "rank": rank}),
        train_target=train_target,
        target_pace=_given({"steps": target_steps, "lr": target_lr}),
        target_parameters={**_given({"optimizer": target_optimizer}), **of_target},
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
        return
    output.text(
        f"{document.path}: {document.method}, best step {document.best.step}, "
        f"validation loss {document.best.valid_loss:.4f}, rank {document.rank}, "
        f"{document.elapsed_s:.0f} s"
    )
    if document.adapters:
        output.table(
            "What it mixes",
            ["adapter", "role", find_tuning_method(method).figure, "largest"],
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


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _auto(options: Mapping[str, str | None]) -> tuple[str, ...]:
    """Those options that are to be found."""
    return tuple(name for name, text in options.items() if text == AUTO)


def _rate(text: str | None) -> float | None:
    """The rate; None where it is not given, or to be found.

    Raises:
        InputError: it is no number.
    """
    if text is None or text == AUTO:
        return None
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--lr is {text!r}", "use a number above 0, or auto") from None


def _lora_rank(text: str | None) -> int | None:
    """The rank of a LoRA to train; None where it is not given, or to be found.

    Raises:
        InputError: it is no number from 1.
    """
    if text is None or text == AUTO:
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_RANK:
        raise InputError(
            f"--rank is {text!r}", f"the rank of a LoRA is a whole number from 1 to {MAX_RANK}"
        )
    return int(text)


def _parse_pattern(
    items: Sequence[str] | None,
    option: str,
    number: Callable[[str], Number],
    highest: float = math.inf,
) -> dict[str, Number]:
    pattern = {}
    allowed = "above 0" if highest == math.inf else f"from 1 to {highest}"
    for item in items or ():
        name, _, text = item.partition("=")
        try:
            value = number(text)
            good = 0 < value <= highest and math.isfinite(value) and MODULE_NAME.fullmatch(name)
        except (ValueError, OverflowError):
            good = None
        if not good:
            raise InputError(
                f"{option} is {item!r}", f"write a module and a number {allowed}, as in v_proj=16"
            )
        pattern[name] = value
    return pattern
