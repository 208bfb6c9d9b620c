"""From what the user names to adapters: folders, ids in the index, documents from a pipe."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.lora.base_names import same_base_model
from recycle_cli.records import (
    AdapterDocument,
    AdapterRef,
    Document,
    EvaluationDocument,
    MergeDocument,
    SelectionDocument,
    TaskRef,
    TuneDocument,
)
from recycle_cli.settings import Settings
from recycle_cli.store.text import expanded
from recycle_cli.workflows.provenance import shown

if TYPE_CHECKING:
    from recycle_cli.lora.folder import AdapterFile
    from recycle_cli.lora.routed import RoutedAdapter
    from recycle_cli.lora.update import LowRankUpdate, ModelUpdate


@dataclass(frozen=True)
class Source:
    """An adapter that a command works on: what it is called, where it lies, its licence. `place`
    is where it lies until it is moved to the path of `ref`."""

    ref: AdapterRef
    license: str | None = None
    place: Path | None = None

    @property
    def word(self) -> str:
        """What a command line calls it: a kept adapter by its hash, the same on every machine."""
        kept = Path(self.ref.path).name == self.ref.sha256
        return f"sha256:{self.ref.sha256[:12]}" if kept else shown(self.ref.path)

    @property
    def _folder(self) -> Path:
        return self.place or Path(self.ref.path)

    def load_to_score(self, base_model: str) -> "ModelUpdate | RoutedAdapter":
        """Its update, or what routes tokens between several.

        Raises:
            InputError: it cannot be read, or says that it belongs to another base model.
        """
        from recycle_cli.lora.routed import is_routed, read_routed

        if not is_routed(self._folder):
            return self.load(base_model)
        adapter, stated = read_routed(self._folder)
        self._check_base(stated, base_model)
        return adapter

    def load(self, base_model: str) -> "ModelUpdate":
        """Its update.

        Raises:
            InputError: as `open`.
        """
        with self.open(base_model) as opened:
            return {module: opened.read(module) for module in opened.shapes}

    @contextlib.contextmanager
    def open(self, base_model: str) -> "Iterator[OpenSource]":
        """Opens it, to be read one module at a time.

        Raises:
            InputError: it cannot be read, is no LoRA, or says that it belongs to another base
                model.
        """
        from recycle_cli.lora.folder import open_adapter

        self.check_is_lora()
        with contextlib.ExitStack() as stack:
            with self._named():
                file = stack.enter_context(open_adapter(self._folder))
            self._check_base(file.config.base_model, base_model)
            yield OpenSource(self, file)

    def shapes(self, base_model: str) -> "Mapping[str, tuple[int, int]]":
        """Module path -> (out, in). Reads no tensor.

        Raises:
            InputError: as `open`.
        """
        with self.open(base_model) as opened:
            return opened.shapes

    def largest_rank(self, base_model: str) -> int:
        """The largest rank among its modules. Reads no tensor.

        Raises:
            InputError: as `open`.
        """
        with self.open(base_model) as opened:
            return opened.file.largest_rank

    @property
    def config_digest(self) -> str:
        """Stands for what its configuration makes of its tensors, in hex."""
        from recycle_cli.lora.config import parse_config
        from recycle_cli.lora.folder import read_config

        with self._named():
            config = parse_config(read_config(self._folder))
        scaling = config.alpha, config.use_rslora, sorted(config.alpha_pattern.items())
        return hashlib.sha256(repr(scaling).encode()).hexdigest()[:16]

    def check_is_lora(self) -> None:
        """Checks that it is one low-rank update, without reading it.

        Raises:
            InputError: it routes between several.
        """
        from recycle_cli.lora.routed import is_routed

        if is_routed(self._folder):
            raise InputError(
                f"adapter {self.ref.id!r} routes token by token, so it is no LoRA",
                "score it with recycle eval; merge, tune or select the adapters that it routes "
                "between",
            )

    def _check_base(self, stated: str | None, base_model: str) -> None:
        if stated and _is_model_name(stated) and not same_base_model(stated, base_model):
            raise InputError(
                f"adapter {self.ref.id!r} belongs to {stated}, not to {base_model}",
                f"leave it out, or use --base-model {stated}",
            )

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Puts the adapter's name before what is wrong with it."""
        from recycle_cli.lora.config import AdapterProblem

        try:
            yield
        except AdapterProblem as problem:
            message = f"adapter {self.ref.id!r} cannot be used: {problem.message}"
            raise InputError(message, problem.hint) from problem


