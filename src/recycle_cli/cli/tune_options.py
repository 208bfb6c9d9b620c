"""The options of `recycle tune` beside methods' own parameters, and what they turn into."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from recycle_cli.errors import InputError
from recycle_cli.lora.config import MAX_RANK
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.choices import LR_SCHEDULES
from recycle_cli.tuning.lora_catalog import AUTO, LR_GRID, OPTIONS, PRESETS, RANK_GRID, names_on

_METHODS = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
_MODULE_NAME = re.compile(r"[\w.]+")
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
    """The rates that options of a LoRA to train bring, and presets."""
    rates: dict[str, list[str]] = {}
    for words, pace in (
        *((option.name, option.pace) for option in OPTIONS.values()),
        *((f"--preset {one.name}", one.pace) for one in PRESETS.values()),
    ):
        if "lr" in pace:
            rates.setdefault(f"{pace['lr']:g}", []).append(words)
    for option in OPTIONS.values():
        if option.lr_times != 1:
            times = f"{option.lr_times:.3g} times the preset's or the paper's"
            rates.setdefault(times, []).append(option.name)
    return "; ".join(f"{rate} with {', '.join(words)}" for rate, words in rates.items())


Method = Annotated[
    str | None,
    typer.Option("--method", help=f"{_METHODS}. Default: recycle with adapters, lora without."),
]
Target = Annotated[
    str | None,
    typer.Option("--target", metavar="ADAPTER", help="The target LoRA, to mix in or rescale."),
]
TrainTarget = Annotated[
    bool,
    typer.Option(
        "--train-target",
        help="Train the target LoRA first, on the same rows, into OUT/target.",
    ),
]
Reinit = Annotated[
    str,
    typer.Option(
        "--reinit",
        help="Control: redraw adapters at random. experts: the pool's, with the spread of "
        "each factor. norm: the pool's, with the norm of each module's update. all: as "
        "experts, the target LoRA too. none.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=0,
        help=f"Optimizer steps, or evaluations of a search. {_defaults('steps')}",
    ),
]
Lr = Annotated[
    str | None,
    typer.Option(
        "--lr",
        help=f"Peak rate. {_defaults('lr')} For a LoRA to train: {_own_rates()}; auto tries "
        f"{', '.join(f'{times:.3g}' for times in LR_GRID)} times its default in short runs.",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, help="Rows a step: 8; of a search, rows a pass: 32."),
]
EvalEvery = Annotated[
    int | None, typer.Option("--eval-every", min=1, help="Steps between two validations: 10.")
]
Patience = Annotated[
    int | None,
    typer.Option(
        "--patience",
        min=1,
        help=f"Stop after so many validations without a better loss. {_defaults('patience')}",
    ),
]
LrSchedule = Annotated[
    str | None,
    typer.Option(
        "--lr-schedule",
        help=f"Of the rate, after the warm-up: {', '.join(LR_SCHEDULES)} (0.85 of itself after "
        "each epoch). Default: the method's.",
    ),
]
Warmup = Annotated[
    float | None,
    typer.Option(
        "--warmup",
        help=f"Share of the steps over which the rate rises from 0. {_defaults('warmup')}",
    ),
]
WeightDecay = Annotated[
    float | None, typer.Option("--weight-decay", help="Decoupled weight decay: 0.")
]
MaxGradNorm = Annotated[
    float | None, typer.Option("--max-grad-norm", help="Gradients are clipped to this norm: 1.")
]
InitFrom = Annotated[
    Path | None,
    typer.Option(
        "--init-from",
        metavar="DIR",
        help="Start from the mixture that an earlier run of the same method and adapters "
        "wrote to DIR.",
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(
        "--rank",
        help="Of a LoRA to train: 64; auto tries "
        f"{', '.join(map(str, RANK_GRID))} in short runs. Of what a mixture is written as: "
        "full (exact, the sum of the ranks), N, or energy:0.99.",
    ),
]
ExportRank = Annotated[
    str | None,
    typer.Option(
        "--export-rank",
        help="Of a LoRA to train: the rank it is written with: full (as it is trained), N, or "
        "energy:0.99.",
    ),
]
TargetRank = Annotated[
    int | None,
    typer.Option(
        "--target-rank",
        min=1,
        max=MAX_RANK,
        help="With --train-target: its rank. Default: 64.",
    ),
]
TargetSteps = Annotated[
    int | None,
    typer.Option("--target-steps", min=0, help="With --train-target: its steps: 400."),
]
TargetLr = Annotated[
    float | None,
    typer.Option(
        "--target-lr",
        help=f"With --train-target: its rate: {METHODS['lora'].pace.lr:g}; {_own_rates()}.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        "--preset",
        help="Other defaults for a LoRA to train: "
        + "; ".join(f"{one.name}: {one.summary}" for one in PRESETS.values())
        + ".",
    ),
]
TargetOptimizer = Annotated[
    str | None,
    typer.Option(
        "--target-optimizer",
        help=f"With --train-target: its optimizer, one of {', '.join(names_on('optimizer'))}. "
        "--architecture, --schedule and --allocation are about it too, and so are the "
        "parameters of all four.",
    ),
]
Alpha = Annotated[float | None, typer.Option("--alpha", help="LoRA alpha: 16.")]
Dropout = Annotated[
    float | None, typer.Option("--dropout", min=0, max=0.99, help="LoRA dropout: 0.1.")
]
Rslora = Annotated[
    bool, typer.Option("--rslora", help="LoRA scale alpha / sqrt(rank), not alpha / rank.")
]
TargetModule = Annotated[
    list[str] | None,
    typer.Option(
        "--target-module",
        help="Adapt this module, as in q_proj; may be given several times. All linear ones.",
    ),
]
RankPattern = Annotated[
    list[str] | None,
    typer.Option("--rank-pattern", metavar="MODULE=RANK", help="Another rank for a module."),
]
AlphaPattern = Annotated[
    list[str] | None,
    typer.Option("--alpha-pattern", metavar="MODULE=ALPHA", help="Another alpha for a module."),
]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        "--micro-batch",
        min=1,
        help="Rows a pass. Default: all of a step's, or fewer where memory is short; the "
        "result is the same up to rounding.",
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="What training may take beyond the model, as in 8GB. Default: what is free.",
    ),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Compute activations again in the backward pass: less memory, more time.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Tell the memory that it would take, and stop."),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with a run that was interrupted, from where it was."),
]
License = Annotated[
    str | None, typer.Option("--license", help="The licence to state in the result's card.")
]


def those_given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def those_to_find(options: Mapping[str, str | None]) -> tuple[str, ...]:
    """Those options that are to be found."""
    return tuple(name for name, text in options.items() if text == AUTO)


def parse_rate(text: str | None) -> float | None:
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


def parse_rank(text: str | None) -> int | None:
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


def parse_pattern(
    items: Sequence[str] | None,
    option: str,
    number: Callable[[str], Number],
    highest: float = math.inf,
) -> dict[str, Number]:
    """Numbers by module, each given as MODULE=NUMBER.

    Raises:
        InputError: one is not, or its number is not above 0 and at most the highest.
    """
    pattern = {}
    allowed = "above 0" if highest == math.inf else f"from 1 to {highest}"
    for item in items or ():
        name, _, text = item.partition("=")
        try:
            value = number(text)
            good = 0 < value <= highest and math.isfinite(value) and _MODULE_NAME.fullmatch(name)
        except (ValueError, OverflowError):
            good = None
        if not good:
            raise InputError(
                f"{option} is {item!r}", f"write a module and a number {allowed}, as in v_proj=16"
            )
        pattern[name] = value
    return pattern
