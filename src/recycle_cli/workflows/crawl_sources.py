"""Where a crawl looks: a folder, or the Hub. What there is, and how each is looked at."""

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.lora.base_names import copies_of
from recycle_cli.progress import Progress
from recycle_cli.settings import Settings
from recycle_cli.store.hub_environment import check_hub_environment
from recycle_cli.store.text import expanded
from recycle_cli.workflows.workers import as_finished

if TYPE_CHECKING:
    from recycle_cli.store.evidence import Evidence, Found
    from recycle_cli.store.hub import Hub
    from recycle_cli.store.hub_repository import HubRepository
    from recycle_cli.store.room import Room
    from recycle_cli.workflows.crawl_request import CrawlRequest


class Stopped(RecycleError):
    """The crawl has ended, and what it was still fetching with it."""


class CrawlSource(ABC):
    """A place with adapters."""

    workers: int
    """How many of its adapters are looked at at once."""
    looks_at_tensors: bool
    """Whether the checks that read the tensors are run."""

    @abstractmethod
    def find(self, progress: Progress) -> "Sequence[Found]":
        """The adapters there are.

        Raises:
            InputError: there are none.
            RecycleError: the place cannot be asked.
        """

    @abstractmethod
    def evidence(self, found: "Found") -> "Evidence":
        """What can be known of one of them. Nothing is read yet."""

    @abstractmethod
    def stamp(self, found: "Found", rules_digest: str) -> str | None:
        """What must be the same for a verdict to hold; None where it never does."""

    @abstractmethod
    def stop(self) -> None:
        """Ends what is under way."""


class FolderSource(CrawlSource):
    """The adapter folders at or under a folder, one at a time."""

    workers = 1
    looks_at_tensors = True

    def __init__(self, request: "CrawlRequest", settings: Settings) -> None:
        assert request.folder is not None
        self._folder, self._limit = expanded(request.folder), request.limit
        self._adapters_folder = settings.adapters_folder

    def find(self, progress: Progress) -> "Sequence[Found]":
        """See `CrawlSource`."""
        from recycle_cli.store.folder import find_adapters, with_versions

        check_folder(self._folder)
        there = find_adapters(self._folder, skip=[self._adapters_folder])
        found = with_versions(there)
        if not found:
            raise InputError(
                f"{self._folder} holds no adapter: no folder in it has an adapter_config.json",
                "name the folder above your adapters, or one adapter's own folder",
            )
        return found[: self._limit]

    def evidence(self, found: "Found") -> "Evidence":
        """See `CrawlSource`."""
        from recycle_cli.store.evidence import FolderEvidence
        from recycle_cli.store.folder import FoundFolder

        assert isinstance(found, FoundFolder)
        return FolderEvidence(found)

    def stamp(self, found: "Found", rules_digest: str) -> str | None:
        """See `CrawlSource`. Sizes and times of the files that a verdict hangs on."""
        from recycle_cli.lora.folder import CONFIG_FILE, WEIGHTS_FILE
        from recycle_cli.store.folder import CARD_FILE, FoundFolder

        assert isinstance(found, FoundFolder)
        files: dict[str, list[int] | None] = {}
        for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
            try:
                status = (found.folder / name).stat()
            except FileNotFoundError:
                files[name] = None
            except OSError:
                return None
            else:
                files[name] = [status.st_size, status.st_mtime_ns]
        return _stamp({"files": files, "newer": found.newer, "rules": rules_digest})

    def stop(self) -> None:
        """See `CrawlSource`. Nothing is under way between two results."""


