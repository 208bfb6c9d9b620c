"""PEFT adapter folders, in and out.

On disk a LoRA is `adapter_config.json` plus `adapter_model.safetensors`, whose keys are
`base_model.model.<module path>.lora_A.weight` (rank, in) and `...lora_B.weight` (out, rank).
"""

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recycle_cli.errors import InputError
from recycle_cli.lora.config import AdapterConfig, AdapterProblem, parse_config
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_LAYER = ".base_layer.weight"
KEY = re.compile(r"base_model\.model\.([A-Za-z0-9_.]+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder in memory: its configuration and its update, factors in float32."""

    config: AdapterConfig
    update: ModelUpdate


class AdapterFile:
    """An open adapter folder, read one module at a time.

    The weights file is mapped, not loaded: a module's bytes are read when it is asked for.

    Args:
        config: the folder's configuration.
        tensors: the open safetensors file.
    """

    def __init__(self, config: AdapterConfig, tensors: Any) -> None:
        self.config = config
        self._tensors = tensors
        self._keys = dict(sorted(pair_keys(tensors.keys()).items()))
        self.shapes = {module: self._check(module) for module in self._keys}

    shapes: Mapping[str, tuple[int, int]]
    """Module path -> (out, in) of its update, sorted by path."""

    def read(self, module: str) -> LowRankUpdate:
        """One module's update, factors in float32."""
        a, b = (self._tensors.get_tensor(key).float() for key in self._keys[module])
        return LowRankUpdate(a, b, self.config.scale_of(module, a.shape[0]))

    @property
    def largest_rank(self) -> int:
        """The largest rank among its modules."""
        ranks = [self._tensors.get_slice(a).get_shape()[0] for a, _ in self._keys.values()]
        return int(max(ranks))

    @property
    def entries(self) -> int:
        """How many numbers its factors hold."""
        slices = (self._tensors.get_slice(key) for pair in self._keys.values() for key in pair)
        return sum(math.prod(one.get_shape()) for one in slices)

    def _check(self, module: str) -> tuple[int, int]:
        a, b = (tuple(self._tensors.get_slice(key).get_shape()) for key in self._keys[module])
        check_pair(module, a, b, self.config)
        return b[0], a[1]


@contextlib.contextmanager
def open_adapter(folder: Path) -> Iterator[AdapterFile]:
    """Opens a PEFT folder. Nothing in it is executed or handed to PEFT.

    Raises:
        InputError: the folder is no adapter folder, or a file in it cannot be read.
        AdapterProblem: the adapter is not a plain low-rank update.
    """
    config = parse_config(read_config(folder))
    if not (folder / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{folder} has no {WEIGHTS_FILE}", "name a folder that PEFT's save_pretrained wrote"
        )
    with open_weights(config, folder / WEIGHTS_FILE) as file:
        yield file


@contextlib.contextmanager
def open_weights(config: AdapterConfig, path: Path) -> Iterator[AdapterFile]:
    """Opens a weights file whose configuration is known.

    Raises:
        InputError: it cannot be read.
        AdapterProblem: it holds no plain low-rank update of that configuration.
    """
    try:
        tensors = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}", "fetch or write it again") from error
    with tensors:
        yield AdapterFile(config, tensors)


def read_adapter(folder: Path) -> Adapter:
    """A whole PEFT folder.

    Raises:
        InputError, AdapterProblem: as `open_adapter`.
    """
    with open_adapter(folder) as file:
        return Adapter(file.config, {module: file.read(module) for module in file.shapes})


def read_config(folder: Path) -> Any:
    """The parsed JSON of a folder's `adapter_config.json`.

    Raises:
        InputError: there is no such file, or it is not JSON.
    """
    path = folder / CONFIG_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} has no {CONFIG_FILE}", "name a PEFT adapter folder, a Hub id or a sha256"
        ) from error
    except OSError as error:
        raise AdapterProblem("bad_config", f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterProblem("bad_config", f"{path} is not JSON: {error}") from error


def pair_keys(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Module path -> (key of A, key of B).

    Raises:
        AdapterProblem: a key is not that of a factor (`foreign_key`, `base_layer`), or a factor
            has no partner (`pair_incomplete`), or there are none (`no_tensors`).
    """
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        match = KEY.fullmatch(key)
        if match is None:
            raise _no_factor(key)
        found.setdefault(match[1], {})[match[2]] = key
    if not found:
        raise AdapterProblem("no_tensors", "the weights file holds no tensors")
    for module, pair in found.items():
        if len(pair) != 2:
            raise AdapterProblem(
                "pair_incomplete", f"{module} has lora_{next(iter(pair))} but not its partner"
            )
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}


def _no_factor(key: str) -> AdapterProblem:
    if key.endswith(BASE_LAYER):
        return AdapterProblem(
            "base_layer",
            f"tensor {key[:200]!r} is a weight of its base model, which PEFT saves along where an "
            "output head or an embedding was adapted; it would take the place of yours",
        )
    return AdapterProblem("foreign_key", f"tensor {key[:200]!r} is no factor of a linear module")


def check_shapes(module: str, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
    """Checks that two factors fit each other.

    Raises:
        AdapterProblem: they do not (`shape_mismatch`).
    """
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
        raise AdapterProblem(
            "shape_mismatch", f"{module} has factors of shapes {shape_a} and {shape_b}"
        )


def check_pair(
    module: str, shape_a: tuple[int, ...], shape_b: tuple[int, ...], config: AdapterConfig
) -> None:
    """Checks that two factors fit each other and the rank that the configuration states.

    Raises:
        AdapterProblem: they do not (`shape_mismatch`, `rank_mismatch`).
    """
    check_shapes(module, shape_a, shape_b)
    if shape_a[0] != config.rank_of(module):
        raise AdapterProblem(
            "rank_mismatch",
            f"{module} has rank {shape_a[0]}, but {CONFIG_FILE} says {config.rank_of(module)}",
        )


def write_adapter(
    folder: Path, update: ModelUpdate, base_model: str, dtype: torch.dtype = torch.float32
) -> None:
    """Writes an update as a PEFT folder that loads to the same product, up to one rounding of B.

    The scale is carried by B, so alpha equals the rank in every module; modules whose rank is not
    the commonest one stand in `rank_pattern` and `alpha_pattern`.

    Args:
        folder: an existing, empty folder.
        update: the modules to write.
        base_model: what PEFT shall take for the base model's name.
        dtype: of the factors on disk.
    """
    ranks = {module: piece.rank for module, piece in update.items()}
    default = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
    odd = {module: rank for module, rank in sorted(ranks.items()) if rank != default}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": default,
        "lora_alpha": default,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        # Whole paths, so that modules of the same name elsewhere stay as they are.
        "target_modules": sorted(ranks),
        "rank_pattern": odd,
        "alpha_pattern": odd,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for module, piece in update.items():
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = piece.A.to(dtype).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = (piece.B * piece.scale).to(dtype).contiguous()
    save_tensors(tensors, folder / WEIGHTS_FILE, {"format": "pt"})


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: the disk refused; safetensors has an error of its own for that.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata() or {}


def weights_sha256(folder: Path, name: str = WEIGHTS_FILE) -> str:
    """The identity of an adapter: the sha256 of its weights file, in hex."""
    return file_sha256(folder / name)


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
