"""Crawls of the stand-in Hub in this process, with the real client."""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from huggingface_hub import constants

from recycle_cli.records import AdapterDocument, CrawlDocument
from recycle_cli.settings import Settings
from recycle_cli.store.hub import Hub
from recycle_cli.store.hub_requests import Patience
from recycle_cli.workflows.crawl import crawl
from recycle_cli.workflows.crawl_request import CrawlRequest
from support import hub as stand_in
from support.strangers import BASE_MODEL, base_shapes
from support.strangers.draft import CARD, CONFIG, WEIGHTS, Draft

__all__ = [
    "CARD",
    "CONFIG",
    "WEIGHTS",
    "Crawler",
    "Heard",
    "adapter",
    "changed",
    "online",
    "uploaded_again",
]

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LARGE = {"rank": 128, "modules": ALL}
"""For `adapter`: a file of half a megabyte, of which a first request asks for a part only."""


@contextmanager
def online(endpoint: str = "http://127.0.0.1:9", token: str = "") -> Iterator[None]:
    """What the client reads from its environment, most of it once and at import: this Hub, with
    this token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        moved = endpoint + template.removeprefix(constants.ENDPOINT)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", moved)
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
        patch.setenv("HF_TOKEN", token)
        patch.setenv("NO_PROXY", stand_in.server.HOST)
        yield


def adapter(
    repo_id: str,
    seed: int = 0,
    rank: int = 4,
    modules: tuple[str, ...] = ("q_proj", "v_proj"),
    files: Mapping[str, bytes | None] | None = None,
    created_at: str | None = None,
    downloads: int | None = None,
    config: Mapping[str, Any] | None = None,
    **facts: Any,
) -> stand_in.Repository:
    """A repository with a good adapter of the pico model."""
    draft = Draft(BASE_MODEL, Random(f"{seed}/{repo_id}"))
    draft.license = "mit"
    draft.config |= {"r": rank, "lora_alpha": 2 * rank, "use_rslora": False}
    draft.adapt(*modules)
    if rank > 64:  # a norm as small as the others'
        draft.config["lora_alpha"] = rank // 8
    draft.config |= config or {}
    draft.files |= files or {}
    for name, value in facts.items():
        setattr(draft, name, value)
    made = draft.finish(repo_id, created_at or f"2025-01-01T00:00:{seed % 60:02d}.000Z")
    made.downloads = made.downloads if downloads is None else downloads
    return made


def uploaded_again(
    repo_id: str, original: stand_in.Repository, created_at: str, **fields: Any
) -> stand_in.Repository:
    """A later repository with the same weights, its configuration changed in some fields."""
    other = adapter(repo_id, created_at=created_at)
    config = json.loads(original.newest[CONFIG].content) | fields
    other.commit(changed(original, config=json.dumps(config).encode()))
    return other


def changed(repository: stand_in.Repository, **files: bytes) -> dict[str, bytes]:
    """The files of its newest commit with some in the place of others: config, weights, card."""
    names = {"config": CONFIG, "weights": WEIGHTS, "card": CARD}
    newest = {path: file.content for path, file in repository.newest.items()}
    return newest | {names[name]: content for name, content in files.items()}


class Heard:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.details: list[str] = []
        self.advanced: list[str] = []

    def stage(self, title: str, total: int | None = None) -> None:
        """See `Progress`."""

    def advance(self, note: str = "") -> None:
        """See `Progress`."""
        self.advanced.append(note)

    def message(self, text: str) -> None:
        """See `Progress`."""
        self.messages.append(text)

    def detail(self, text: str) -> None:
        """See `Progress`."""
        self.details.append(text)


class Crawler:
    """A home, a Hub, and a way to crawl the one into the other.

    Args:
        stand: the stand-in Hub, running.
        home: for the cache and the index.
        request: fields of every crawl's request.
    """

    def __init__(self, stand: stand_in.Hub, home: Path, **request: Any) -> None:
        self.stand = stand
        self.settings = Settings(home)
        self.request = replace(CrawlRequest(None, BASE_MODEL), **request)
        self.heard = Heard()
        self.patience: Patience | None = None
        self.summary = CrawlDocument(
            source="", base_model="", counts={}, reasons={}, requests=0, bytes=0, elapsed_s=0
        )
        self.asked: Counter[str] = Counter()
        self.log: list[Any] = []

    def crawl(self, token: str = "", **changes: Any) -> dict[str, AdapterDocument]:
        """Crawls; the documents by id. `summary`, `asked` and `log` are of the latest crawl."""
        self.stand.reset_log()
        with online(self.stand.url, token):
            *documents, summary = crawl(
                replace(self.request, **changes),
                self.settings,
                base_shapes(),
                self.heard,
                Hub(self.stand.url, self.patience),
            )
        assert isinstance(summary, CrawlDocument)
        self.summary, self.log = summary, list(self.stand.requests)
        self.asked = self.stand.counts
        adapters = [one for one in documents if isinstance(one, AdapterDocument)]
        assert len(adapters) == len(documents)
        return {document.id: document for document in adapters}

    def verdicts(self, token: str = "", **changes: Any) -> dict[str, str]:
        """Crawls; id -> `accepted` or a reason."""
        return {
            name: one.reason or one.status for name, one in self.crawl(token, **changes).items()
        }

    def files_asked(self) -> Counter[str]:
        """How often each repository was asked for a file in the latest crawl, storage included."""
        parts = [one.parts for one in self.log if one.kind in ("resolve", "storage")]
        return Counter("/".join(part[:2]) for part in parts)

    def rows(self) -> list[dict[str, Any]]:
        """The index as it is, with plain SQLite."""
        return rows_of(self.settings.home)

    def kept(self) -> set[str]:
        """The names in the adapter cache."""
        folder = self.settings.adapters_folder
        return {path.name for path in folder.iterdir()} if folder.exists() else set()


def rows_of(home: Path) -> list[dict[str, Any]]:
    """Every row of the index in a home, by id and revision."""
    file = home / "catalog.sqlite"
    if not file.exists():
        return []
    with closing(sqlite3.connect(file)) as connection:
        connection.row_factory = sqlite3.Row
        with suppress(sqlite3.OperationalError):  # a crawl is about to make the table
            found = connection.execute("SELECT * FROM adapters ORDER BY id, revision")
            return [dict(row) for row in found]
    return []
