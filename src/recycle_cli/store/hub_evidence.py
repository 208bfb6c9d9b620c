"""What is known about an adapter on the Hub: each reading asks for as little as it needs."""

from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from recycle_cli.lora.config import AdapterProblem
from recycle_cli.lora.folder import CONFIG_FILE, WEIGHTS_FILE
from recycle_cli.store.cache import is_whole
from recycle_cli.store.evidence import MAX_CONFIG_BYTES, Evidence, no_safetensors
from recycle_cli.store.folder import CARD_FILE, MAX_CARD_BYTES, Card
from recycle_cli.store.hub import Hub
from recycle_cli.store.hub_errors import NO_SUCH_FILE, Unreachable
from recycle_cli.store.hub_repository import HubRepository
from recycle_cli.store.once import cached_property
from recycle_cli.store.remote_weights import RemoteWeights
from recycle_cli.store.room import Room
from recycle_cli.store.safetensors_header import TensorInfo
from recycle_cli.store.unfinished import unfinished_folder

BASE_TAGS = ("base_model:adapter:", "base_model:")


class HubEvidence(Evidence):
    """The readings of a repository on the Hub, at one commit.

    Args:
        repository: what the Hub says of it.
        hub: where it is read from.
        adapters_folder: the adapter cache: what is there is not fetched, and what is fetched is
            written beside it.
        room: how much may be.
        going_on: called now and then while weights are fetched; what it raises ends that.
    """

    found: HubRepository

    def __init__(
        self,
        repository: HubRepository,
        hub: Hub,
        adapters_folder: Path,
        room: Room,
        going_on: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(repository)
        self._hub, self._room, self._going_on = hub, room, going_on
        self._adapters_folder = adapters_folder
        self._weights = RemoteWeights(hub, repository)
        self._fetched: Path | None = None
        self._holding = ExitStack()

    def check_access(self) -> None:
        """See `Evidence`."""
        if self.found.problem is not None:
            raise self.found.problem
        if not self.found.listed:
            self.found = self._hub.repository(self.found.id, self.found.sha)
        if self.found.disabled:
            raise AdapterProblem("disabled", f"the Hub has closed {self.found.id}")
        if self.found.gated and not self._hub.has_token:
            raise AdapterProblem("gated", f"{self.found.id} is gated, and there is no token")

    def config_bytes(self) -> bytes:
        """See `Evidence`."""
        if CONFIG_FILE not in self.found.files:
            raise _no_config()
        try:
            return self._hub.read(self.found, CONFIG_FILE, MAX_CONFIG_BYTES + 1)
        except AdapterProblem as problem:
            raise _no_config() if problem.code == NO_SUCH_FILE else problem from problem

    @property
    def card(self) -> Card:
        """See `Evidence`. From the tags, which the Hub makes of the card."""
        bases = dict.fromkeys(self.found.tagged(BASE_TAGS[0]))
        bases |= dict.fromkeys(b for b in self.found.tagged(BASE_TAGS[1]) if ":" not in b)
        return Card(", ".join(self.found.tagged("license:")) or None, tuple(bases))

    @cached_property
    def card_text(self) -> str:
        """See `Evidence`."""
        if CARD_FILE not in self.found.files:
            return ""
        try:
            data = self._hub.read(self.found, CARD_FILE, MAX_CARD_BYTES)
        except (AdapterProblem, Unreachable):
            return ""  # a card is a hint, not a condition
        return data.decode("utf-8", errors="replace")

    @cached_property
    def size_bytes(self) -> int:
        """See `Evidence`."""
        if WEIGHTS_FILE not in self.found.files:
            raise no_safetensors(n for n in self.found.files if n.startswith("adapter_model"))
        try:
            return self._weights.size_bytes
        except AdapterProblem as problem:
            raise no_safetensors(()) if problem.code == NO_SUCH_FILE else problem from problem

    @cached_property
    def header(self) -> dict[str, TensorInfo]:
        """See `Evidence`."""
        return self._weights.header

    @cached_property
    def sha256(self) -> str:
        """See `Evidence`. As the Hub announces it, which the download is held against; where it
        announces none, that of the whole file."""
        return self._weights.announced_sha256 or self._download[1]

    @property
    def weights_path(self) -> Path:
        """See `Evidence`. Fetches the file, unless it is in the cache already."""
        announced = self._weights.announced_sha256
        if announced is not None and self._fetched is None:
            kept = self._adapters_folder / announced
            if is_whole(kept, self.size_bytes):
                return kept / WEIGHTS_FILE
        return self._download[0]

    @property
    def weights_are_ours(self) -> bool:
        """See `Evidence`."""
        return self._fetched is not None

    @cached_property
    def _download(self) -> tuple[Path, str]:
        """The file, and its sha256."""
        self._room.take(self.size_bytes)
        self._adapters_folder.mkdir(parents=True, exist_ok=True)
        self._fetched = self._holding.enter_context(unfinished_folder(self._adapters_folder))
        file = self._fetched / WEIGHTS_FILE
        digest = self._weights.download(file, self._going_on)
        self.bytes_read += self.size_bytes
        return file, digest

    def discard(self) -> None:
        """See `Evidence`. Gives the room back, unless the file has moved into the cache."""
        if self._fetched is None:
            return
        if any(self._fetched.iterdir()):
            with suppress(AdapterProblem):
                self._room.give_back(self.size_bytes)
        self._holding.close()
        self._fetched = None


def _no_config() -> AdapterProblem:
    return AdapterProblem("no_config", f"there is no {CONFIG_FILE} at its root")
