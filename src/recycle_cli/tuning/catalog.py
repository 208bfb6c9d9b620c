"""The tuning methods there are. A new one is a file beside this one and a row here."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from recycle_cli.errors import InputError, unknown_name
from recycle_cli.parameters import Value
from recycle_cli.tuning.choices import AFFINE, OPTIMIZERS
from recycle_cli.tuning.lora_catalog import (
    AXES,
    check_combination,
    lora_defaults,
    names_on,
    takers,
)
from recycle_cli.tuning.parameters import PARAMETERS

if TYPE_CHECKING:
    from recycle_cli.tuning.tuned import Ingredients, Tuned

Takes = Literal["nothing", "target", "adapters"]
NGOPT = "ngopt"
COEFFICIENT = "mean coefficient"
SHAPING = (
    "granularity",
    "activation",
    "affine",
    "new_rank",
    "reduce_rank",
    "top_k",
    "temperature",
)
"""The parameters that say what the numbers of a mixture mean: to start from those of an earlier
run, they have to be the same."""


@dataclass(frozen=True)
class Pace:
    """How long and how fast a method trains: the defaults of the options of the same names.

    Args:
        lr: peak learning rate.
        steps: optimizer steps, or evaluations of a gradient-free search.
        batch_size: rows a step.
        lr_schedule: of the rate, after the warm-up.
        warmup: share of the steps over which the rate rises from 0.
        weight_decay: AdamW's decoupled decay.
        max_grad_norm: gradients are scaled down to this norm.
        eval_every: steps between two validations.
        patience: stop after this many validations without a better loss.
    """

    lr: float = 5e-2
    steps: int = 100
    batch_size: int = 8
    lr_schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_every: int = 10
    patience: int = 20


@dataclass(frozen=True)
class TuningMethod:
    """A way to tune.

    Args:
        name: what `--method` takes.
        summary: what it learns, for the help and for cards.
        detail: what else to know, a sentence or two.
        formula: of one module.
        paper: its source.
        takes: `adapters` to mix, the `target` LoRA alone, or `nothing`, where it trains a LoRA.
        target: `module:function` under `recycle_cli.tuning`, which takes the ingredients and the
            method's parameters and gives what is trained; empty for a method that takes nothing.
        fixed: what else the function is given.
        defaults: its parameters and their defaults; those of a LoRA's options are beside, in
            `lora_catalog`.
        pace: how long and how fast.
        flat_at_zero: whether nothing has a slope where all coefficients are zero.
        routed: whether the result chooses between adapters token by token, so that no LoRA
            equals it.
        figure: what is told of each adapter in the end.
        factor_bytes: what it holds for each entry of the adapters' factors; None where that is
            the entry in the model's dtype.
    """

    name: str
    summary: str
    detail: str
    formula: str
    paper: str
    takes: Takes = "adapters"
    target: str = ""
    fixed: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Value] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)
    flat_at_zero: bool = False
    routed: bool = False
    figure: str = COEFFICIENT
    factor_bytes: int | None = None

    @property
    def mixes(self) -> bool:
        """Whether it works on given adapters."""
        return self.takes != "nothing"

    def build(self, ingredients: "Ingredients", settings: Mapping[str, Value]) -> "Tuned":
        """What it trains, with these parameters, as `settings` gives them."""
        module, _, name = self.target.partition(":")
        function: Callable[..., Tuned] = getattr(
            importlib.import_module(f"recycle_cli.tuning.{module}"), name
        )
        own = {name: value for name, value in settings.items() if name not in SEARCH}
        return function(ingredients, **self.fixed, **own)

    def settings(
        self, given: Mapping[str, Value], target: bool, started: bool = False
    ) -> dict[str, Value]:
        """Its parameters with their values in force; None for those that have no effect here.

        Args:
            given: values by parameter name.
            target: whether there is a target LoRA among the adapters.
            started: whether it goes on from the numbers of an earlier run.

        Raises:
            InputError: a value is out of range, or has no effect on this method.
        """
        if not self.mixes:
            return self._of_a_lora(given)
        for name, value in given.items():
            if name not in self.defaults:
                raise self._without_effect(name)
            self._check_value(name, value)
        settings = {**self.defaults, **given}
        _check_together(settings, given, target)
        if not started:
            self._check_slope(settings)
        if "new_rank" in settings and target and "reduce_rank" not in settings:
            settings["new_rank"] = None  # the target LoRA takes the new one's place
        return settings

    def _of_a_lora(self, given: Mapping[str, Value]) -> dict[str, Value]:
        for name, value in given.items():
            if name not in AXES and not takers(name):
                raise self._without_effect(name)
            self._check_value(name, value)
        defaults = lora_defaults(given)
        for name in given:
            if name not in defaults:
                raise InputError(
                    f"{PARAMETERS[name].option} has no effect with the LoRA asked for",
                    f"leave it out, or use {' or '.join(o.words for o in takers(name))}",
                )
        check_combination(given)
        return {**defaults, **given}

    def _without_effect(self, name: str) -> InputError:
        methods = [f"--method {m.name}" for m in METHODS.values() if name in m.defaults]
        return InputError(
            f"{PARAMETERS[name].option} has no effect with --method {self.name}",
            "leave it out, or use "
            + " or ".join([*methods, *(option.words for option in takers(name))]),
        )

    def _check_value(self, name: str, value: Value) -> None:
        PARAMETERS[name].check(value)
        own = OPTIMIZERS if self.mixes else names_on("optimizer")
        if name == "optimizer" and value not in own:
            raise InputError(
                f"--optimizer {value} does not go with --method {self.name}",
                f"use one of: {', '.join(own)}",
            )

    def _check_slope(self, settings: Mapping[str, Value]) -> None:
        init, squared = settings.get("init"), settings.get("activation") == "squared"
        flat = (init == "zero" and (squared or self.flat_at_zero)) or (
            init == "one-hot" and squared
        )
        if flat and settings.get("optimizer") != NGOPT:
            raise InputError(
                f"from --init {init} nothing would be learned of the pool: there is no slope "
                "where its coefficients are 0",
                "use --init equal, or another one",
            )


SEARCH = ("optimizer", "bound")
"""The parameters that are about the search for coefficients, not about what they are."""


def _check_together(
    settings: Mapping[str, Value], given: Mapping[str, Value], target: bool
) -> None:
    if settings.get("affine") and settings.get("activation") not in AFFINE:
        raise InputError(
            f"--affine has no effect with --activation {settings['activation']}",
            f"leave it out, or use --activation {' or '.join(AFFINE)}",
        )
    if settings.get("init") == "one-hot" and not target:
        raise InputError("--init one-hot starts at the target LoRA", "give it with --target")
    if "bound" in given and settings.get("optimizer") != NGOPT:
        raise InputError(
            "--bound has no effect where gradients are followed", f"use --optimizer {NGOPT}"
        )
    if settings.get("affine") and settings.get("optimizer") == NGOPT:
        raise InputError(
            "--affine has no effect with --optimizer ngopt, which sets coefficients alone",
            "leave it out",
        )
    if "new_rank" in given and settings.get("reduce_rank"):
        raise InputError("--reduce-rank chooses the rank itself", "leave out --new-rank")
    if "new_rank" in given and target and "reduce_rank" not in settings:
        raise InputError(
            "--new-rank has no effect beside a target LoRA, which takes the new one's place",
            "leave out one of them",
        )


def _mixture(**other: Value) -> dict[str, Value]:
    """The axes of a mixture, at the paper's values where `other` does not say otherwise."""
    return {
        "granularity": "module",
        "activation": "linear",
        "init": "equal",
        "affine": False,
        "l1": 0.0,
        "optimizer": "adamw",
        "bound": 1.5,
        **other,
    }


