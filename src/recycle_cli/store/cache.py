"""The adapter cache: one clean PEFT folder for each weights file, named by its sha256.

Where the same weights stand under several configurations (another revision has another alpha, or
they fit two base models), each has a folder of its own, with a digest of the configuration behind.

A folder holds the weights byte for byte, an `adapter_config.json` of our own writing that loads
to the same update, and under `source/` what the author wrote, as text. It is written under
another name and renamed when whole, so a folder under a sha256 was complete when it appeared.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.lora.config import AdapterConfig, AdapterProblem, parse_config
from recycle_cli.lora.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_pair,
    pair_keys,
    read_config,
    weights_sha256,
)
from recycle_cli.store.folder import CARD_FILE
from recycle_cli.store.safetensors_header import read_header
from recycle_cli.store.unfinished import unfinished_folder

SOURCE_FOLDER = "source"
# Not adapter_config.json, lest a crawl over the cache take source/ for an adapter of its own.
SOURCE_CONFIG_FILE = "adapter_config.original.json"
RENAME_ATTEMPTS = 5
COPY_CHUNK = 1 << 20
CONFIG_DIGITS = 16
NAME = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{16})?")
OWN_FILES = {CONFIG_FILE, WEIGHTS_FILE, SOURCE_FOLDER}


@dataclass(frozen=True)
class CacheEntry:
    """What is kept of one vetted adapter.

    Args:
        sha256: of the weights file, in hex; names the folder.
        weights: the vetted weights file.
        config: the clean configuration, from `clean_config`.
        source_config: the author's configuration, as text.
        source_card: the author's model card, as text; empty for none.
        move: whether the weights file may be moved away, its digest known to be that of its bytes.
    """

    sha256: str
    weights: Path
    config: Mapping[str, Any]
    source_config: str
    source_card: str
    move: bool = False


def clean_config(
    config: AdapterConfig, ranks: Mapping[str, int], base_model: str
) -> dict[str, Any]:
    """An `adapter_config.json` that makes PEFT load the same update, and nothing else.

    Targets and patterns are full module paths: a path says exactly which module is meant, and
    holds no character but the dot that PEFT's regular expressions could take otherwise.

    Args:
        config: the author's, which decides alphas and the kind of scaling.
        ranks: module path -> rank of its tensors.
        base_model: the canonical name of the base model.
    """
    alphas = {module: config.alpha_of(module) for module in ranks}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "use_rslora": config.use_rslora,
        "target_modules": sorted(ranks),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": {key: _plain(value) for key, value in _pattern(alphas, alpha).items()},
        "bias": "none",
        "lora_dropout": 0.0,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _commonest(values: Any) -> Any:
    """The commonest value; the largest of several."""
    counted = sorted(values)
    return max(reversed(counted), key=counted.count)


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The entries that PEFT needs to tell these values apart.

    PEFT takes the first key that a module's path ends in, so a module whose path ends in another
    one's full path needs an entry of its own, and the longer path goes first.
    """
    odd = {module for module, value in values.items() if value != default}
    odd |= {module for module in values if any(module.endswith(f".{key}") for key in odd)}
    return {module: values[module] for module in sorted(odd, key=lambda key: (-len(key), key))}


def _plain(alpha: float) -> int | float:
    """A whole number as an int, which is what loaders other than PEFT expect of alpha."""
    return int(alpha) if alpha.is_integer() else alpha


def keep(adapters_folder: Path, entry: CacheEntry) -> Path:
    """Puts an adapter into the cache, unless it is there, and returns its folder.

    Safe when several processes do it at once. What is kept under another configuration stays.

    Raises:
        InputError: the weights changed since they were hashed.
        RecycleError: the cache cannot be written.
    """
    try:
        size = entry.weights.stat().st_size
        for folder in _places(adapters_folder, entry):
            if is_whole(folder, size) and _is_of(folder, entry):
                return folder
        return _put(adapters_folder, entry)
    except OSError as error:
        raise RecycleError(
            f"{entry.weights} cannot be copied to {adapters_folder}: {error}",
            "check the disk's space and the permissions of both folders",
        ) from error


def _places(adapters_folder: Path, entry: CacheEntry) -> tuple[Path, Path]:
    """Where an adapter may lie: under its sha256, or, where another configuration has that, under a
    name of its own."""
    digest = hashlib.sha256(_config_text(entry).encode()).hexdigest()[:CONFIG_DIGITS]
    return adapters_folder / entry.sha256, adapters_folder / f"{entry.sha256}-{digest}"


