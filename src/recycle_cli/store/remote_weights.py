"""A weights file on the Hub: its header first, by a range request; the rest when asked for."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub.errors import HfHubHTTPError

from recycle_cli.errors import RecycleError
from recycle_cli.lora.config import AdapterProblem
from recycle_cli.lora.folder import WEIGHTS_FILE
from recycle_cli.store.hub import Hub
from recycle_cli.store.hub_errors import Broken, Unreachable, again_where_broken, explained
from recycle_cli.store.hub_repository import HubRepository
from recycle_cli.store.once import cached_property
from recycle_cli.store.safetensors_header import (
    LENGTH_BYTES,
    TensorInfo,
    header_length,
    parse_header,
)

FIRST_BYTES = 128 * 1024
"""What is asked for at first: the headers of most adapters are shorter."""
RESUMES = 5
PARTIAL, RANGE_REFUSED = 206, 416
CONTENT_RANGE = re.compile(r"bytes (?:\d+-\d+|\*)/(\d+)")
SHA256 = re.compile(r"[0-9a-f]{64}")


class Tampered(Unreachable):
    """What came is not what the Hub announced."""

    code = "checksum"


@dataclass(frozen=True)
class _First:
    """The first answer: the file's first bytes, its size, its announced sha256 or None, and where
    the Hub's redirect led."""

    body: bytes
    size: int
    sha256: str | None
    url: str


class RemoteWeights:
    """The weights file of a repository, read in pieces.

    Readings raise AdapterProblem where it may not be read or says something that cannot be used,
    Unreachable where the Hub or its storage do not answer, Tampered where they contradict
    themselves.

    Args:
        hub: where from.
        repository: whose.
    """

    def __init__(self, hub: Hub, repository: HubRepository) -> None:
        self._hub, self._repository = hub, repository

    @property
    def size_bytes(self) -> int:
        """The size of the file."""
        return self._first.size

    @property
    def announced_sha256(self) -> str | None:
        """The sha256 that the Hub has for it, in hex; None where it tells none."""
        return self._first.sha256

    @cached_property
    def header(self) -> dict[str, TensorInfo]:
        """The tensors as the header describes them."""
        first = self._first
        length = header_length(first.body[:LENGTH_BYTES])
        end = LENGTH_BYTES + length
        if end > first.size:
            raise AdapterProblem(
                "truncated",
                f"the header should be {length} bytes, the file ends after "
                f"{first.size - LENGTH_BYTES}",
            )
        start = first.body
        if len(start) < end:
            start += self._range(len(start), end)
        return parse_header(start[LENGTH_BYTES:end], first.size - end)

    def download(self, file: Path, going_on: Callable[[], None] = lambda: None) -> str:
        """Writes the whole file, and no byte more than its size; gives its sha256 in hex.

        Args:
            file: to write.
            going_on: called now and then; what it raises ends the download.
        """
        first, digest = self._first, hashlib.sha256()
        with explained(self._repository.id), file.open("wb") as writer:

            def take(chunk: bytes) -> None:
                going_on()
                digest.update(chunk)
                try:
                    writer.write(chunk)
                except OSError as error:
                    raise RecycleError(
                        f"{file} cannot be written: {error}",
                        "free some space, or limit the adapter cache with --max-cache",
                    ) from error

            # Of its full size at once, so that others who share the cache see what it will take.
            writer.truncate(first.size)
            take(first.body)
            failures = 0
            while (before := writer.tell()) < first.size:
                try:
                    for chunk in self._chunks(before, first.size):
                        take(chunk)
                except Broken:
                    failures = 0 if writer.tell() > before else failures + 1
                    if failures > RESUMES:
                        raise
        if first.sha256 is not None and digest.hexdigest() != first.sha256:
            raise Tampered(
                f"the bytes of {self._repository.id} have sha256 {digest.hexdigest()}, the Hub "
                f"announced {first.sha256}"
            )
        return digest.hexdigest()

    @cached_property
    def _first(self) -> _First:
        url = self._hub.url_of(self._repository, WEIGHTS_FILE)

        def read() -> _First:
            wanted = {"Range": f"bytes=0-{FIRST_BYTES - 1}"}
            with self._hub.open(url, wanted) as response:
                size = _size(response)
                body = self._hub.start_of(response, min(FIRST_BYTES, size))
                return _First(body, size, _announced(response), str(response.url))

        with explained(self._repository.id):
            try:
                return again_where_broken(read)
            except HfHubHTTPError as error:
                # An empty file has no first byte to ask for.
                if error.response.status_code != RANGE_REFUSED:
                    raise
                return _First(b"", 0, None, url)

    def _range(self, start: int, end: int) -> bytes:
        with explained(self._repository.id):
            return again_where_broken(lambda: b"".join(self._chunks(start, end)))

    def _chunks(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end` as they come.

        Raises:
            Broken: they ended before.
        """
        left = end - start
        with self._opened({"Range": f"bytes={start}-{end - 1}"}) as response:
            # Some proxies ignore ranges and send the file from its beginning.
            skip = 0 if response.status_code == PARTIAL else start
            for chunk in response.iter_bytes():
                part = chunk[skip:][:left]
                skip = max(0, skip - len(chunk))
                left -= len(part)
                self._hub.note_bytes(len(part))
                yield part
                if left == 0:
                    return
        raise Broken(f"{self._repository.id} ends before its size")

    @contextlib.contextmanager
    def _opened(self, wanted: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """An answer from where the Hub led at first, which its rate limit does not count; from the
        Hub again where that address is no longer good."""
        with contextlib.ExitStack() as stack:
            try:
                response = stack.enter_context(self._hub.open(self._first.url, wanted))
            except HfHubHTTPError:
                url = self._hub.url_of(self._repository, WEIGHTS_FILE)
                response = stack.enter_context(self._hub.open(url, wanted))
            yield response


def _size(response: httpx2.Response) -> int:
    """The size of the whole file.

    Raises:
        Tampered: the Hub and its storage do not say the same, or neither says it.
    """
    headers = response.headers
    whole = CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
    sizes = {whole[1] if whole else headers.get("content-length")}
    sizes |= {one.headers.get("x-linked-size") for one in (*response.history, response)}
    known = {int(size) for size in sizes if size is not None and size.isascii() and size.isdigit()}
    if len(known) != 1:
        raise Tampered(f"{response.url} is said to have {sorted(known) or 'no'} bytes")
    return known.pop()


def _announced(response: httpx2.Response) -> str | None:
    for one in (*response.history, response):
        digest = one.headers.get("x-linked-etag", "").removeprefix("W/").strip('"')
        if SHA256.fullmatch(digest):
            return str(digest)
    return None
