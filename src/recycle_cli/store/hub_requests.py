"""Requests to the Hub: with timeouts, counted, repeated where it says so, and not for ever."""

import contextlib
import platform
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # they are exported lazily
    get_session,
    hf_raise_for_status,
    http_stream_backoff,
    parse_ratelimit_headers,
)

from recycle_cli import __version__
from recycle_cli.store.hub_errors import (
    AskedToWait,
    Broken,
    TooSlow,
    Unreachable,
    again_where_broken,
)

RETRIES = 5
WATCH = "recycle_watch"
"""Under which a request carries who watches it."""
MAX_ANSWER_BYTES = 64_000_000
MAX_ERROR_BYTES = 100_000
POLICY = re.compile(r'"(?P<bucket>\w+)";q=(?P<quota>\d+);w=(?P<window>\d+)')


@dataclass(frozen=True)
class Patience:
    """How long the Hub and its storage are waited for.

    Args:
        connect_s: for a connection.
        answer_s: for the next bytes.
        least_rate: bytes a second that a body has to come with.
        rate_over_s: the seconds over which that is the mean.
        longest_wait_s: how long one request may be put off, all its repetitions together, where
            the server says when it may be asked again.
    """

    connect_s: float = 10.0
    answer_s: float = 30.0
    least_rate: float = 1024.0
    rate_over_s: float = 60.0
    longest_wait_s: float = 600.0

    @property
    def timeout(self) -> httpx2.Timeout:
        """The same for the client, which also waits for a connection that another thread has."""
        return httpx2.Timeout(self.answer_s, connect=self.connect_s, pool=2 * self.answer_s)


PATIENCE = Patience()


@dataclass
class Traffic:
    """What has gone over the wire: requests to the Hub itself, which its rate limit counts, those
    of them that were for no file, those to the storage that it redirects to, and bytes of bodies
    read."""

    requests: int = 0
    api_requests: int = 0
    storage_requests: int = 0
    bytes: int = 0


class Requests:
    """Requests to one Hub and to the storage that it redirects to. Safe to use from several
    threads.

    Args:
        endpoint: the address of the Hub.
        patience: how long it is waited for; None for PATIENCE.
    """

    def __init__(self, endpoint: str, patience: Patience | None = None) -> None:
        self.endpoint = endpoint
        self.patience = patience or PATIENCE
        self.traffic = Traffic()
        self.quotas: dict[str, tuple[int, int]] = {}
        self._headers = _own_headers()
        self._lock = threading.Lock()

    @property
    def has_token(self) -> bool:
        """Whether there is a token that the client sends."""
        return "authorization" in self._headers

    def is_at_hub(self, url: str) -> bool:
        """Whether an address is the Hub's own, where the token goes.

        Raises:
            ValueError: it is no address.
        """
        return origin_of(url) == origin_of(self.endpoint)

    @contextlib.contextmanager
    def open(
        self, url: str, headers: Mapping[str, str] | None = None, params: Any = None
    ) -> Iterator[httpx2.Response]:
        """The open response to a GET; the token goes along to the Hub itself alone.

        Raises:
            Broken: from within the block, where the body broke off.
            TooSlow: likewise, where it comes too slowly.
            AskedToWait: the server wants to be asked later than anybody waits.
            httpx2.HTTPError, OSError: there is none; `explained` says which means what.
        """
        # Compressed bodies have no offsets, and may grow without bounds.
        sent = {**self._headers, **(headers or {}), "Accept-Encoding": "identity"}
        if not self.is_at_hub(url):
            sent.pop("authorization", None)
        with contextlib.ExitStack() as stack:
            with _whole_session(url):
                _have_requests_watched()
                response = stack.enter_context(
                    http_stream_backoff(
                        "GET",
                        url,
                        params=params,
                        headers=sent,
                        timeout=self.patience.timeout,
                        max_retries=RETRIES,
                        extensions={WATCH: _Watch(self)},
                    )
                )
            self._note_quota(response)
            response.stream = _Paced(response.stream, url, self.patience)
            hf_raise_for_status(_short(response) if response.status_code >= 400 else response)
            try:
                yield response
            except (httpx2.HTTPError, httpx2.StreamError) as error:
                # Left as it is, it would make the client send the request again from within.
                reason = str(error) or type(error).__name__
                raise Broken(f"{url} broke off: {reason}") from error

    def whole(self, url: str, query: Sequence[tuple[str, str]]) -> tuple[bytes, httpx2.Response]:
        """A whole answer that is not large, and the response that it came with.

        Raises:
            Unreachable: it is larger than 64 MB.
            httpx2.HTTPError, OSError: see `open`.
        """

        def read() -> tuple[bytes, httpx2.Response]:
            with self.open(url, params=list(query) or None) as response:
                return self.start_of(response, MAX_ANSWER_BYTES + 1), response

        body, response = again_where_broken(read)
        if len(body) > MAX_ANSWER_BYTES:
            raise Unreachable(f"{url} answers with more than {MAX_ANSWER_BYTES} bytes")
        return body, response

    def start_of(self, response: httpx2.Response, limit: int) -> bytes:
        """The first bytes of a body, at most `limit`."""
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) >= limit:
                break
        self.note_bytes(len(body))
        return bytes(body[:limit])

    def note_bytes(self, count: int) -> None:
        """Counts bytes that were read."""
        with self._lock:
            self.traffic.bytes += count

    def count(self, request: httpx2.Request) -> None:
        """Counts a request that is about to be sent."""
        with self._lock:
            if self.is_at_hub(str(request.url)):
                self.traffic.requests += 1
                self.traffic.api_requests += str(request.url).startswith(f"{self.endpoint}/api/")
            else:
                self.traffic.storage_requests += 1

    def _note_quota(self, response: httpx2.Response) -> None:
        """Remembers what the Hub says of its limits: requests in a window of seconds, by bucket."""
        for one in (*response.history, response):
            for match in POLICY.finditer(one.headers.get("ratelimit-policy", "")):
                self.quotas[match["bucket"]] = int(match["quota"]), int(match["window"])


