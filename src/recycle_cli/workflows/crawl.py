"""`recycle crawl FOLDER`: vet every adapter under a folder, keep the good ones, record them all."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError
from recycle_cli.progress import Progress, Silent
from recycle_cli.records import AdapterDocument, CrawlDocument
from recycle_cli.settings import Settings
from recycle_cli.store.catalog import Catalog
from recycle_cli.workflows.provenance import shown

if TYPE_CHECKING:
    from recycle_cli.store.evidence import Evidence
    from recycle_cli.store.folder import FoundFolder
    from recycle_cli.store.vetting import VettingLimits, VettingRules

VETTING_VERSION = 1
"""Raised when a check changes its mind, so that adapters vetted before are looked at again."""


@dataclass(frozen=True)
class CrawlRequest:
    """What to crawl, and what to let in.

    Args:
        folder: where to look for adapter folders.
        base_model: the canonical name of the base model.
        limit: look at this many adapters at most, in the order of their paths.
        licenses: the licences allowed, or None for any and none.
        max_rank: the largest rank allowed.
        max_bytes: the largest weights file allowed, or None for the usual limit.
        dry_run: vet, but keep and record nothing.
    """

    folder: Path
    base_model: str
    limit: int | None = None
    licenses: frozenset[str] | None = None
    max_rank: int | None = None
    max_bytes: int | None = None
    dry_run: bool = False

    def command(self) -> list[str]:
        """The command line that asks for the same."""
        words = ["recycle", "crawl", shown(self.folder), "--base-model", self.base_model]
        limits = {"--limit": self.limit, "--max-rank": self.max_rank, "--max-bytes": self.max_bytes}
        for name, value in limits.items():
            words += [name, str(value)] * (value is not None)
        for license_name in sorted(self.licenses or ()):
            words += ["--license", license_name]
        return [*words, *["--dry-run"] * self.dry_run]


def crawl_folder(
    request: CrawlRequest,
    settings: Settings,
    base_shapes: Mapping[str, tuple[int, int]],
    progress: Progress | None = None,
) -> Iterator[AdapterDocument | CrawlDocument]:
    """Vets the adapters under a folder.

    The folder is looked through at once; the adapters are vetted as the iterator is advanced. One
    that has not changed since it was last vetted under the same rules is not read again.

    Args:
        request: what to crawl, and what to let in.
        settings: where the cache and the index are.
        base_shapes: the (out, in) of every linear module of the base model, by module path.
        progress: told of each adapter.

    Returns:
        One AdapterDocument for each adapter, as it is done, and one CrawlDocument at the end.

    Raises:
        InputError: the folder does not exist, is no folder, or holds no adapter.
        RecycleError: from the iterator, when the index or the cache cannot be written.
    """
    found = _find(request, settings)
    return _Crawl(request, settings, base_shapes, progress or Silent()).run(found)


def check_folder(folder: Path) -> None:
    """Checks, before anything is loaded, that there is a folder to crawl.

    Raises:
        InputError: there is none.
    """
    if not folder.expanduser().is_dir():
        problem = "is no folder" if folder.expanduser().exists() else "does not exist"
        raise InputError(f"{folder} {problem}", "name a folder that holds adapter folders")


def _find(request: CrawlRequest, settings: Settings) -> "list[FoundFolder]":
    from recycle_cli.store.folder import find_adapters

    check_folder(request.folder)
    folder = request.folder.expanduser()
    found = list(find_adapters(folder, skip=[settings.adapters_folder]))
    if not found:
        raise InputError(
            f"{request.folder} holds no adapter: no folder in it has an adapter_config.json",
            "name the folder above your adapters, or one adapter's own folder",
        )
    return found[: request.limit]


@dataclass
class _Crawl:
    """A crawl under way, and what it has counted so far."""

    request: CrawlRequest
    settings: Settings
    base_shapes: Mapping[str, tuple[int, int]]
    progress: Progress
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    accepted: dict[str, str] = field(default_factory=dict)  # sha256 -> id, of this crawl

    def run(self, found: "list[FoundFolder]") -> Iterator[AdapterDocument | CrawlDocument]:
        started = time.monotonic()
        self.progress.stage("vetting adapters", len(found))
        with self._open_catalog() as catalog:
            rules = self._rules(catalog)
            digest = _digest_of(rules)
            if not self.request.dry_run:
                from recycle_cli.store.cache import sweep

                sweep(self.settings.adapters_folder)
            for folder in found:
                document = self._one(folder, catalog, rules, digest)
                self._count(document)
                yield document
        yield CrawlDocument(
            source="folder",
            base_model=self.request.base_model,
            counts=dict(self.counts),
            reasons=dict(self.reasons),
            requests=0,
            bytes=self.bytes_read,
            elapsed_s=time.monotonic() - started,
        )

    def _open_catalog(self) -> Catalog:
        """The index; a dry run reads it where there is one, and makes none."""
        file = self.settings.catalog_file
        return Catalog(None if self.request.dry_run and not file.exists() else file)

    def _rules(self, catalog: Catalog) -> "VettingRules":
        from recycle_cli.store.vetting import VettingRules

        def holder_of(sha256: str, adapter_id: str) -> str | None:
            earlier = self.accepted.get(sha256)
            return earlier if earlier is not None else catalog.holder_of(sha256, adapter_id)

        return VettingRules(
            self.request.base_model, self.base_shapes, _limits(self.request), holder_of
        )

    def _one(
        self, folder: "FoundFolder", catalog: Catalog, rules: "VettingRules", digest: str
    ) -> AdapterDocument:
        from recycle_cli.store.evidence import Evidence
        from recycle_cli.store.vetting import describe, vet

        stamp = _stamp(folder, digest)
        recorded = catalog.unchanged("folder", folder.origin, stamp) if stamp else None
        if recorded is not None and self._still_holds(recorded, folder, catalog):
            return recorded
        evidence = Evidence(folder)
        document = describe(evidence, vet(evidence, rules), rules)
        if not self.request.dry_run:
            document = self._keep(document, evidence)
            if not _serves_another_base(document, catalog):
                catalog.record(document, None if document.status == "failed" else stamp)
        self.bytes_read += evidence.bytes_read
        return document

    def _still_holds(
        self, recorded: AdapterDocument, folder: "FoundFolder", catalog: Catalog
    ) -> bool:
        """True when what was recorded of an unchanged adapter does not hang on what has gone."""
        from recycle_cli.store.cache import is_whole

        if recorded.id != folder.id:
            return False
        if recorded.reason == "duplicate":
            return catalog.holder_of(recorded.sha256 or "", recorded.id) is not None
        if recorded.status != "accepted":
            return True
        path, size = recorded.path, recorded.size_bytes
        return path is not None and size is not None and is_whole(Path(path), size)

    def _keep(self, document: AdapterDocument, evidence: "Evidence") -> AdapterDocument:
        """Keeps an accepted adapter; its document with the path it is kept under."""
        from recycle_cli.store.cache import CacheEntry, clean_config, keep
        from recycle_cli.store.vetting import UNREADABLE

        if document.status != "accepted":
            return document
        ranks = {module: a.shape[0] for module, (a, _) in evidence.pairs.items()}
        entry = CacheEntry(
            sha256=evidence.sha256,
            weights=evidence.weights_path,
            config=clean_config(evidence.config, ranks, self.request.base_model),
            source_config=evidence.config_text,
            source_card=evidence.card_text,
        )
        try:
            path = keep(self.settings.adapters_folder, entry)
        except InputError as error:
            failure = {"status": "failed", "reason": UNREADABLE, "detail": error.message}
            return document.model_copy(update=failure)
        return document.model_copy(update={"path": str(path)})

    def _count(self, document: AdapterDocument) -> None:
        self.counts[document.status] += 1
        if document.reason is not None:
            self.reasons[document.reason] += 1
        if document.status == "accepted" and document.sha256 is not None:
            self.accepted[document.sha256] = document.id
        self.progress.advance(f"{document.id}: {document.reason or document.status}")


def _serves_another_base(document: AdapterDocument, catalog: Catalog) -> bool:
    """Whether an adapter refused for its base model is in the pool of another one: it stays."""
    if document.reason not in ("wrong_base", "unknown_base"):
        return False
    recorded = catalog.at(document.source, document.origin)
    return recorded is not None and recorded.status == "accepted"


def _limits(request: CrawlRequest) -> "VettingLimits":
    from recycle_cli.store.vetting import VettingLimits

    limits = VettingLimits(max_rank=request.max_rank, licenses=request.licenses)
    if request.max_bytes is None:
        return limits
    return replace(limits, max_weights_bytes=request.max_bytes)


def _digest_of(rules: "VettingRules") -> str:
    """A digest of all that decides a verdict beside the adapter's own files."""
    limits = {**asdict(rules.limits), "licenses": sorted(rules.limits.licenses or ())}
    decisive = {
        "version": VETTING_VERSION,
        "base_model": rules.base_model,
        "base_shapes": sorted(rules.base_shapes.items()),
        "any_license": rules.limits.licenses is None,
        "limits": limits,
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _stamp(folder: "FoundFolder", rules_digest: str) -> str | None:
    """What must be the same for a verdict to hold; None where the files cannot be looked at."""
    from recycle_cli.lora.folder import CONFIG_FILE, WEIGHTS_FILE
    from recycle_cli.store.folder import CARD_FILE

    files: dict[str, list[int] | None] = {}
    for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
        try:
            status = (folder.folder / name).stat()
        except FileNotFoundError:
            files[name] = None
        except OSError:
            return None
        else:
            files[name] = [status.st_size, status.st_mtime_ns]
    return json.dumps({"files": files, "rules": rules_digest}, sort_keys=True)