def _is_of(folder: Path, entry: CacheEntry) -> bool:
    """Whether a folder has the configuration of an adapter."""
    try:
        return bool(read_config(folder) == entry.config)
    except AdapterProblem:
        return False


def _put(adapters_folder: Path, entry: CacheEntry) -> Path:
    adapters_folder.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(adapters_folder) as unfinished:
        _write(unfinished, entry)
        return _put_in_place(unfinished, adapters_folder, entry)


def is_whole(folder: Path, size_bytes: int) -> bool:
    """True when a cache folder has its configuration and weights of the given size.

    A quick look; `damage` reads everything.
    """
    weights = folder / WEIGHTS_FILE
    return (
        (folder / CONFIG_FILE).is_file()
        and weights.is_file()
        and weights.stat().st_size == size_bytes
    )


def damage(folder: Path) -> str | None:
    """What is wrong with a cache folder, or None. Reads and hashes the weights."""
    try:
        digest = weights_sha256(folder)
        if digest != folder.name[: len(digest)]:
            return f"{WEIGHTS_FILE} has sha256 {digest}"
        config = parse_config(read_config(folder))
        header = read_header(folder / WEIGHTS_FILE)
        for module, (key_a, key_b) in pair_keys(header).items():
            check_pair(module, header[key_a].shape, header[key_b].shape, config)
    except (OSError, RecycleError) as error:
        return str(error)
    others = sorted({path.name for path in folder.iterdir()} - OWN_FILES)
    return f"it holds {others[0]}, which was not written by recycle" if others else None


def remove(adapters_folder: Path, name: str) -> bool:
    """Removes an adapter's folder; False when there was none.

    It is renamed first, so a kill half-way leaves no half-empty folder under a sha256.

    Args:
        adapters_folder: the cache.
        name: of the folder in it.

    Raises:
        ValueError: `name` is not that of an adapter's folder.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no sha256, with or without the digest of a configuration")
    return _discard(adapters_folder / name)


def _write(folder: Path, entry: CacheEntry) -> None:
    source = folder / SOURCE_FOLDER
    source.mkdir()
    _write_durably(source / SOURCE_CONFIG_FILE, entry.source_config)
    if entry.source_card:
        _write_durably(source / CARD_FILE, entry.source_card)
    _write_durably(folder / CONFIG_FILE, _config_text(entry))
    if entry.move:
        _move_durably(entry.weights, folder / WEIGHTS_FILE)
        return
    digest = _copy_durably(entry.weights, folder / WEIGHTS_FILE)
    if digest != entry.sha256:
        raise InputError(
            f"{entry.weights} changed while it was read", "crawl again when nobody writes to it"
        )


def _config_text(entry: CacheEntry) -> str:
    return json.dumps(entry.config, indent=2) + "\n"


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _move_durably(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        os.fsync(file.fileno())
    source.rename(target)


def _copy_durably(source: Path, target: Path) -> str:
    """Copies a file and returns the sha256 of what was copied."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(COPY_CHUNK):
            digest.update(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return digest.hexdigest()


def _put_in_place(unfinished: Path, adapters_folder: Path, entry: CacheEntry) -> Path:
    """Renames the finished folder; gives its place. One that another process put there is as good
    as ours."""
    size = (unfinished / WEIGHTS_FILE).stat().st_size
    first, other = _places(adapters_folder, entry)
    for _ in range(RENAME_ATTEMPTS):
        taken = is_whole(first, size) and not _is_of(first, entry) and _is_readable(first)
        folder = other if taken else first
        try:
            return unfinished.rename(folder)
        except OSError:
            if is_whole(folder, size) and _is_of(folder, entry):
                return folder
            if folder == other or not (is_whole(first, size) and _is_readable(first)):
                _discard(folder)
    raise RecycleError(
        f"{first} cannot be written", "check the permissions of the cache folder, or move it away"
    )


def _is_readable(folder: Path) -> bool:
    """Whether the configuration of a folder is one at all."""
    try:
        parse_config(read_config(folder))
    except AdapterProblem:
        return False
    return True


def _discard(folder: Path) -> bool:
    """Takes a folder out of sight, then removes it; False when there was none."""
    with unfinished_folder(folder.parent) as grave:
        try:
            folder.rename(grave / folder.name)
        except FileNotFoundError:
            return False
    return True
