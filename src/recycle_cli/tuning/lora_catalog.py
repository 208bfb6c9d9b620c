"""The ways to train a target LoRA, along four axes: a new one is a file and a row here.

Options of different axes go together unless a row says why they do not.
"""

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from recycle_cli.errors import InputError, unknown_name
from recycle_cli.parameters import Value
from recycle_cli.tuning.choices import SIZED


@dataclass(frozen=True)
class LoraOption:
    """One way along one axis.

    Args:
        axis: `optimizer`, `architecture`, `schedule` or `allocation`.
        name: what the axis's option takes; no other axis has it.
        summary: what it changes, for help, cards and pages.
        paper: its source.
        target: `module:function` under `recycle_cli.tuning`, a `Layer` of `lora_form` that is
            given its own parameters by name; empty for the ordinary way.
        defaults: its own parameters and their defaults.
        pace: fields of a method's pace that are its own, such as `lr`.
        lr_times: how many times the rate that is usual is its default, where no option in force has
            a rate of its own.
        refuses: options of other axes that it cannot be combined with, with the reason.
    """

    axis: str
    name: str
    summary: str
    paper: str
    target: str = ""
    defaults: Mapping[str, Value] = field(default_factory=dict)
    pace: Mapping[str, Any] = field(default_factory=dict)
    lr_times: float = 1.0
    refuses: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """What asks for it on the command line."""
        return f"--{self.axis} {self.name}"

    def layer(self) -> Callable[..., Any]:
        """The function that its row names."""
        module, _, name = self.target.partition(":")
        function: Callable[..., Any] = getattr(
            importlib.import_module(f"recycle_cli.tuning.{module}"), name
        )
        return function


AXES: Mapping[str, str] = {
    "architecture": "lora",
    "allocation": "uniform",
    "schedule": "plain",
    "optimizer": "adamw",
}
"""The axes and what is usual on them, in the order in which options are laid around each other."""


def _no_plain_pairs(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "what it trains is more than pairs of factors B A")


