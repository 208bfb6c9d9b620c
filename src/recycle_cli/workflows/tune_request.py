"""What `recycle tune` is asked to do, and whether that can be done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from recycle_cli.errors import InputError, unknown_name
from recycle_cli.evaluation.tasks import Task, training_split
from recycle_cli.parameters import Parameter, Value
from recycle_cli.tuning.catalog import NGOPT, Pace, TuningMethod, find_tuning_method
from recycle_cli.tuning.choices import LR_SCHEDULES
from recycle_cli.tuning.lora_catalog import AUTO, PRESETS, RANK_GRID, find_preset, lora_pace
from recycle_cli.tuning.parameters import PARAMETERS
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.output_folder import check_output, check_save_dtype
from recycle_cli.workflows.provenance import shown

Reinit = Literal["none", "experts", "all", "norm"]
REINITS: tuple[Reinit, ...] = ("none", "experts", "all", "norm")
PACE = (
    Parameter("lr", float, "Peak rate.", low_is_out=True),
    Parameter("warmup", float, "Share of the steps over which the rate rises.", high=1.0),
    Parameter("weight_decay", float, "AdamW's decoupled decay."),
    Parameter("max_grad_norm", float, "Gradients are clipped to this norm.", low_is_out=True),
)
"""The ranges of a pace's numbers; the command line checks those of whole numbers itself."""
TARGET_FOLDER = "target"
LR, RANK = "lr", "rank"
LORA = "lora"
FULL = "full"
"""The rank policy that changes nothing."""


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

    def words(self, rank_option: str) -> list[str]:
        """The options that ask for it."""
        words = []
        for option, value in (
            (rank_option, self.rank),
            ("--alpha", self.alpha),
            ("--dropout", self.dropout),
        ):
            words += [option, _text(value)] if value is not None else []
        words += ["--rslora"] * self.use_rslora
        for module in self.target_modules:
            words += ["--target-module", module]
        for key, rank in self.rank_pattern.items():
            words += ["--rank-pattern", f"{key}={rank}"]
        for key, alpha in self.alpha_pattern.items():
            words += ["--alpha-pattern", f"{key}={alpha!r}"]
        return words


@dataclass(frozen=True)
class TuneRequest:
    """What to tune.

    Args:
        task: the task, with training rows.
        base_model: the canonical name of the base model.
        out: the folder to write.
        method: a name in the tuning catalog.
        parameters: those of the method that are not at their defaults.
        pace: fields of `Pace` that are not at the method's.
        rows: how many of the task's training rows may be used, validation rows included.
        reinit: replace the pool's adapters (`experts`), or the target LoRA too (`all`), by random
            ones of the same spread, or the pool's by random ones of the same norms (`norm`): the
            controls.
        lora: the LoRA's shape, where one is trained.
        preset: the name of its other defaults; None for the paper's.
        auto: what of it is to be found by short trainings: `lr`, `rank`, both or neither.
        train_target: train the target LoRA first, on the same rows with the same split.
        target_pace: fields of `Pace` for that.
        target_parameters: how that is trained, as `parameters` of `--method lora`.
        init_from: a folder that an earlier run of the same method and adapters wrote.
        export_rank: the rank policy of the export: `full`, `N` or `energy:E`.
        checkpointing: keep fewer activations.
        max_memory: bytes that training may take beyond the loaded model; None for what is free.
        micro_batch: rows a pass; None for all of a step's, or fewer where memory is short.
        resume: go on with an interrupted run of the same request.
        save_dtype: of the factors on disk.
        license: of the result, for its card; a mixture's is found from its sources.
        seed: of the split, the order of rows, the initial weights and the random control.
        force: replace `out` where it exists.
    """

    task: Task
    base_model: str
    out: Path
    method: str = "recycle"
    parameters: Mapping[str, Value] = field(default_factory=dict)
    pace: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None
    reinit: Reinit = "none"
    lora: LoraShape = field(default_factory=LoraShape)
    preset: str | None = None
    auto: tuple[str, ...] = ()
    train_target: bool = False
    target_pace: Mapping[str, Any] = field(default_factory=dict)
    target_parameters: Mapping[str, Value] = field(default_factory=dict)
    init_from: Path | None = None
    export_rank: str = FULL
    checkpointing: bool = False
    max_memory: int | None = None
    micro_batch: int | None = None
    resume: bool = False
    save_dtype: str = "float32"
    license: str | None = None
    seed: int = 0
    force: bool = False

    @property
    def state_folder(self) -> Path:
        """Where an interrupted run is kept: beside `out`."""
        out = self.out.absolute()
        return out.with_name(f".{out.name}.unfinished")

    def pace_in_force(self) -> Pace:
        """The method's pace, with what its preset, its options and the request say otherwise."""
        method = find_tuning_method(self.method)
        own: dict[str, Any] = {}
        if not method.mixes:
            preset = PRESETS[self.preset].pace if self.preset else {}
            usual = preset.get("lr", method.pace.lr)
            own = {**preset, **lora_pace(self.parameters, usual)}
        return replace(method.pace, **{**own, **self.pace})

    def shape_in_force(self) -> dict[str, Any]:
        """What the request and its preset say of the LoRA's shape."""
        preset = PRESETS[self.preset].shape if self.preset else {}
        # Until it is found, the largest stands for it: what fits then fits with all.
        widest = {RANK: RANK_GRID[-1]} if RANK in self.auto else {}
        own = {name: value for name, value in vars(self.lora).items() if value is not None}
        return {**preset, **widest, **own}

    @property
    def export_option(self) -> str:
        """The option that takes the rank policy of the export."""
        return "--rank" if find_tuning_method(self.method).mixes else "--export-rank"

    def of_target(self) -> "TuneRequest":
        """The request to train the target LoRA that this one begins with."""
        return replace(
            self,
            out=self.out / TARGET_FOLDER,
            method=LORA,
            parameters=self.target_parameters,
            pace=self.target_pace,
            reinit="none",
            train_target=False,
            target_pace={},
            target_parameters={},
            init_from=None,
            export_rank=FULL,
        )

    def command(self, sources: Sequence[Source], target: Source | None) -> list[str]:
        """The command line that asks for the same."""
        words = ["recycle", "tune", *(source.word for source in sources)]
        if self.train_target:
            words += ["--train-target"]
        elif target:
            words += ["--target", target.word]
        words += ["--task", shown(self.task.path), "--base-model", self.base_model]
        words += ["--method", self.method, "--seed", str(self.seed)]
        words += ["--rows", str(self.rows)] if self.rows is not None else []
        words += ["--license", self.license] if self.license is not None else []
        words += ["--preset", self.preset] if self.preset else []
        words += [word for name in self.auto for word in _option(name, AUTO)]
        for name, value in self.pace.items():
            words += _option(name, value) if name not in self.auto else []
        for name, value in self.target_pace.items():
            words += _option(f"target_{name}", value)
        for name, value in self.parameters.items():
            words += _parameter_words(name, value)
        for name, value in self.target_parameters.items():
            of_target = ["--target-optimizer", str(value)]
            words += of_target if name == "optimizer" else _parameter_words(name, value)
        shape = replace(self.lora, rank=None) if RANK in self.auto else self.lora
        words += shape.words("--target-rank" if self.train_target else "--rank")
        words += ["--reinit", self.reinit] * (self.reinit != "none")
        words += ["--init-from", shown(self.init_from)] if self.init_from else []
        if self.export_rank != FULL:
            words += [self.export_option, self.export_rank]
        words += ["--gradient-checkpointing"] * self.checkpointing
        words += ["--micro-batch", str(self.micro_batch)] if self.micro_batch else []
        words += ["--save-dtype", self.save_dtype] * (self.save_dtype != "float32")
        return [*words, "--out", shown(self.out)]