class HubSource(CrawlSource):
    """The Hub's adapters of a base model, or those of a list, several at a time.

    Args:
        request: what to look for.
        settings: where the adapter cache is.
        room: how much may be fetched.
        hub: the Hub; None for the one that the environment names.
    """

    def __init__(
        self, request: "CrawlRequest", settings: Settings, room: "Room", hub: "Hub | None" = None
    ) -> None:
        from recycle_cli.store.hub import Hub

        check_online(settings)
        self.hub = hub or Hub()
        self.workers = request.workers
        self.looks_at_tensors = not request.dry_run
        self._request, self._room = request, room
        self._adapters_folder = settings.adapters_folder
        self._stopping = threading.Event()

    def find(self, progress: Progress) -> "Sequence[Found]":
        """See `CrawlSource`. In the order in which they came to the Hub, so that of two with the
        same weights the earlier one is kept; those of a list in its order."""
        found = self._listed_ids(progress) if self._request.ids else self._listed(progress)
        if not found:
            raise InputError(
                f"the Hub lists no adapter of {self._request.base_model}",
                "check the name, add one that its adapters state with --also-base, or give "
                "--ids-from",
            )
        return found

    def _listed(self, progress: Progress) -> "list[HubRepository]":
        request = self._request
        names = [*copies_of(request.base_model), *sorted(request.also_bases)]
        if not names:
            raise InputError(
                f"{request.base_model} is a folder, which no adapter on the Hub states as its base",
                "say what its Hub id is with --also-base",
            )
        progress.stage("listing adapters")
        found = self.hub.adapters_of(names, request.author, request.limit)
        return sorted(found, key=lambda one: (one.created_at or "", one.id))

    def _listed_ids(self, progress: Progress) -> "list[HubRepository]":
        ids = list(dict.fromkeys(self._request.ids))[: self._request.limit]
        progress.stage("asking for the commits of a list", len(ids))
        found: dict[int, HubRepository] = {}

        def ask(place: int) -> "tuple[int, HubRepository]":
            return place, self._ask(ids[place])

        for place, repository in as_finished(ask, range(len(ids)), self.workers):
            progress.advance(repository.id)
            found[place] = repository
        # A renamed repository may stand in it under both its names.
        unique: dict[tuple[str, str | None], HubRepository] = {}
        for place in range(len(ids)):
            unique.setdefault((found[place].id, found[place].revision), found[place])
        return list(unique.values())

    def _ask(self, named: str) -> "HubRepository":
        from recycle_cli.store.hub_errors import Unreachable
        from recycle_cli.store.hub_repository import pinned, unread

        repo_id, _, revision = named.partition("@")
        try:
            return pinned(repo_id, revision) or self.hub.repository(repo_id, revision or None)
        except (InputError, Unreachable) as error:
            return unread(repo_id, revision, error)

    def evidence(self, found: "Found") -> "Evidence":
        """See `CrawlSource`."""
        from recycle_cli.store.hub_evidence import HubEvidence
        from recycle_cli.store.hub_repository import HubRepository

        assert isinstance(found, HubRepository)
        return HubEvidence(found, self.hub, self._adapters_folder, self._room, self._go_on)

    def stamp(self, found: "Found", rules_digest: str) -> str | None:
        """See `CrawlSource`. A commit never changes."""
        if found.revision is None:
            return None
        return _stamp({"revision": found.revision, "rules": rules_digest})

    def stop(self) -> None:
        """See `CrawlSource`."""
        self._stopping.set()

    def _go_on(self) -> None:
        if self._stopping.is_set():
            raise Stopped("the crawl has ended", "start it again: it goes on where it was")


def check_online(settings: Settings) -> None:
    """Checks that the Hub may be asked, and where it is.

    Raises:
        InputError: it may not, or the environment names no address or token that could be one.
    """
    if settings.offline:
        raise InputError(
            "crawl hub needs the network, and --offline or HF_HUB_OFFLINE forbids it",
            "leave them out, or crawl a folder",
        )
    check_hub_environment()


def check_folder(folder: Path) -> None:
    """Checks, before anything is loaded, that there is a folder to crawl.

    Raises:
        InputError: there is none.
    """
    if not expanded(folder).is_dir():
        problem = "is no folder" if expanded(folder).exists() else "does not exist"
        raise InputError(f"{folder} {problem}", "name a folder that holds adapter folders, or hub")


def _stamp(decisive: Mapping[str, object]) -> str:
    return json.dumps(decisive, sort_keys=True)