_OURS = ("dual", "res-bs", "res-is", "res-ms", "rac", "cola")
_NOT_PEFTS = dict.fromkeys(_OURS, "PEFT's optimizer knows PEFT's LoRAs alone")
_ONLY_PLAIN = {
    **dict.fromkeys(_OURS, "it reads what enters and leaves PEFT's LoRA layers"),
    **_no_plain_pairs("dora", "adalora"),
}
_NO_COINS = "its layers cannot sit out a step"
_ONE_OF_THEM = "both take the place of the ordinary LoRA"
_PREVIOUS: Mapping[str, Value] = {"previous": 4}
_BLOCKS: Mapping[str, Value] = {"blocks": 10}
_OTHER_FORMS = ("dual", "res-bs", "res-ms", "res-is", "dora")
_CHAINED = {
    **dict.fromkeys((*_OTHER_FORMS, "adalora"), _ONE_OF_THEM),
    "hetero": "its blocks have one rank in every module",
}
_PROJECTED: Mapping[str, Value] = {"inner_steps": 1, "proximal": 1e-2, "momentum": 0.9}
_ROWS = (
    LoraOption(
        "architecture", "lora", "one product of two factors in each module", "arXiv 2106.09685"
    ),
    LoraOption("allocation", "uniform", "the same rank in every module", "arXiv 2106.09685"),
    LoraOption("schedule", "plain", "everything is trained from the first step", ""),
    LoraOption("optimizer", "adamw", "Adam with decoupled weight decay", "arXiv 1711.05101"),
    LoraOption(
        "optimizer",
        "rite",
        "LoRA-RITE, Adam in coordinates of the product of the factors",
        "arXiv 2410.20625",
        target="lora_optimizers.rite:rite",
        defaults={"update_skipping": 1.0},
        pace={"lr": 3e-4},
        refuses={
            **_no_plain_pairs("dual", "adalora", "dora"),
            "res-ms": "its factors act across modules, not as pairs",
            "rac": "it moves both factors of a pair or neither, and a block trains one alone",
        },
    ),
    LoraOption(
        "optimizer",
        "oplora",
        "gradient descent of the weights themselves, projected on the rank of the LoRA",
        "arXiv 2509.19977",
        target="lora_optimizers.projected:oplora",
        defaults=_PROJECTED,
        pace={"lr": 1.0},
        refuses=_ONLY_PLAIN,
    ),
    LoraOption(
        "optimizer",
        "lorsum",
        "the same with a running mean of gradients",
        "arXiv 2602.16456",
        target="lora_optimizers.projected:lorsum",
        defaults=_PROJECTED,
        pace={"lr": 30.0},
        refuses=_ONLY_PLAIN,
    ),
    LoraOption(
        "optimizer",
        "psi-lora",
        "lorsum in a diagonal K-FAC metric",
        "arXiv 2602.16456",
        target="lora_optimizers.projected:psi_lora",
        defaults={
            **_PROJECTED,
            "metric_decay": 0.99,
            "metric_power": 0.5,
            "metric_damping": 1e-5,
        },
        pace={"lr": 30.0},
        refuses=_ONLY_PLAIN,
    ),
    LoraOption(
        "optimizer",
        "riemannian",
        "AdamW on gradients that the Gram matrix of the other factor preconditions",
        "arXiv 2402.02347",
        target="lora_optimizers.riemannian:riemannian",
        defaults={"damping": 1e-2},
        refuses={**_NOT_PEFTS, **_no_plain_pairs("adalora")},
    ),
    LoraOption(
        "optimizer",
        "lora-fa",
        "A stays as drawn, B follows the nearest to the full gradient through AdamW",
        "arXiv 2308.03303",
        target="lora_optimizers.lora_fa:lora_fa",
        refuses={
            **_NOT_PEFTS,
            **_no_plain_pairs("adalora", "dora"),
            **dict.fromkeys(
                ("copra", "hetero"), "PEFT's optimizer needs a gradient in every module"
            ),
        },
    ),
    LoraOption(
        "optimizer",
        "loraplus",
        "LoRA+, AdamW with a higher rate for B than for A",
        "arXiv 2402.12354",
        target="lora_optimizers.loraplus:loraplus",
        defaults={"lr_ratio": 16.0},
        lr_times=1 / 3,
        refuses=_NOT_PEFTS,
    ),
    LoraOption(
        "architecture",
        "dual",
        "how much an entry of a weight changes, and which way, each from a LoRA of half the rank",
        "arXiv 2512.03402",
        target="lora_architectures.dual:dual",
    ),
    LoraOption(
        "architecture",
        "res-bs",
        "ResLoRA's shortcuts of blocks, the LoRAs of the modules before applied too",
        "arXiv 2402.18039",
        target="lora_architectures.res_lora:blocks",
        defaults=_PREVIOUS,
    ),
    LoraOption(
        "architecture",
        "res-ms",
        "ResLoRA's shortcuts of the middle, A x of the modules before added to a module's own",
        "arXiv 2402.18039",
        target="lora_architectures.res_lora:middle",
        defaults=_PREVIOUS,
    ),
    LoraOption(
        "architecture",
        "res-is",
        "ResLoRA's shortcuts of inputs, that of the module before added to a LoRA's own",
        "arXiv 2402.18039",
        target="lora_architectures.res_lora:inputs",
    ),
    LoraOption(
        "architecture",
        "dora",
        "DoRA, a trained length for each row of the adapted weight",
        "arXiv 2402.09353",
        target="lora_architectures.dora:dora",
    ),
    LoraOption(
        "allocation",
        "hetero",
        "HeteroLoRA, a large rank where a proxy scores best and none elsewhere",
        "arXiv 2406.14956",
        target="lora_allocations.hetero:hetero",
        defaults={"proxy": "grad-norm", "share": 0.25, "proxy_steps": 0, "reallocate_every": 0},
        lr_times=2.0,
    ),
    LoraOption(
        "allocation",
        "adalora",
        "AdaLoRA, ranks that are cut while they are trained",
        "arXiv 2303.10512",
        target="lora_allocations.adalora:adalora",
        lr_times=5.0,
        refuses=dict.fromkeys(_OTHER_FORMS, _ONE_OF_THEM),
    ),
    LoraOption(
        "schedule",
        "copra",
        "CopRA, layers that sit out steps by chance, ever fewer",
        "arXiv 2410.22911",
        target="lora_schedules.copra:copra",
        lr_times=2.0,
        refuses={
            **dict.fromkeys(_OTHER_FORMS, _NO_COINS),
            "adalora": "it weighs the gradients of all modules in every step",
        },
    ),
    LoraOption(
        "schedule",
        "rac",
        "RAC-LoRA, a chain of LoRAs of which one random factor each is trained",
        "arXiv 2410.08305",
        target="lora_schedules.chain:rac",
        defaults=_BLOCKS,
        lr_times=2.0,
        refuses=_CHAINED,
    ),
    LoraOption(
        "schedule",
        "cola",
        "COLA, a chain of LoRAs, each trained on top of those before",
        "arXiv 2401.04151",
        target="lora_schedules.chain:cola",
        defaults=_BLOCKS,
        lr_times=2.0,
        refuses=_CHAINED,
    ),
)
OPTIONS: Mapping[str, LoraOption] = {option.name: option for option in _ROWS}


def names_on(axis: str) -> tuple[str, ...]:
    """What an axis offers."""
    return tuple(option.name for option in _ROWS if option.axis == axis)