MIX = "mixture:build"
_ROWS = (
    TuningMethod(
        "recycle",
        "adaptive merging: one coefficient per adapter and module, from zero",
        "The paper's own setting. It starts as the base model.",
        "y = W x + sum_i f(c_i) dW_i x",
        "arXiv 2602.12323",
        target=MIX,
        defaults=_mixture(activation="leaky-relu", init="zero"),
    ),
    TuningMethod(
        "adamerging",
        "the same from equal shares, without an activation (supervised AdaMerging)",
        "AdaMerging minimises entropy on unlabelled rows; this is its supervised form, from the "
        "same paper as recycle.",
        "y = W x + sum_i c_i dW_i x",
        "arXiv 2310.02575",
        target=MIX,
        defaults=_mixture(),
    ),
    TuningMethod(
        "lorahub",
        "one coefficient per adapter, searched without gradients",
        "On the updates themselves, without cross terms between the adapters.",
        "y = W x + sum_i c_i dW_i x",
        "arXiv 2307.13269",
        target=MIX,
        defaults=_mixture(granularity="adapter", init="zero", l1=0.05, optimizer=NGOPT),
    ),
    TuningMethod(
        "pi-tuning",
        "softmax shares per module, with the adapters' own factors trained too",
        "Without a target LoRA, a new LoRA of --new-rank joins the adapters.",
        "y = W x + sum_i softmax(c)_i B_i A_i x, with A_i and B_i trained",
        "arXiv 2304.14381",
        target=MIX,
        fixed={"factors": "all"},
        defaults={
            "granularity": "module",
            "activation": "softmax",
            "init": "equal",
            "affine": False,
            "l1": 0.0,
            "new_rank": 16,
        },
        pace=Pace(lr=1e-4),
        factor_bytes=4,
    ),
    TuningMethod(
        "sd-lora",
        "magnitudes of the adapters' unit directions, and a new direction beside",
        "One magnitude per adapter for all modules, from one; the new direction is trained from "
        "zero.",
        "y = W x + sum_k a_k dW_k / |dW_k|_F x + a_t B_t A_t x",
        "arXiv 2501.13198",
        target="sd_lora:SDLora",
        defaults={"new_rank": 10, "reduce_rank": False, "distill": 0.0},
        pace=Pace(lr=8e-3),
    ),
    TuningMethod(
        "lorahub-factors",
        "LoraHub as its authors wrote it: weights on both factors, summed before the product",
        "Cross terms between the adapters are part of it, and weights of the opposite sign are the "
        "same. At weights of zero nothing has a slope, so --optimizer adamw needs another --init.",
        "y = W x + (sum_i c_i s_i B_i)(sum_i c_i A_i) x",
        "arXiv 2307.13269",
        target="factor_sum:FactorSum",
        defaults={"init": "zero", "l1": 0.05, "optimizer": NGOPT, "bound": 1.5},
        flat_at_zero=True,
        factor_bytes=4,
    ),
    TuningMethod(
        "merge-prune",
        "the factors of all adapters, summed before the product, trained and pruned step by step",
        "After every step the entries of each tensor that matter least become zero; they may grow "
        "again. --level module prunes whole adapters in modules, by their mean over A and B. There "
        "are no coefficients: what is told of an adapter is the share of its entries that are not "
        "zero.",
        "y = W x + (sum_i s_i B_i)(sum_i A_i) x, with A_i and B_i trained",
        "arXiv 2505.24174",
        target="merge_prune:MergePrune",
        defaults={"prune": 0.4, "score": "input", "level": "parameter", "restore": "zero"},
        pace=Pace(lr=1e-4, lr_schedule="step", warmup=0.0, patience=3),
        figure="share of entries kept",
        factor_bytes=8,
    ),
    TuningMethod(
        "arrow",
        "per token, the adapters whose main direction it points to",
        "Without steps it needs no training; --steps 400 trains the prototypes. The result is a "
        "routed adapter: no LoRA equals it, PEFT cannot load it, and only recycle eval does.",
        "y = W x + sum_i p_i dW_i x, p = softmax of the top k |x . v_i| / temperature",
        "arXiv 2405.11157",
        target="arrow:Router",
        defaults={"top_k": 4, "temperature": 1.0},
        pace=Pace(lr=1e-2, steps=0),
        routed=True,
        figure="mean share of tokens",
    ),
    TuningMethod(
        "rescale",
        "control: the target LoRA alone with learned module coefficients, from one",
        "What a mixture beside the target LoRA has to beat.",
        "y = W x + c dW x",
        "arXiv 2602.12323",
        takes="target",
        target=MIX,
        defaults=_mixture(init="one"),
    ),
    TuningMethod(
        "lora",
        "a target LoRA of its own",
        "An ordinary LoRA, by PEFT.",
        "y = W x + s B A x",
        "arXiv 2106.09685",
        takes="nothing",
        defaults=AXES,
        pace=Pace(lr=3e-4, steps=400),
    ),
)
METHODS: Mapping[str, TuningMethod] = {method.name: method for method in _ROWS}


def find_tuning_method(name: str) -> TuningMethod:
    """The method of that name.

    Raises:
        InputError: there is none; the hint names the nearest.
    """
    if name not in METHODS:
        raise unknown_name("tuning method", name, METHODS)
    return METHODS[name]