def _option(name: str, value: Any) -> list[str]:
    return [f"--{name.replace('_', '-')}", _text(value)]


def _parameter_words(name: str, value: Value) -> list[str]:
    option = PARAMETERS[name].option
    if isinstance(value, bool):
        return [option if value else f"--no-{option.removeprefix('--')}"]
    return [option, _text(value)]


def _text(value: Any) -> str:
    # All digits, so that the same comes out again.
    return repr(value) if isinstance(value, float) else str(value)


def check_request(request: TuneRequest, sources: Sequence[Source], target: Source | None) -> None:
    """Checks, before anything is loaded, that the request makes sense.

    Raises:
        InputError: the method is unknown or does not fit the adapters or the options given, an
            adapter is no LoRA, the task has too few training rows, or `out` exists.
    """
    from recycle_cli.lora.truncation import parse_rank_policy

    used = [*sources, *([target] if target else [])]
    read = [source.ref.path for source in used]
    read += [str(request.init_from)] if request.init_from else []
    check_output(request.out, request.force, read)
    training_split(request.task, request.seed, request.rows)
    method = find_tuning_method(request.method)
    check_save_dtype(request.save_dtype)
    parse_rank_policy(request.export_rank, request.export_option)
    _check_pace(request.pace)
    _check_pace(request.target_pace, "target_")
    _check_preset(request, method)
    _check_target(request, target)
    has_target = target is not None or request.train_target
    method.settings(request.parameters, has_target, request.init_from is not None)
    _check_use_of_options(request, method)
    _check_adapters(request, method, sources, target)
    _check_unfinished(request)


def _check_pace(pace: Mapping[str, Any], prefix: str = "") -> None:
    schedule = pace.get("lr_schedule", "cosine")
    if schedule not in LR_SCHEDULES:
        raise unknown_name("--lr-schedule", schedule, LR_SCHEDULES)
    for allowed in PACE:
        if allowed.name in pace:
            replace(allowed, name=prefix + allowed.name).check(pace[allowed.name])