def chosen_options(given: Mapping[str, Value]) -> list[LoraOption]:
    """The options in force, in the order of `AXES`.

    Args:
        given: names by axis, and maybe other parameters; an axis that is not there is at its usual.

    Raises:
        InputError: there is no such option; the hint names the nearest.
    """
    found = []
    for axis, usual in AXES.items():
        name = str(given.get(axis, usual))
        if name not in names_on(axis):
            raise unknown_name(f"--{axis}", name, names_on(axis))
        found.append(OPTIONS[name])
    return found


def lora_defaults(given: Mapping[str, Value]) -> dict[str, Value]:
    """The parameters there are under these options, and their defaults.

    Raises:
        InputError: as `chosen_options`.
    """
    own = [option.defaults for option in chosen_options(given)]
    return {**AXES, **{name: value for defaults in own for name, value in defaults.items()}}


def lora_pace(given: Mapping[str, Value], lr: float) -> dict[str, Any]:
    """What of the pace is set by these options.

    Args:
        given: the options by axis.
        lr: the rate that is usual.

    Raises:
        InputError: as `chosen_options`.
    """
    chosen = chosen_options(given)
    own = {name: value for option in chosen for name, value in option.pace.items()}
    return {"lr": lr * math.prod(option.lr_times for option in chosen), **own}


def takers(parameter: str) -> list[LoraOption]:
    """The options that have a parameter of their own by that name."""
    return [option for option in _ROWS if parameter in option.defaults]


def is_of_a_lora(parameter: str) -> bool:
    """Whether a parameter is about a LoRA to train and nothing else."""
    return parameter in AXES.keys() - {"optimizer"} or bool(takers(parameter))


def check_combination(given: Mapping[str, Value]) -> None:
    """Checks that options go together.

    Raises:
        InputError: two do not; both are named, with the reason.
    """
    chosen = chosen_options(given)
    for option in chosen:
        for other in chosen:
            if other.name in option.refuses:
                raise InputError(
                    f"{option.words} cannot be combined with {other.words}: "
                    f"{option.refuses[other.name]}",
                    "leave out one of them",
                )
    if OPTIONS["hetero"] in chosen:
        _check_hetero({**lora_defaults(given), **given})


def _check_hetero(settings: Mapping[str, Value]) -> None:
    """Checks that the proxy has something to score, and that the rest goes with when it does."""
    proxy, again = settings["proxy"], settings["reallocate_every"]
    if again:
        for axis in ("architecture", "schedule"):
            if settings[axis] != AXES[axis]:
                raise InputError(
                    f"--reallocate-every switches ordinary LoRAs on and off as they are trained, "
                    f"and --{axis} {settings[axis]} is another way",
                    "leave out one of them",
                )
        if settings["proxy_steps"]:
            raise InputError(
                "--proxy-steps has no effect with --reallocate-every, which scores while it trains",
                "leave out one of them",
            )
    if proxy in SIZED and not settings["proxy_steps"]:
        raise InputError(
            f"--proxy {proxy} weighs factors by their own size, and B is zero in every module at "
            "the start of a LoRA, so that all scores would be 0",
            "use --proxy grad-norm"
            if again
            else "train a little before the scores are taken: --proxy-steps 20; or use --proxy "
            "grad-norm",
        )


@dataclass(frozen=True)
class LoraPreset:
    """Defaults for a LoRA to train, in the place of a method's own.

    Args:
        name: what `--preset` takes.
        summary: whom it is for.
        shape: fields of the LoRA's shape.
        pace: fields of its pace.
    """

    name: str
    summary: str
    shape: Mapping[str, Any] = field(default_factory=dict)
    pace: Mapping[str, Any] = field(default_factory=dict)


PRESETS: Mapping[str, LoraPreset] = {
    preset.name: preset
    for preset in (
        LoraPreset("paper", "that of arXiv 2602.12323, which is the default"),
        LoraPreset(
            "small",
            "for processors: rank 8, no dropout, 100 steps at most, and an end after 4 validations "
            "without a better loss",
            {"rank": 8, "alpha": 16, "dropout": 0.0},
            {"lr": 2e-3, "steps": 100, "patience": 4},
        ),
    )
}

AUTO = "auto"
"""What asks for a sweep in the place of a number."""
LR_GRID = (1 / 3, 1.0, 3.0, 10.0)
"""The candidates of `--lr auto`, in units of the rate that is usual for the rest."""
RANK_GRID = (8, 16, 32, 64)
"""The candidates of `--rank auto`, as far as the modules' sides reach."""


def find_preset(name: str) -> LoraPreset:
    """The preset of that name.

    Raises:
        InputError: there is none; the hint names the nearest.
    """
    if name not in PRESETS:
        raise unknown_name("--preset", name, PRESETS)
    return PRESETS[name]
