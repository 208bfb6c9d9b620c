"""`recycle tune`."""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

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
    read_inputs,
)
from recycle_cli.cli.output import Output
from recycle_cli.errors import InputError
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.choices import ACTIVATIONS, AFFINE, INITS, SCHEDULES

HELP = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
MODULE_NAME = re.compile(r"[\w.]+")
REINITS = ("none", "experts", "all")
Number = TypeVar("Number", int, float)


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
    reinit: Annotated[
        str,
        typer.Option(
            "--reinit",
            help="Control. experts: redraw the pool's adapters at random with the same spread. "
            "all: redraw the target LoRA too. none.",
        ),
    ] = "none",
    base_model: BaseModelOption = None,
    rows: RowsOption = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Default: 100 to mix, 400 for a LoRA.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Peak rate: 0.05 to mix, 0.0003 for a LoRA.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows a step.")] = 8,
    eval_every: Annotated[
        int, typer.Option("--eval-every", min=1, help="Steps between two validations.")
    ] = 10,
    schedule: Annotated[
        str,
        typer.Option("--schedule", help=f"Of the rate, after warm-up: {', '.join(SCHEDULES)}."),
    ] = "cosine",
    granularity: Annotated[
        str | None,
        typer.Option(
            "--granularity",
            help="What shares a coefficient of an adapter: all its modules (adapter), those of a "
            "layer, of a sublayer (attention, MLP), none (module); dimension: a coefficient for "
            "each rank-1 component. Default: module.",
        ),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            "--activation",
            help=f"What a coefficient goes through: {', '.join(ACTIVATIONS)} (over the adapters). "
            "Default: the method's.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init",
            help=f"Where coefficients start: {', '.join(INITS)} (1 for the target LoRA, else 0). "
            "equal is 1 / sqrt(adapters). Default: the method's.",
        ),
    ] = None,
    affine: Annotated[
        bool | None,
        typer.Option(
            "--affine/--no-affine",
            help=f"With {' or '.join(AFFINE)}: learn a scale and an offset for each group too.",
            show_default=False,
        ),
    ] = None,
    l1: Annotated[
        float | None, typer.Option("--l1", help="Weight of mean |coefficient| in the loss: 0.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="LoRA rank: 64.")] = None,
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
    save_dtype: SaveDtypeOption = "float32",
    license_: Annotated[
        str | None, typer.Option("--license", help="The licence to state in the result's card.")
    ] = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """With adapters: learn how much of each to use. Without: train a target LoRA."""
    from recycle_cli.evaluation.tasks import load_task
    from recycle_cli.workflows.adapters import resolve_names
    from recycle_cli.workflows.tune import LoraShape, MixtureShape, TuneRequest, check_request
    from recycle_cli.workflows.tune import tune as run

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    inputs = read_inputs(adapters)
    if reinit not in REINITS:
        raise InputError(f"--reinit is {reinit!r}", f"use one of: {', '.join(REINITS)}")
    for name, value in (("--lr", lr), ("--alpha", alpha)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"{name} is {value:g}", "use a number above 0")
    sources = inputs.sources(session.settings)
    targets = resolve_names([target], session.settings) if target else []
    request = TuneRequest(
        task=load_task(inputs.task_source(task)),
        base_model=inputs.base_model(base_model),
        out=Path(out),
        method=method or ("recycle" if sources or targets else "lora"),
        rows=rows,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        eval_every=eval_every,
        reinit=reinit,  # type: ignore[arg-type]  # checked above
        lora=LoraShape(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            use_rslora=rslora,
            target_modules=tuple(target_module or ()),
            rank_pattern=_parse_pattern(rank_pattern, "--rank-pattern", int),
            alpha_pattern=_parse_pattern(alpha_pattern, "--alpha-pattern", float),
        ),
        mixture=MixtureShape(granularity, activation, init, affine, l1),
        schedule=schedule,
        save_dtype=save_dtype,
        license=license_,
        seed=seed,
        force=force,
    )
    chosen = targets[0] if targets else None
    check_request(request, sources, chosen)
    base = load_base(request.base_model, session)
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
            ["adapter", "role", "mean coefficient", "largest"],
            [(a.id, a.role, a.coefficient_mean, a.coefficient_max_abs) for a in document.adapters],
        )
    for warning in document.warnings:
        output.message(f"warning: {warning}")


def _parse_pattern(
    items: Sequence[str] | None, option: str, number: Callable[[str], Number]
) -> dict[str, Number]:
    pattern = {}
    for item in items or ():
        name, _, text = item.partition("=")
        try:
            value = number(text)
            good = value > 0 and math.isfinite(value) and MODULE_NAME.fullmatch(name)
        except (ValueError, OverflowError):
            good = None
        if not good:
            raise InputError(
                f"{option} is {item!r}", "write a module and a number above 0, as in v_proj=16"
            )
        pattern[name] = value
    return pattern
