"""Routed adapters: several low-rank updates, and for each token the choice between them.

Per module m: y = W x + sum_i p_i(x) s_i B_i A_i x, with p the softmax of |x . v_i| / temperature
over the adapters that have the module, or over the `top_k` largest of them (Arrow, arXiv
2405.11157). Since p depends on the token, no LoRA equals it; it has a format of its own, a folder
with these files:

- `routed_config.json`: `format` 1, `base_model`, `top_k`, `temperature`, and `adapters`, a list of
  {`id`, `revision`, `sha256`};
- `routed_adapter.safetensors`: for each module path `PATH.lora_A` (components, in), `PATH.lora_B`
  (out, components) with the adapters' scales in it, `PATH.prototypes` (n, in) of the n adapters
  that have the module, `PATH.present` (n,), where each of them stands in `adapters`, and
  `PATH.owner` (components,), the row of the prototypes that a component belongs to.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from recycle_cli.errors import InputError
from recycle_cli.lora.folder import read_tensors, save_tensors
from recycle_cli.records import AdapterRef

ROUTED_CONFIG_FILE = "routed_config.json"
ROUTED_WEIGHTS_FILE = "routed_adapter.safetensors"
FORMAT = 1
PARTS = ("lora_A", "lora_B", "owner", "present", "prototypes")
FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class RoutedModule:
    """The adapters of one module, and what chooses between them.

    Args:
        A: (components, in), stacked.
        B: (out, components), side by side, with the adapters' scales in it.
        owner: (components,) int64, the row of the prototypes that a component belongs to.
        present: (n,) int64, rising: which adapters have the module.
        prototypes: (n, in) float32, theirs.
    """

    A: Tensor
    B: Tensor
    owner: Tensor
    present: Tensor
    prototypes: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the module."""
        return self.B.shape[0], self.A.shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> "RoutedModule":
        """The same on another device, with factors of another dtype."""
        return RoutedModule(
            self.A.to(device, dtype),
            self.B.to(device, dtype),
            self.owner.to(device),
            self.present.to(device),
            self.prototypes.to(device),
        )


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
    adapters: Sequence[AdapterRef],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a routed adapter.

    Args:
        folder: an existing, empty folder.
        adapter: what to write.
        base_model: the name of its base model.
        adapters: those that it routes between, in their order.
        dtype: of the factors on disk.

    Raises:
        OSError: the disk refused.
    """
    config = {
        "format": FORMAT,
        "base_model": base_model,
        "top_k": adapter.top_k,
        "temperature": adapter.temperature,
        "adapters": [ref.model_dump(include={"id", "revision", "sha256"}) for ref in adapters],
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / ROUTED_CONFIG_FILE).write_text(text, encoding="utf-8")
    tensors = {}
    for path, module in adapter.modules.items():
        tensors[f"{path}.lora_A"] = module.A.to("cpu", dtype).contiguous()
        tensors[f"{path}.lora_B"] = module.B.to("cpu", dtype).contiguous()
        tensors[f"{path}.owner"] = module.owner.cpu().contiguous()
        tensors[f"{path}.present"] = module.present.cpu().contiguous()
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
        tensors, _ = read_tensors(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}", "write it again") from error
    if not tensors:
        raise InputError(f"{path} holds no tensors", "write it again")
    adapters = len(config["adapters"])
    found = {m: _module(path, m, tensors, adapters) for m in _module_paths(path, tensors)}
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
    for key, (holds, words) in FIELDS.items():
        if not holds(config.get(key)):
            raise InputError(f"{path}: {key} is {config.get(key)!r:.60}", f"it has to be {words}")
    return config


def _is_number(value: object, *kinds: type) -> bool:
    """Whether it is a number of these kinds, which truth values are not here."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_adapters(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(one, dict) for one in value)
        and all(isinstance(one.get(key), str) for one in value for key in ("id", "sha256"))
    )


FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "base_model": (lambda value: isinstance(value, str), "the name of a base model"),
    "top_k": (lambda value: _is_number(value, int) and value >= 0, "a whole number from 0"),
    "temperature": (
        # What float32 holds as no less than it is.
        lambda value: _is_number(value, int, float) and FLOAT32.tiny <= value <= FLOAT32.max,
        f"a number from {FLOAT32.tiny:.2g} to {FLOAT32.max:.2g}",
    ),
    "adapters": (_is_adapters, "a list of adapters, each with its id and sha256"),
}


def _module_paths(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules that the tensors are of, in order."""
    found = set()
    for key in tensors:
        module, _, part = key.rpartition(".")
        if not module or part not in PARTS:
            raise InputError(
                f"{path} holds {key[:200]!r}, which is no tensor of a routed adapter",
                "write it again",
            )
        found.add(module)
    return sorted(found)


def _module(path: Path, module: str, tensors: Mapping[str, Tensor], adapters: int) -> RoutedModule:
    """One module's tensors, checked against each other and the number of adapters."""
    own = {part: tensors[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in tensors}
    if len(own) != len(PARTS):
        missing = ", ".join(part for part in PARTS if part not in own)
        raise InputError(f"{path} lacks {missing} of {module}", "write it again")
    a, b, owner, present, prototypes = (own[part] for part in PARTS)
    if not _fit(a, b, owner, present, prototypes, adapters):
        told = ", ".join(f"{part} {tuple(t.shape)} {t.dtype}" for part, t in own.items())
        raise InputError(
            f"{path} has tensors of {module} that do not fit each other: {told}", "write it again"
        )
    a, b, prototypes = a.float(), b.float(), prototypes.float()
    if not all(bool(tensor.isfinite().all()) for tensor in (a, b, prototypes)):
        raise InputError(f"{path}: {module} holds NaN or infinity", "leave this adapter out")
    return RoutedModule(a, b, owner, present, prototypes)


def _fit(
    a: Tensor, b: Tensor, owner: Tensor, present: Tensor, prototypes: Tensor, adapters: int
) -> bool:
    """Whether they are the tensors of one module: every component is of one of the prototypes,
    every prototype has components, and is of one of the adapters."""
    tensors, kinds = (a, b, owner, present, prototypes), (True, True, False, False, True)
    if [t.dim() for t in tensors] != [2, 2, 1, 1, 2]:
        return False
    if not all(
        t.is_floating_point() if floats else t.dtype == torch.int64
        for t, floats in zip(tensors, kinds, strict=True)
    ):
        return False
    count = len(present)
    return (
        a.shape[0] == b.shape[1] == len(owner) > 0
        and tuple(prototypes.shape) == (count, a.shape[1])
        and owner.unique().tolist() == list(range(count))
        and present.unique().tolist() == present.tolist()
        and int(present[0]) >= 0
        and int(present[-1]) < adapters
    )