class _Watch:
    """What happens to one request, its repetitions and redirects included."""

    def __init__(self, requests: Requests) -> None:
        self._requests, self._waited_s = requests, 0.0

    def sent(self, request: httpx2.Request) -> None:
        self._requests.count(request)

    def answered(self, response: httpx2.Response) -> None:
        """Sees how long the client is about to wait.

        Raises:
            AskedToWait: that is too long.
        """
        wait_s, longest_s = _asked_wait(response), self._requests.patience.longest_wait_s
        self._waited_s += wait_s
        if wait_s and self._waited_s > longest_s:
            raise AskedToWait(
                f"{origin_name(str(response.url))} asks to wait {wait_s:.0f} s, "
                f"and a request waits {longest_s:.0f} s in all"
            )


class _Paced(httpx2.SyncByteStream):
    """A body that has to come with the least rate. What its reader does meanwhile does not count.

    Raises:
        TooSlow: from its iterator, when it does not.
    """

    def __init__(self, stream: Any, url: str, patience: Patience) -> None:
        self._stream, self._url, self._patience = stream, url, patience

    def __iter__(self) -> Iterator[bytes]:
        patience, waited_s, came = self._patience, 0.0, 0
        before = time.monotonic()
        for chunk in self._stream:
            waited_s += time.monotonic() - before
            came += len(chunk)
            if waited_s >= patience.rate_over_s:
                if came < patience.least_rate * waited_s:
                    raise TooSlow(
                        f"{self._url} comes with {came / waited_s:.0f} bytes a second, fewer than "
                        f"{patience.least_rate:.0f}"
                    )
                waited_s, came = 0.0, 0
            yield chunk
            before = time.monotonic()

    def close(self) -> None:
        self._stream.close()


def origin_of(url: str) -> tuple[str, str]:
    """The scheme and the host, with the port, of an address."""
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def origin_name(url: str) -> str:
    """The same as it is written."""
    return "://".join(origin_of(url))


def _own_headers() -> dict[str, str]:
    """The token, if there is one, and who asks. Those that the client makes take a request of their
    own, once a day, which asks the Hub what programs it might be run by."""
    versions = {
        "recycle-cli": __version__,
        "hf_hub": huggingface_hub.__version__,
        "python": platform.python_version(),
    }
    headers = {"user-agent": "; ".join(f"{name}/{one}" for name, one in versions.items())}
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else huggingface_hub.get_token()
    return headers | ({"authorization": f"Bearer {token}"} if token else {})


def _asked_wait(response: httpx2.Response) -> float:
    """The seconds that a server asks to wait, as the client reads its headers; 0 where it asks for
    nothing."""
    if response.status_code < 400:
        return 0.0
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = response.headers.get("retry-after", "")
    return float(after) if after.isascii() and after.isdigit() else 0.0


@contextlib.contextmanager
def _whole_session(url: str) -> Iterator[None]:
    """A thread that cannot connect closes the session that all threads share, and who is about to
    use it gets errors that no client should raise.

    Raises:
        Broken: that happened.
    """
    try:
        yield
    except (AttributeError, RuntimeError) as error:
        raise Broken(f"{url} broke off: {error}") from error


def _short(response: httpx2.Response) -> httpx2.Response:
    """An error answer with the start of its body, which the client reads before it raises."""
    body = b""
    for chunk in response.iter_raw():
        body += chunk[:MAX_ERROR_BYTES]
        if len(body) >= MAX_ERROR_BYTES:
            break
    headers = {
        name: value
        for name, value in response.headers.items()
        if name.lower() not in ("content-encoding", "content-length", "transfer-encoding")
    }
    return httpx2.Response(
        response.status_code, headers=headers, content=body, request=response.request
    )


def _have_requests_watched() -> None:
    """Has the client tell of every request, redirects and repetitions included."""
    session = get_session()
    hooks = session.event_hooks
    if _tell_of_request not in hooks["request"]:
        session.event_hooks = {
            "request": [*hooks["request"], _tell_of_request],
            "response": [*hooks["response"], _tell_of_response],
        }


def _tell_of_request(request: httpx2.Request) -> None:
    if (watch := request.extensions.get(WATCH)) is not None:
        watch.sent(request)


def _tell_of_response(response: httpx2.Response) -> None:
    if (watch := response.request.extensions.get(WATCH)) is not None:
        watch.answered(response)
