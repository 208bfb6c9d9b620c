"""What is known about one adapter under vetting, read from its folder when first asked for."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from recycle_cli.lora.config import AdapterConfig, AdapterProblem, parse_config
from recycle_cli.lora.folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    pair_keys,
    read_adapter,
    weights_sha256,
)
from recycle_cli.lora.norm import fingerprint, module_norms, total_norm
from recycle_cli.lora.update import ModelUpdate
from recycle_cli.store.folder import Card, FoundFolder, read_card
from recycle_cli.store.safetensors_header import TensorInfo, read_header

MAX_CONFIG_BYTES = 1_000_000
Pair = tuple[TensorInfo, TensorInfo]


class Evidence:
    """The readings of one adapter folder, each made once.

    A reading raises AdapterProblem where the file says something that cannot be used, and OSError
    where it cannot be read at all. Checks ask for readings in the order of their cost; `known`
    tells afterwards how far they came.
    """

    def __init__(self, found: FoundFolder) -> None:
        self.found = found
        self.bytes_read = 0

    def known(self, reading: str) -> Any:
        """A reading that was already made, or None. Never reads."""
        return vars(self).get(reading)

    @property
    def weights_path(self) -> Path:
        """Where the weights file is, or should be."""
        return self.found.folder / WEIGHTS_FILE

    @cached_property
    def config_text(self) -> str:
        """The text of `adapter_config.json`, of at most 1 MB."""
        self._refuse_link_outside(CONFIG_FILE)
        with (self.found.folder / CONFIG_FILE).open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise AdapterProblem(
                "config_too_large", f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes"
            )
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise AdapterProblem("bad_config", f"{CONFIG_FILE} is not UTF-8: {error}") from error

    @cached_property
    def config(self) -> AdapterConfig:
        """The configuration as plain data."""
        try:
            fields = json.loads(self.config_text)
        except (ValueError, RecursionError) as error:
            raise AdapterProblem("bad_config", f"{CONFIG_FILE} is not JSON: {error}") from error
        return parse_config(fields)

    @cached_property
    def _card(self) -> tuple[Card, str]:
        return read_card(self.found)

    @property
    def card(self) -> Card:
        """What the model card's front matter says; empty where there is none."""
        return self._card[0]

    @property
    def card_text(self) -> str:
        """The model card, at most its first 64 KiB."""
        return self._card[1]

    @cached_property
    def size_bytes(self) -> int:
        """The size of the weights file."""
        self._refuse_link_outside(WEIGHTS_FILE)
        if self.weights_path.is_file():
            return self.weights_path.stat().st_size
        pickles = sorted(path.name for path in self.found.folder.glob("adapter_model.*"))
        beside = f", but {', '.join(pickles)}, which is not read" if pickles else ""
        raise AdapterProblem("no_safetensors", f"there is no {WEIGHTS_FILE}{beside}")

    @cached_property
    def header(self) -> dict[str, TensorInfo]:
        """The tensors as the header describes them."""
        return read_header(self.weights_path)

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        """Module path -> (A, B), sorted by path."""
        keys = sorted(pair_keys(self.header).items())
        return {module: (self.header[a], self.header[b]) for module, (a, b) in keys}

    @cached_property
    def sha256(self) -> str:
        """The adapter's identity, in hex. Reads the whole file."""
        digest = weights_sha256(self.found.folder)
        self.bytes_read += self.size_bytes
        return digest

    @cached_property
    def update(self) -> ModelUpdate:
        """The update itself, factors in float32."""
        return read_adapter(self.found.folder).update

    @cached_property
    def finite(self) -> bool:
        """True when no factor holds a NaN or an infinity."""
        return all(
            bool(torch.isfinite(piece.A).all()) and bool(torch.isfinite(piece.B).all())
            for piece in self.update.values()
        )

    @cached_property
    def module_norms(self) -> dict[str, float]:
        """The Frobenius norm of each module's update."""
        return module_norms(self.update)

    @cached_property
    def norm(self) -> float:
        """The Frobenius norm of the whole update."""
        return total_norm(self.module_norms)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the update."""
        return fingerprint(self.update, self.module_norms)

    def _refuse_link_outside(self, name: str) -> None:
        if self.found.leads_outside(name):
            raise AdapterProblem(
                "link_outside", f"{name} is a link that leads out of the crawled folder"
            )
