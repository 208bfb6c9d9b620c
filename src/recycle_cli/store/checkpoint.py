"""A model's weights on disk with an update added, one shard at a time."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from recycle_cli.errors import InputError
from recycle_cli.lora.folder import save_tensors
from recycle_cli.lora.update import LowRankUpdate, row_blocks

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
# What goes with the weights: configuration, tokenizer, licence. Not other forms of the weights.
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*")

Delta = Callable[[str], LowRankUpdate | Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A transformers folder whose weights are safetensors.

    Args:
        folder: where it lies.
        shard_of: tensor name -> file name.
        config: the parsed `config.json`.
    """

    folder: Path
    shard_of: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def shards(self) -> list[str]:
        """The names of its weights files."""
        return sorted(set(self.shard_of.values()))

    def locate(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
        """The names of the tensors of these modules, by module path.

        Raises:
            InputError: there is none, it has another shape, or it is shared with the embeddings.
        """
        found = {module: self._name(module) for module in shapes}
        for shard in self.shards:
            with safe_open(self.folder / shard, framework="pt") as tensors:
                for module, name in found.items():
                    if self.shard_of[name] == shard:
                        self._check(module, shapes[module], tensors.get_slice(name))
        return found

    def _name(self, module: str) -> str:
        # Some checkpoints leave out the name that the backbone has in the whole model.
        for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
            if name in self.shard_of:
                return name
        if self.config.get("tie_word_embeddings"):
            raise InputError(
                f"{module} is not in {self.folder}: it is tied to the embeddings, which the merge "
                "would change too",
                "leave out the adapters that change it, or write an adapter: without --into-base",
            )
        raise InputError(
            f"{module} is not in {self.folder}", "name the base model of these adapters"
        )

    def _check(self, module: str, shape: tuple[int, int], tensor: Any) -> None:
        there = tuple(tensor.get_shape())
        if there != shape:
            raise InputError(
                f"{module} is {there} in {self.folder} and {shape} in the adapters",
                "name the base model of these adapters",
            )
        if tensor.get_dtype() not in {"F32", "F16", "BF16", "F64"}:
            raise InputError(
                f"{module} is of dtype {tensor.get_dtype()} in {self.folder}, which no update "
                "can be added to",
                "name a copy of the model that is not quantised",
            )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads what a model's folder holds; no weights.

    Raises:
        InputError: it holds no safetensors weights, they are quantised, or a file is missing.
    """
    config = _read_json(folder / CONFIG_FILE)
    if config.get("quantization_config"):
        raise InputError(
            f"{folder} is quantised, so no update can be added to its weights",
            "name a copy of the model that is not quantised",
        )
    index = _read_index(folder)
    shard_of = {
        name: shard
        for shard in sorted(set(index.values())) or [SINGLE_FILE]
        for name in _names_in(folder, shard)
    }
    for name, shard in index.items():
        if shard_of.get(name) != shard:
            raise InputError(
                f"{folder / INDEX_FILE} says that {name} is in {shard}, where it is not",
                "fetch the model again",
            )
    return Checkpoint(folder, shard_of, config)


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name; empty where all weights are in one file, which, if it is there,
    transformers reads whatever an index says."""
    path = folder / INDEX_FILE
    if not path.is_file() or (folder / SINGLE_FILE).is_file():
        return {}
    index = _read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(shard, str) for shard in index.values()):
        raise InputError(f"{path} has no weight_map of file names", "fetch the model again")
    return index


def _names_in(folder: Path, shard: str) -> list[str]:
    """The names of the tensors in a weights file."""
    # An index is a stranger's word: no path of its leads out of the folder.
    if Path(shard).name != shard or not (folder / shard).is_file():
        raise InputError(
            f"{folder} has no {shard}",
            "name a transformers folder, or a Hub id, whose weights are safetensors",
        )
    try:
        with safe_open(folder / shard, framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / shard} cannot be read: {error}", "fetch it again") from error


def write_merged(
    checkpoint: Checkpoint,
    names: Mapping[str, str],
    out: Path,
    delta: Delta,
    done: Callable[[], None],
) -> list[str]:
    """Writes a copy of the model with an update added to its weights.

    No more than one shard and one module's update is in memory. The sum is taken in float64 and
    cast once to the dtype of the weight; tensors that are tied in the files stay tied.

    Args:
        checkpoint: the model.
        names: the tensors of the modules to change, by module path, from `locate`.
        out: an existing, empty folder.
        delta: gives the update of one of them.
        done: called after each module.

    Returns:
        The names of the files written.

    Raises:
        InputError: a sum is too large for the dtype of its weight.
    """
    copied = {path for pattern in COPIED for path in checkpoint.folder.glob(pattern)}
    if checkpoint.shards == [SINGLE_FILE]:
        copied.discard(checkpoint.folder / INDEX_FILE)
    for path in sorted(path for path in copied if path.is_file()):
        shutil.copyfile(path, out / path.name)
    for shard in checkpoint.shards:
        tensors = load_file(checkpoint.folder / shard)
        for module, name in names.items():
            if checkpoint.shard_of[name] == shard:
                tensors[name] = _sum(name, tensors[name], delta(module))
                done()
        with safe_open(checkpoint.folder / shard, framework="pt") as opened:
            metadata = opened.metadata() or {"format": "pt"}
        save_tensors(tensors, out / shard, metadata)
    return sorted(path.name for path in out.iterdir())


def _sum(name: str, weight: Tensor, update: LowRankUpdate | Tensor) -> Tensor:
    """A new weight, with the update in it.

    Raises:
        InputError: the dtype of the weight has not the numbers that this takes.
    """
    if isinstance(update, LowRankUpdate):
        update = update.to(torch.float64)
    added = torch.empty_like(weight)
    for rows in row_blocks((weight.shape[0], weight.shape[1])):
        block = update.rows(rows) if isinstance(update, LowRankUpdate) else update[rows].double()
        added[rows] = (weight[rows].double() + block).to(weight.dtype)
    if not added.isfinite().all():
        raise InputError(
            f"{name} with the merge in it holds numbers too large for "
            f"{str(weight.dtype).removeprefix('torch.')}",
            "use smaller weights, or leave out the adapter at fault",
        )
    return added


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path.parent} has no {path.name}", "name a transformers folder or a Hub id"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", "fetch it again") from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} holds no JSON object", "fetch it again")
    return fields
