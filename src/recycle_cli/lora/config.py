"""What `adapter_config.json` says, read without PEFT so that a stranger's file runs nothing.

PEFT treats several fields of this file as regular expressions and lets others change the base
model on load, so the file is parsed here as plain data, and what cannot be honoured exactly as a
low-rank update is refused by name.
"""

import functools
import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from recycle_cli.errors import InputError

PLAIN_NAME = re.compile(r"[A-Za-z0-9_.\-]+")
MAX_RANK = 4096
MAX_PATTERN = 5000
"""Entries of a pattern: one a module is more than PEFT ever writes."""
SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 2, 60, 60
Number = TypeVar("Number", int, float)


class AdapterProblem(InputError):
    """An adapter that cannot be used; `code` is a stable word for the reason."""

    def __init__(self, code: str, message: str, hint: str = "leave this adapter out") -> None:
        super().__init__(message, hint)
        self.code = code

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        """See `RecycleError`."""
        return type(self), (self.code, self.message, self.hint)


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of an adapter's configuration that decide its update.

    Args:
        rank: the default rank; a module's true rank is the shape of its tensors.
        alpha: the default numerator of the scale.
        use_rslora: the scale is alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732).
        rank_pattern: ranks of modules whose path ends in the key.
        alpha_pattern: alphas of modules whose path ends in the key.
        target_modules: names of adapted modules, or one regular expression, which is never run.
        exclude_modules: names of modules that PEFT leaves alone, likewise.
        layers: numbers of the only layers that PEFT adapts, or None for all.
        targets_listed: whether `target_modules` are names.
        base_model: the base model's name as the adapter gives it, or None.
    """

    rank: int
    alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] = ()
    exclude_modules: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    targets_listed: bool = False
    base_model: str | None = None

    def leaves_out(self, module: str) -> bool:
        """Whether PEFT would leave a module alone, whatever tensors there are for it. Regular
        expressions, in the place of names, are not asked."""
        ends = _ends_of(module)
        if self.targets_listed and self._targets.isdisjoint(ends):
            return True
        if not self._excluded.isdisjoint(ends):
            return True
        if self.targets_listed and module in self._targets:
            return False  # named in full, it is adapted whatever its layer
        numbers = [int(part) for part in module.split(".") if part.isdigit()]
        return self.layers is not None and bool(numbers) and numbers[0] not in self.layers

    @functools.cached_property
    def _targets(self) -> frozenset[str]:
        return frozenset(self.target_modules)

    @functools.cached_property
    def _excluded(self) -> frozenset[str]:
        return frozenset(self.exclude_modules)

    def rank_of(self, module: str) -> int:
        """The rank that the configuration states for a module path."""
        return int(_first_match(self.rank_pattern, module, self.rank))

    def alpha_of(self, module: str) -> float:
        """The alpha that the configuration states for a module path."""
        return float(_first_match(self.alpha_pattern, module, self.alpha))

    def scale_of(self, module: str, rank: int) -> float:
        """The factor s in dW = s B A for a module whose tensors have rank `rank`."""
        alpha = self.alpha_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _ends_of(module: str) -> list[str]:
    """A module path, and what follows each of its dots: the names that mean it."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _first_match(pattern: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's lookup: the first key that the module path equals or ends in after a dot.

    PEFT takes keys for regular expressions, in which a dot stands for any character. No other
    character of a plain name means anything there.
    """
    for key, value in pattern.items():
        if _ends_in(module, key):
            return value
    return default


def _ends_in(module: str, key: str) -> bool:
    if len(module) > len(key) and module[-len(key) - 1] != ".":
        return False
    end = module[-len(key) :]
    return len(end) == len(key) and (
        end == key or all(k in (".", m) for k, m in zip(key, end, strict=True))
    )


@dataclass(frozen=True)
class Feature:
    """A PEFT option that is not a plain low-rank update: when it is on, and why it is refused."""

    code: str
    is_on: Callable[[Any], bool]
    reason: str


def _set(value: Any) -> bool:
    return bool(value)


def _alters_base(value: Any) -> bool:
    """True for initialisations that move part of the base weights into the adapter."""
    if value is None or isinstance(value, bool):
        return False
    return str(value).lower() not in {"gaussian", "eva", "orthogonal"}


UNSUPPORTED: Mapping[str, Feature] = {
    "use_dora": Feature("dora", _set, "DoRA rescales the base weight's columns"),
    "bias": Feature("bias", lambda v: v not in (None, "none"), "trained biases are no low rank"),
    "lora_bias": Feature("lora_bias", _set, "a bias on B is no low-rank update"),
    "modules_to_save": Feature("modules_to_save", _set, "whole modules are replaced"),
    "trainable_token_indices": Feature("token_rows", _set, "token rows are replaced"),
    "layer_replication": Feature("layer_replication", _set, "the base's layers are repeated"),
    "target_parameters": Feature("target_parameters", _set, "parameters, not modules, change"),
    "init_lora_weights": Feature("init_alters_base", _alters_base, "the base weights change"),
    "loftq_config": Feature("loftq", _set, "the base is re-quantised"),
    "corda_config": Feature("corda", _set, "the base weights change"),
    "lora_ga_config": Feature("lora_ga", _set, "the base weights change"),
    "megatron_config": Feature("megatron", _set, "it is meant for Megatron layers"),
    "alora_invocation_tokens": Feature("alora", _set, "it acts on part of the tokens only"),
    "arrow_config": Feature("arrow", _set, "it routes between adapters"),
    "kasa_config": Feature("kasa", _set, "it trains singular values of the base"),
    "use_qalora": Feature("qalora", _set, "its inputs are pooled by group"),
    "use_bdlora": Feature("bdlora", _set, "its factors are block-diagonal"),
    "velora_config": Feature("velora", _set, "its inputs are compressed"),
    "monteclora_config": Feature("monteclora", _set, "its factors are sampled"),
}


def parse_config(fields: Any) -> AdapterConfig:
    """The configuration held by the parsed JSON of an `adapter_config.json`.

    Raises:
        AdapterProblem: it is no LoRA for causal language models, uses a feature that a low-rank
            update cannot express, or holds a value of the wrong type.
    """
    if not isinstance(fields, dict):
        raise AdapterProblem("bad_config", "adapter_config.json holds no JSON object")
    _check_type(fields)
    _check_features(fields)
    return AdapterConfig(
        rank=_rank(fields.get("r"), "r"),
        alpha=_alpha(fields.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=_flag(fields.get("use_rslora", False), "use_rslora"),
        rank_pattern=_pattern(fields.get("rank_pattern"), "rank_pattern", _rank),
        alpha_pattern=_pattern(fields.get("alpha_pattern"), "alpha_pattern", _alpha),
        target_modules=_target_modules(fields.get("target_modules")),
        exclude_modules=_names(fields.get("exclude_modules")),
        layers=_layers(fields.get("layers_to_transform")),
        targets_listed=isinstance(fields.get("target_modules"), list),
        base_model=_base_model(fields.get("base_model_name_or_path")),
    )


def _check_type(fields: dict[str, Any]) -> None:
    peft_type = fields.get("peft_type")
    if peft_type != "LORA":
        raise AdapterProblem("not_lora", f"peft_type is {_short(peft_type)}, not 'LORA'")
    task_type = fields.get("task_type")
    if task_type not in (None, "CAUSAL_LM"):
        raise AdapterProblem("not_causal_lm", f"task_type is {_short(task_type)}, not 'CAUSAL_LM'")


def _check_features(fields: dict[str, Any]) -> None:
    for name, feature in UNSUPPORTED.items():
        value = fields.get(name)
        if feature.is_on(value):
            raise AdapterProblem(feature.code, f"{name} is {_short(value)}: {feature.reason}")


def _rank(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise AdapterProblem(
            "bad_config", f"{name} is {_short(value)}, not a whole number from 1 to {MAX_RANK}"
        )
    return value


def _alpha(value: Any, name: str) -> float:
    # A comparison, unlike math.isfinite, also takes the ints that no float can hold.
    good = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )
    if not good:
        raise AdapterProblem("bad_config", f"{name} is {_short(value)}, not a number")
    return float(value)


def _flag(value: Any, name: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise AdapterProblem("bad_config", f"{name} is {_short(value)}, not true or false")
    return bool(value)


def _pattern(value: Any, name: str, check: Callable[[Any, str], Number]) -> dict[str, Number]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise AdapterProblem("bad_config", f"{name} is {_short(value)}, not an object")
    if len(value) > MAX_PATTERN:
        raise AdapterProblem(
            "bad_config", f"{name} has {len(value)} entries, more than {MAX_PATTERN}"
        )
    for key in value:
        if not PLAIN_NAME.fullmatch(key):
            raise AdapterProblem(
                "pattern_regex", f"{name} has the key {_short(key)}, which is no plain module name"
            )
    return {key: check(item, f"{name}[{_short(key)}]") for key, item in value.items()}


def _target_modules(value: Any) -> tuple[str, ...]:
    """Names as given. A string is PEFT's regular expression: it is recorded, never run."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(sorted(value))
    raise AdapterProblem("bad_config", f"target_modules is {_short(value)}, not a list of names")


def _names(value: Any) -> tuple[str, ...]:
    """A list of names; nothing where it is a regular expression, or none."""
    if not isinstance(value, list):
        return ()
    return tuple(item for item in value if isinstance(item, str))


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    numbers = value if isinstance(value, list) else [value]
    if not all(type(number) is int for number in numbers):
        raise AdapterProblem(
            "bad_config", f"layers_to_transform is {_short(value)}, not numbers of layers"
        )
    return tuple(numbers) or None  # with none listed, PEFT adapts all


def _base_model(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    raise AdapterProblem("bad_config", f"base_model_name_or_path is {_short(value)}, not a name")


def _short(value: Any) -> str:
    """The start of a value's text; deep nesting is not followed, as repr would to its limit."""
    text = SHORT.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
