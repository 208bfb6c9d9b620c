"""What `recycle eval` scores: the base model, adapters on it, and models with a merge in them."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recycle_cli.errors import InputError
from recycle_cli.records import AdapterRef, Document, EvaluationDocument, MergeDocument
from recycle_cli.settings import Settings
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.provenance import shown

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel

BASE = "base"
MIN_PREFIX = 8

Form = Literal["base", "adapter", "routed", "model"]


@dataclass(frozen=True)
class MergedModel:
    """A model of its own, as `recycle merge --into-base` writes it.

    Args:
        ref: its name, the digest of its weights, its folder.
        settings: where and in which dtype to load it.
    """

    ref: AdapterRef
    settings: Settings

    @property
    def word(self) -> str:
        """What a command line calls it."""
        return shown(self.ref.path)

    def load(self, like: "BaseModel") -> "BaseModel":
        """Loads it in the dtype and on the device of the base model.

        Raises:
            InputError: it cannot be loaded.
        """
        from recycle_cli.engine.base_model import load_base_model

        settings = replace(
            self.settings,
            dtype=str(like.dtype).removeprefix("torch."),
            device=like.compute.device.type,
        )
        return load_base_model(self.ref.path, settings)


@dataclass(frozen=True)
class Contender:
    """One of those that are scored; without a source, the base model."""

    source: Source | MergedModel | None

    @property
    def ref(self) -> AdapterRef | None:
        """By what it is known; None for the base model."""
        return self.source.ref if self.source else None

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.source.ref.id if self.source else BASE

    @property
    def form(self) -> Form:
        """What kind it is."""
        from recycle_cli.lora.routed import is_routed

        if self.source is None:
            return "base"
        if isinstance(self.source, MergedModel):
            return "model"
        return "routed" if is_routed(self.source.place or Path(self.source.ref.path)) else "adapter"

    def check(self, base_model: str, base: "BaseModel") -> None:
        """Checks, before anything is scored, that it can be put on. Reads no tensors of a LoRA.

        Raises:
            InputError: it cannot be read, or says that it belongs to another base model.
        """
        from recycle_cli.engine.adapted import check_modules

        if isinstance(self.source, Source) and self.form == "adapter":
            check_modules(base, self.source.shapes(base_model))

    @contextlib.contextmanager
    def on(self, base: "BaseModel", base_model: str) -> "Iterator[BaseModel]":
        """The model with this on it, or a model of its own, as long as the context lasts."""
        from recycle_cli.engine.routing import put_on

        if isinstance(self.source, MergedModel):
            yield self.source.load(base)
            return
        update = self.source.load_to_score(base_model) if self.source else None
        with put_on(base, update):
            yield base


def find_contender(
    name: str, contenders: Sequence[Contender], what: str, target: str | None = None
) -> Contender:
    """The one that a name means: `base`, `target`, or an adapter as adapters are named.

    Args:
        name: what the user wrote.
        contenders: those that are scored.
        what: what it is asked for, for the error.
        target: the sha256 of the target LoRA, where the piped input marks one.

    Raises:
        InputError: it is none of them, or could be several.
    """
    if name == BASE:
        return next(one for one in contenders if one.source is None)
    if name == "target" and target is not None:
        name = f"sha256:{target}"
    path, digest = str(Path(name).absolute()), name.removeprefix("sha256:")
    found = [
        one
        for one in contenders
        if (ref := one.ref)
        and (
            name == ref.id
            or path == ref.path
            or (len(digest) >= MIN_PREFIX and ref.sha256.startswith(digest))
        )
    ]
    if len(found) != 1:
        known = ", ".join(one.source.word for one in contenders if one.source)
        count = "none" if not found else "more than one"
        raise InputError(
            f"{what} {name!r} is {count} of the adapters", f"use base, or one of: {known or 'none'}"
        )
    return found[0]


def part_names(names: Sequence[str], settings: Settings) -> tuple[list[str], list[MergedModel]]:
    """Parts what the user named into adapters and folders that hold a whole model."""
    folders = [name for name in names if is_model_folder(Path(name).expanduser())]
    models = [_merged_model(Path(name).expanduser(), settings) for name in folders]
    return [name for name in names if name not in folders], models


def part_documents(
    documents: Sequence[Document], settings: Settings
) -> tuple[list[Document], list[MergedModel]]:
    """The same of documents from a pipe.

    Raises:
        InputError: a merged model is no longer there.
    """
    places = {at: path for at, one in enumerate(documents) if (path := _model_in(one))}
    for path in places.values():
        if not is_model_folder(Path(path)):
            raise InputError(f"there is no model at {path}", "run the merge again")
    models = [_merged_model(Path(path), settings) for path in dict.fromkeys(places.values())]
    return [one for at, one in enumerate(documents) if at not in places], models


def _model_in(document: Document) -> str | None:
    """The folder of the merged model that a document is about, where it is about one."""
    if isinstance(document, MergeDocument) and document.form == "model":
        return document.path
    if isinstance(document, EvaluationDocument) and document.form == "model":
        return document.adapter.path if isinstance(document.adapter, AdapterRef) else None
    return None


def is_model_folder(path: Path) -> bool:
    """Whether a folder holds a whole model, and no adapter."""
    return (
        (path / "config.json").is_file()
        and any(path.glob("*.safetensors"))
        and not (path / "adapter_config.json").exists()
    )


def _merged_model(folder: Path, settings: Settings) -> MergedModel:
    from recycle_cli.workflows.merge_results import model_sha256

    whole = folder.absolute()
    sha256 = model_sha256(whole, sorted(file.name for file in whole.glob("*.safetensors")))
    return MergedModel(AdapterRef(id=whole.name, sha256=sha256, path=str(whole)), settings)
