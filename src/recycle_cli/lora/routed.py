"""Routed adapters: several low-rank updates, and for each token the choice between them.

Per module m: y = W x + sum_i p_i(x) s_i B_i A_i x, with p the softmax of |x . v_i| / temperature
over the adapters that have the module, or over the `top_k` largest of them (Arrow, arXiv
2405.11157). Since p depends on the token, no LoRA equals it; it has a format of its own, a folder
with these files:

- `routed_config.json`: `format` 1, `base_model`, `top_k`, `temperature`, `adapters`;
- `routed_adapter.safetensors`: for each module path `PATH.lora_A` (components, in), `PATH.lora_B`
  (out, components) with the adapters' scales in it, `PATH.owner` (components,), the row of
  `PATH.prototypes` (adapters that have the module, in) that a component belongs to.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recycle_cli.errors import InputError
from recycle_cli.lora.folder import save_tensors

ROUTED_CONFIG_FILE = "routed_config.json"
ROUTED_WEIGHTS_FILE = "routed_adapter.safetensors"
FORMAT = 1
PARTS = ("lora_A", "lora_B", "owner", "prototypes")


@dataclass(frozen=True)
class RoutedModule:
    """The adapters of one module, and what chooses between them.

    Args:
        A: (components, in), stacked.
        B: (out, components), side by side, with the adapters' scales in it.
        owner: (components,) int64, the row of the prototypes that a component belongs to.
        prototypes: (adapters, in) float32, of those that have the module.
    """

    A: Tensor
    B: Tensor
    owner: Tensor
    prototypes: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the module."""
        return self.B.shape[0], self.A.shape[1]


@dataclass(frozen=True)
class RoutedAdapter:
    """A routed adapter.

    Args:
        modules: by module path.
        top_k: how many adapters a token is routed to; 0 for all.
        temperature: of the softmax, above 0.
    """

    modules: Mapping[str, RoutedModule]
    top_k: int
    temperature: float


def is_routed(folder: Path) -> bool:
    """Whether a folder holds a routed adapter."""
    return (folder / ROUTED_CONFIG_FILE).is_file()


def write_routed(
    folder: Path,
    adapter: RoutedAdapter,
    base_model: str,
    names: list[str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a routed adapter.

    Args:
        folder: an existing, empty folder.
        adapter: what to write.
        base_model: the name of its base model.
        names: the sha256s of the adapters in it.
        dtype: of the factors on disk.

    Raises:
        OSError: the disk refused.
    """
    config = {
        "format": FORMAT,
        "base_model": base_model,
        "top_k": adapter.top_k,
        "temperature": adapter.temperature,
        "adapters": names,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / ROUTED_CONFIG_FILE).write_text(text, encoding="utf-8")
    tensors = {}
    for path, module in adapter.modules.items():
        tensors[f"{path}.lora_A"] = module.A.to("cpu", dtype).contiguous()
        tensors[f"{path}.lora_B"] = module.B.to("cpu", dtype).contiguous()
        tensors[f"{path}.owner"] = module.owner.cpu().contiguous()
        tensors[f"{path}.prototypes"] = module.prototypes.float().cpu().contiguous()
    save_tensors(tensors, folder / ROUTED_WEIGHTS_FILE, {"format": "pt"})


def read_routed(folder: Path) -> tuple[RoutedAdapter, str]:
    """A routed adapter and the name of its base model.

    Raises:
        InputError: a file is not there or cannot be read, or does not hold what it should.
    """
    config = _read_config(folder / ROUTED_CONFIG_FILE)
    path = folder / ROUTED_WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}", "write it again") from error
    modules = {path.rpartition(".")[0] for path in tensors}
    if not modules:
        raise InputError(f"{path} holds no tensors", "write it again")
    found = {module: _module(path, module, tensors) for module in sorted(modules)}
    return RoutedAdapter(found, config["top_k"], config["temperature"]), config["base_model"]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}", "write it again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        seen = config.get("format") if isinstance(config, dict) else None
        raise InputError(
            f"{path} has format {seen!r}; this version reads format {FORMAT}",
            "use the version of recycle that wrote it",
        )
    top_k, temperature = config.get("top_k"), config.get("temperature")
    good = (
        isinstance(top_k, int)
        and not isinstance(top_k, bool)
        and top_k >= 0
        and isinstance(temperature, int | float)
        and 0 < temperature < math.inf
        and isinstance(config.get("base_model"), str)
    )
    if not good:
        raise InputError(
            f"{path} has top_k {top_k!r}, temperature {temperature!r} and base model "
            f"{config.get('base_model')!r}",
            "top_k is a whole number from 0, the temperature a number above 0",
        )
    return config


def _module(path: Path, module: str, tensors: Mapping[str, Tensor]) -> RoutedModule:
    """One module's tensors, checked against each other."""
    parts = [tensors.get(f"{module}.{part}") for part in PARTS]
    if any(part is None for part in parts):
        raise InputError(f"{path} lacks tensors of {module}", "write it again")
    a, b, owner, prototypes = (part for part in parts if part is not None)
    count = len(prototypes)
    fits = (
        [t.dim() for t in (a, b, owner, prototypes)] == [2, 2, 1, 2]
        and a.shape[0] == b.shape[1] == owner.shape[0] > 0
        and a.shape[1] == prototypes.shape[1]
        and owner.dtype == torch.int64
        and int(owner.min()) >= 0
        and int(owner.max()) < count
    )
    if not fits:
        shapes = ", ".join(str(tuple(t.shape)) for t in (a, b, owner, prototypes))
        raise InputError(
            f"{path} has tensors of {module} that do not fit each other: {shapes}",
            "write it again",
        )
    a, b, prototypes = a.float(), b.float(), prototypes.float()
    if not all(bool(tensor.isfinite().all()) for tensor in (a, b, prototypes)):
        raise InputError(f"{path}: {module} holds NaN or infinity", "leave this adapter out")
    return RoutedModule(a, b, owner, prototypes)