def _check_preset(request: TuneRequest, method: TuningMethod) -> None:
    if request.preset:
        find_preset(request.preset)
    if request.preset and method.mixes and not request.train_target:
        raise InputError(
            f"--preset {request.preset} is about a LoRA to train, and --method {method.name} mixes "
            "adapters",
            "leave it out, or train a LoRA: --method lora, --train-target",
        )
    if request.auto and method.mixes:
        raise InputError(
            f"--{request.auto[0]} auto is about a LoRA to train, and --method {method.name} mixes "
            "adapters",
            "give a number",
        )
    if request.auto and request.pace.get("steps") == 0:
        raise InputError(
            f"--{request.auto[0]} auto finds it by short trainings, and --steps is 0",
            "give a number, or some steps",
        )


def _check_target(request: TuneRequest, target: Source | None) -> None:
    if request.train_target and target:
        raise InputError(
            "--target and --train-target both give the target LoRA", "leave one of them out"
        )
    if request.target_pace and not request.train_target:
        raise InputError(
            f"{_option('target_' + next(iter(request.target_pace)), 0)[0]} is about the target "
            "LoRA that --train-target trains",
            "give --train-target too, or leave it out",
        )
    if request.target_parameters and not request.train_target:
        raise InputError(
            "--target-optimizer is about the target LoRA that --train-target trains",
            "give --train-target too, or use --optimizer with --method lora",
        )
    if request.train_target:
        find_tuning_method(LORA).settings(request.target_parameters, target=False)
    if "lr" in request.target_pace and request.target_pace.get("steps") == 0:
        raise InputError("--target-lr has no effect with --target-steps 0", "leave one of them out")


def _check_use_of_options(request: TuneRequest, method: TuningMethod) -> None:
    """Checks that no option is without effect.

    Raises:
        InputError: one is.
    """
    if method.mixes and request.license:
        raise InputError(
            f"--license is {request.license!r}, but a mixture's licence is that of its sources",
            "leave it out; the card lists every source's licence",
        )
    if method.mixes and not request.train_target and request.lora != LoraShape():
        given = [word for word in request.lora.words("--target-rank") if word.startswith("--")]
        raise InputError(
            f"--method {method.name} trains no LoRA, so it has no use for {', '.join(given)}",
            "leave out the options that shape a LoRA, or train one: --method lora, --train-target",
        )
    if request.init_from and "init" in request.parameters:
        raise InputError(
            "--init and --init-from both say where coefficients start", "leave one of them out"
        )
    for option, unused in {
        "--init-from": request.init_from and not method.mixes,
        "--train-target": request.train_target and not method.mixes,
        "--rank": request.export_rank != FULL and method.routed,
    }.items():
        if unused:
            raise InputError(f"{option} has no effect with --method {method.name}", "leave it out")
    _check_use_of_pace(request, method)


def _check_use_of_pace(request: TuneRequest, method: TuningMethod) -> None:
    """Checks that there are steps, and gradients, where an option is about them."""
    settings = {**method.defaults, **request.parameters}
    given = set(request.pace) - {"steps"}
    if not request.train_target:
        given |= {"gradient_checkpointing"} if request.checkpointing else set()
        given |= {"micro_batch"} if request.micro_batch else set()
    option = f"--{min(given, default='').replace('_', '-')}"
    if given and settings.get("optimizer") != NGOPT and request.pace_in_force().steps == 0:
        raise InputError(
            f"{option} has no effect without steps of training",
            "say how many there shall be with --steps, or leave it out",
        )
    unfit = sorted(given - {"batch_size"})
    if unfit and settings.get("optimizer") == NGOPT:
        raise InputError(
            f"--{unfit[0].replace('_', '-')} has no effect with --optimizer ngopt, which follows "
            "no gradients",
            "leave it out",
        )


def _check_adapters(
    request: TuneRequest, method: TuningMethod, sources: Sequence[Source], target: Source | None
) -> None:
    has_target = target is not None or request.train_target
    if not method.mixes and (sources or target or request.reinit != "none"):
        raise InputError(
            f"--method {method.name} trains a LoRA of its own and takes no adapters",
            "leave them out, or mix them: --method recycle",
        )
    if request.reinit in ("experts", "norm") and not sources:
        raise InputError(
            f"--reinit {request.reinit} redraws the pool's adapters, and there are none",
            "name some, or redraw the target LoRA: --reinit all",
        )
    if method.takes == "target" and (sources or not has_target):
        raise InputError(
            f"--method {method.name} takes the target LoRA alone",
            "give it with --target, or train it: --train-target",
        )
    for source in [*sources, *([target] if target else [])]:
        source.check_is_lora()
    if method.mixes and not sources and not has_target:
        raise InputError(
            f"--method {method.name} needs adapters",
            "name some or pipe in a selection; to train a LoRA of its own: --method lora",
        )
    if target and target.ref.sha256 in {source.ref.sha256 for source in sources}:
        raise InputError(
            f"the target LoRA {target.ref.id!r} also stands among the adapters", "name it once"
        )


def _check_unfinished(request: TuneRequest) -> None:
    if request.state_folder.exists() and not (request.resume or request.force):
        raise InputError(
            f"a run to {shown(request.out)} was interrupted, and its state is kept",
            "go on with it: --resume; or start anew: --force",
        )
