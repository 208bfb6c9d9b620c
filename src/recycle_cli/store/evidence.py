"""What is known about one adapter under vetting, read when first asked for."""

import abc
import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from recycle_cli.lora.config import AdapterConfig, AdapterProblem, parse_config
from recycle_cli.lora.folder import CONFIG_FILE, WEIGHTS_FILE, pair_keys, weights_sha256
from recycle_cli.lora.update import Lazy
from recycle_cli.store.details import ModuleFacts
from recycle_cli.store.factors import FactorsFile, Pair
from recycle_cli.store.folder import Card, FoundFolder, read_card
from recycle_cli.store.once import cached_property
from recycle_cli.store.safetensors_header import TensorInfo, read_header
from recycle_cli.store.update_facts import UpdateFacts, facts_of

MAX_CONFIG_BYTES = 1_000_000


class Found(Protocol):
    """An adapter that a source knows of, before anything of it was read."""

    @property
    def id(self) -> str:
        """What it is called."""

    @property
    def source(self) -> Literal["hub", "folder"]:
        """The kind of place."""

    @property
    def origin(self) -> str:
        """The place: a repository's id, or an absolute path."""

    @property
    def revision(self) -> str | None:
        """Which version of it, where there are several."""

    @property
    def newer(self) -> str | None:
        """The later version that takes its place, where there is one."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the place says of it: fields of AdapterDocument."""


class Evidence(abc.ABC):
    """The readings of one adapter, each made once.

    A reading raises AdapterProblem where the adapter says something that cannot be used, and
    OSError where it cannot be read at all. Checks ask for readings in the order of their cost;
    `known` tells afterwards how far they came.
    """

    def __init__(self, found: Found) -> None:
        self.found = found
        self.bytes_read = 0

    def known(self, reading: str) -> Any:
        """A reading that was already made, or None. Never reads."""
        return vars(self).get(reading)

    @abc.abstractmethod
    def check_access(self) -> None:
        """Asks whether it may be read at all, as far as that is known without reading.

        Raises:
            AdapterProblem: it may not.
        """

    @abc.abstractmethod
    def config_bytes(self) -> bytes:
        """The start of `adapter_config.json`, at most one byte more than MAX_CONFIG_BYTES."""

    @property
    @abc.abstractmethod
    def card(self) -> Card:
        """Its licence and base models as its card states them; empty where it states none."""

    @property
    @abc.abstractmethod
    def card_text(self) -> str:
        """The model card, at most its first 64 KiB; empty where there is none to read."""

    @property
    @abc.abstractmethod
    def size_bytes(self) -> int:
        """The size of the weights file."""

    @property
    @abc.abstractmethod
    def header(self) -> dict[str, TensorInfo]:
        """The tensors as the header describes them."""

    @property
    @abc.abstractmethod
    def sha256(self) -> str:
        """The adapter's identity, in hex."""

    @property
    @abc.abstractmethod
    def weights_path(self) -> Path:
        """The whole weights file on this machine."""

    @property
    def weights_are_ours(self) -> bool:
        """Whether that file was made for this vetting, and may be moved away."""
        return False

    @abc.abstractmethod
    def discard(self) -> None:
        """Removes what was fetched and not kept."""

    @cached_property
    def config_text(self) -> str:
        """The text of `adapter_config.json`, of at most 1 MB."""
        data = self.config_bytes()
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
    def pairs(self) -> dict[str, Pair]:
        """Module path -> (A, B), sorted by path."""
        keys = sorted(pair_keys(self.header).items())
        return {module: (self.header[a], self.header[b]) for module, (a, b) in keys}

    @cached_property
    def facts(self) -> UpdateFacts | None:
        """What is known of the update; None where a factor holds a NaN or an infinity. Reads the
        factors, one module at a time."""
        with contextlib.closing(FactorsFile(self.weights_path, self.pairs, self.config)) as file:
            return facts_of(Lazy(self.pairs, file.read))

    @property
    def modules(self) -> Mapping[str, ModuleFacts]:
        """The facts of each module."""
        return self._finite_facts.modules

    @cached_property
    def norm(self) -> float:
        """The Frobenius norm of the whole update."""
        return self._finite_facts.norm

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the update."""
        return self._finite_facts.fingerprint

    @property
    def _finite_facts(self) -> UpdateFacts:
        if self.facts is None:
            raise AdapterProblem("non_finite", "its weights hold NaN or infinity")
        return self.facts


class FolderEvidence(Evidence):
    """The readings of an adapter folder."""

    found: FoundFolder

    @property
    def weights_path(self) -> Path:
        """See `Evidence`."""
        return self.found.folder / WEIGHTS_FILE

    def check_access(self) -> None:
        """See `Evidence`. What may not be read is found out by reading."""

    def discard(self) -> None:
        """See `Evidence`. Nothing was fetched."""

    def config_bytes(self) -> bytes:
        """See `Evidence`."""
        self._refuse_link_outside(CONFIG_FILE)
        path = self.found.folder / CONFIG_FILE
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is no regular file")
        with path.open("rb") as file:
            return file.read(MAX_CONFIG_BYTES + 1)

    @cached_property
    def _card(self) -> tuple[Card, str]:
        return read_card(self.found)

    @property
    def card(self) -> Card:
        """See `Evidence`."""
        return self._card[0]

    @property
    def card_text(self) -> str:
        """See `Evidence`."""
        return self._card[1]

    @cached_property
    def size_bytes(self) -> int:
        """See `Evidence`."""
        self._refuse_link_outside(WEIGHTS_FILE)
        if self.weights_path.is_file():
            return self.weights_path.stat().st_size
        if os.path.lexists(self.weights_path):
            raise AdapterProblem("no_safetensors", f"{WEIGHTS_FILE} is no regular file")
        raise no_safetensors(path.name for path in self.found.folder.glob("adapter_model.*"))

    @cached_property
    def header(self) -> dict[str, TensorInfo]:
        """See `Evidence`."""
        return read_header(self.weights_path)

    @cached_property
    def sha256(self) -> str:
        """See `Evidence`. Reads the whole file."""
        digest = weights_sha256(self.found.folder)
        self.bytes_read += self.size_bytes
        return digest

    def _refuse_link_outside(self, name: str) -> None:
        if self.found.leads_outside(name):
            raise AdapterProblem(
                "link_outside", f"{name} is a link that leads out of the crawled folder"
            )


def no_safetensors(others: Iterable[str]) -> AdapterProblem:
    """The problem of an adapter without a weights file that is read; `others` are those it has."""
    names = sorted(others)
    beside = f", but {', '.join(names)}, which is not read" if names else ""
    return AdapterProblem("no_safetensors", f"there is no {WEIGHTS_FILE}{beside}")