@dataclass(frozen=True)
class OpenSource:
    """An adapter that is open for reading."""

    source: Source
    file: "AdapterFile"

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Module path -> (out, in), sorted by path."""
        return self.file.shapes

    @property
    def entries(self) -> int:
        """How many numbers its factors hold."""
        return self.file.entries

    @property
    def update(self) -> "ModelUpdate":
        """Its update, whose modules are read when they are asked for."""
        from recycle_cli.lora.update import Lazy

        return Lazy(self.shapes, self.read)

    def read(self, module: str) -> "LowRankUpdate":
        """The update of one module.

        Raises:
            InputError: it holds NaN or infinity.
        """
        piece = self.file.read(module)
        if not (piece.A.isfinite().all() and piece.B.isfinite().all()):
            raise InputError(
                f"adapter {self.source.ref.id!r} cannot be used: {module} holds NaN or infinity",
                "leave this adapter out",
            )
        return piece


def counted(adapters: Sequence[object]) -> str:
    """How many adapters there are, in words."""
    return f"{len(adapters)} adapter{'' if len(adapters) == 1 else 's'}"


def _is_model_name(name: str) -> bool:
    """False for a path on the machine that the adapter was trained on, which says nothing here."""
    return not name.startswith(("/", ".", "~", "\\")) and ":\\" not in name


def resolve_names(names: Sequence[str], settings: Settings) -> list[Source]:
    """The adapters that the user named.

    Raises:
        InputError: a name is neither an adapter folder nor in the index, or comes twice.
    """
    return _all_different([_resolve(name, settings) for name in names])


def resolve_documents(
    documents: Sequence[Document], settings: Settings, members: bool = False
) -> list[Source]:
    """The adapters that documents from a pipe name: those of selections, accepted ones of a crawl
    or an index listing, and the results of merge and tune.

    Args:
        documents: what came through the pipe.
        settings: where the index is.
        members: take the adapters that went into the results of merge and tune, not the results.

    Raises:
        InputError: there is none, an adapter's folder has gone, or one comes twice.
    """
    sources = [source for document in documents for source in _sources_in(document, members)]
    if not sources:
        raise InputError(
            "the input names no adapters", "pipe in what select, crawl, merge or tune printed"
        )
    licenses = _licenses(sources, settings)
    return _all_different(
        [
            Source(
                source.ref,
                source.license or licenses.get(source.ref.sha256) or _stated_license(source.ref),
            )
            for source in sources
        ]
    )


def target_of_documents(documents: Sequence[Document]) -> str | None:
    """The sha256 of the adapter that selections from a pipe mark as the target LoRA, where there is
    one."""
    marked = {
        adapter.sha256
        for document in documents
        if isinstance(document, SelectionDocument)
        for adapter in document.adapters
        if adapter.role == "target"
    }
    return marked.pop() if len(marked) == 1 else None


def task_of_documents(documents: Sequence[Document]) -> TaskRef | None:
    """The task that documents from a pipe are about, when they agree on one."""
    tasks = [
        document.task
        for document in documents
        if isinstance(document, SelectionDocument | TuneDocument | EvaluationDocument)
    ]
    return tasks[0] if tasks and len({task.path for task in tasks if task}) == 1 else None


def base_of_documents(documents: Sequence[Document]) -> str | None:
    """The base model that documents from a pipe are about, when they agree on one."""
    names = {getattr(document, "base_model", None) for document in documents} - {None}
    return names.pop() if len(names) == 1 else None


def _resolve(name: str, settings: Settings) -> Source:
    from recycle_cli.store.catalog import Catalog

    path = expanded(name)
    if path.is_dir():
        return _folder_source(name, path)
    with Catalog(settings.catalog_file) as catalog:
        return _catalog_source(catalog.get(name))


def _folder_source(name: str, path: Path) -> Source:
    from recycle_cli.lora.folder import WEIGHTS_FILE, weights_sha256
    from recycle_cli.lora.routed import ROUTED_WEIGHTS_FILE, is_routed

    weights_file = ROUTED_WEIGHTS_FILE if is_routed(path) else WEIGHTS_FILE
    try:
        sha256 = weights_sha256(path, weights_file)
    except OSError as error:
        raise InputError(
            f"{name} is no adapter folder: it has no readable {weights_file}",
            "name a folder that recycle or PEFT wrote",
        ) from error
    ref = AdapterRef(id=path.absolute().name, sha256=sha256, path=str(path.absolute()))
    return Source(ref, _stated_license(ref))


def _stated_license(ref: AdapterRef) -> str | None:
    """The licence in the card of an adapter's folder."""
    from recycle_cli.store.folder import FoundFolder, read_card

    folder = Path(ref.path)
    return read_card(FoundFolder(id=ref.id, folder=folder, root=folder))[0].license


def _catalog_source(row: AdapterDocument) -> Source:
    from recycle_cli.store.names import SUPERSEDED

    if row.status == "accepted" and row.path is None:
        raise InputError(
            f"adapter {row.id!r} comes from a dry run, which keeps nothing",
            "crawl without --dry-run",
        )
    # A revision that another one took the place of is still kept, for those who name it.
    usable = row.status == "accepted" or row.reason == SUPERSEDED
    if not usable or row.path is None or row.sha256 is None:
        raise InputError(
            f"adapter {row.id!r} is in the index as {row.status}: {row.reason} ({row.detail})",
            "name an accepted one: recycle index list",
        )
    ref = AdapterRef(id=row.id, revision=row.revision, sha256=row.sha256, path=row.path)
    return Source(ref, row.license)


def _sources_in(document: Document, members: bool) -> list[Source]:
    if isinstance(document, AdapterDocument):
        return [_catalog_source(document)] if document.status == "accepted" else []
    refs = _refs_in(document, members)
    for ref in refs:
        if not Path(ref.path).is_dir():
            raise InputError(
                f"adapter {ref.id!r} is no longer at {ref.path}", "run the first command again"
            )
    return [Source(_plain(ref)) for ref in refs]


def _refs_in(document: Document, members: bool) -> Sequence[AdapterRef]:
    if isinstance(document, SelectionDocument):
        return document.adapters
    if isinstance(document, MergeDocument | TuneDocument):
        if members:
            return document.adapters
        if isinstance(document, MergeDocument) and document.form == "adapter+residual":
            raise InputError(
                f"{document.path} is an adapter with a residual beside it",
                f"name what you mean: {document.path}, or {document.path}/residual too",
            )
        if isinstance(document, MergeDocument) and document.form == "model":
            raise InputError(
                f"{document.path} is a merged model, no adapter",
                f"use it as a base model: --base-model {document.path}",
            )
        return [AdapterRef(id=Path(document.path).name, sha256=document.sha256, path=document.path)]
    if isinstance(document, EvaluationDocument) and isinstance(document.adapter, AdapterRef):
        return [document.adapter]
    return []


def _plain(ref: AdapterRef) -> AdapterRef:
    return AdapterRef(id=ref.id, revision=ref.revision, sha256=ref.sha256, path=ref.path)


def _licenses(sources: Sequence[Source], settings: Settings) -> dict[str, str | None]:
    """What the index knows of the licences of adapters that came without one."""
    from recycle_cli.store.catalog import Catalog

    with Catalog(settings.catalog_file) as catalog:
        rows = [catalog.find(f"sha256:{source.ref.sha256}") for source in sources]
    return {row.sha256: row.license for row in rows if row is not None and row.sha256}


def _all_different(sources: list[Source]) -> list[Source]:
    seen: dict[str, str] = {}
    for source in sources:
        if source.ref.sha256 in seen:
            raise InputError(
                f"adapters {seen[source.ref.sha256]!r} and {source.ref.id!r} are the same file",
                "name each adapter once",
            )
        seen[source.ref.sha256] = source.ref.id
    return sources


def load_updates(sources: Sequence[Source], base_model: str) -> "list[ModelUpdate]":
    """The updates of several adapters.

    Raises:
        InputError: one of them cannot be used with this base model.
    """
    if not sources:
        raise RecycleError("there are no adapters", "name some, or pipe in a selection")
    return [source.load(base_model) for source in sources]
