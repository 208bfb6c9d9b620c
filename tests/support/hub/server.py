"""The stand-in Hub as a server: two origins on the loopback interface, a log of requests."""

import contextlib
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

from support.hub.faults import Fault
from support.hub.messages import Answer, Origin, Request, error
from support.hub.quotas import Quota, RateLimits
from support.hub.repository import Repository
from support.hub.routes import answer_hub, answer_storage
from support.hub.shelves import Shelves

HOST = "127.0.0.1"
LONGEST_S = 25.0
"""How long an answer waits for its event: less than the client does for an answer."""


class Hub:
    """A Hub that runs while it is entered: `with Hub(repositories) as hub: ...`.

    Everything about it may be changed while it runs.

    Args:
        repositories: in the order in which they are listed.
        page_size: the most entries on a page of a listing.
        tokens: token -> ids of the gated and private repositories that it opens. Other tokens
            are refused as invalid.
        faults: what goes wrong; all that match a request happen to it, in this order.
        quotas: rate limits for `api` (listing, info, tree) and `resolvers`.
    """

    def __init__(
        self,
        repositories: Iterable[Repository] = (),
        *,
        page_size: int = 100,
        tokens: Mapping[str, Collection[str]] | None = None,
        faults: Iterable[Fault] = (),
        quotas: Mapping[str, Quota] | None = None,
    ) -> None:
        self.shelves = Shelves(tokens=tokens or {}, page_size=page_size)
        self.faults = list(faults)
        self.requests: list[Request] = []
        self.ending = threading.Event()
        self._limits = RateLimits(quotas or {})
        self._lock = threading.Lock()
        self.problems: list[Exception] = []
        self._servers: list[_Server] = []
        for repository in repositories:
            self.add(repository)

    def __enter__(self) -> "Hub":
        self._servers = [_Server(self, "hub"), _Server(self, "storage")]
        self.shelves.hub_url, self.shelves.storage_url = (one.url for one in self._servers)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        if self.problems and problem is None:
            raise self.problems[0]

    def stop(self) -> None:
        """Ends both origins and every open connection, without waiting for clients."""
        self.ending.set()
        for server in self._servers:
            server.end()
        self._servers.clear()

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT` has to be."""
        return self.shelves.hub_url

    @property
    def storage_url(self) -> str:
        """The origin that large files come from."""
        return self.shelves.storage_url

    @property
    def environment(self) -> dict[str, str]:
        """The environment for a process that shall use this Hub, with no token of its own."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": "",
            "NO_PROXY": HOST,
            "no_proxy": HOST,
        }

    @property
    def counts(self) -> Counter[str]:
        """How many requests of each kind: listing, info, tree, resolve, storage, other."""
        return Counter(request.kind for request in list(self.requests))

    def reset_log(self) -> None:
        """Forgets the requests so far."""
        self.requests = []

    def add(self, repository: Repository) -> None:
        """Puts a repository on the Hub, in the place of the one with its id if there is one."""
        self.shelves.repositories[repository.id] = repository

    def remove(self, repo_id: str) -> None:
        """Takes a repository away."""
        del self.shelves.repositories[repo_id]

    def rename(self, old: str, new: str) -> None:
        """Gives a repository another id; the old one leads to it."""
        repository = self.shelves.repositories.pop(old)
        repository.id = new
        self.add(repository)
        self.shelves.renamed[old] = new

    def set_quotas(
        self, quotas: Mapping[str, Quota], now: Callable[[], float] = time.monotonic
    ) -> None:
        """Begins new rate limits, by this clock."""
        self._limits = RateLimits(quotas, now)

    def respond(self, request: Request) -> Answer:
        """Answers and logs a request."""
        with self._lock:
            try:
                answer = self._answer(request)
            except Exception as problem:
                # Kept for the test that entered: a client would take it for a fault and retry.
                self.problems.append(problem)
                answer = error(500, f"the stand-in itself failed: {problem!r}")
            request.status = 0 if answer.never else answer.status
            self.requests.append(request)
        return answer

    def _answer(self, request: Request) -> Answer:
        if request.origin == "hub":
            answer = self._limits.apply(request, answer_hub(request, self.shelves))
        else:
            answer = answer_storage(request, self.shelves)
        for fault in self.faults:
            if fault.strikes(request):
                answer = fault.action(answer)
        return answer


class _Server(ThreadingHTTPServer):
    """One origin, on a port of its own."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: Hub, origin: Origin) -> None:
        super().__init__((HOST, 0), partial(_Handler, hub, origin))
        self._hub = hub
        self.url = f"http://{HOST}:{self.server_address[1]}"
        self._open: set[socket.socket] = set()
        self._loop = threading.Thread(target=partial(self.serve_forever, 0.01), daemon=True)
        self._loop.start()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def close_request(self, request: Any) -> None:
        self._open.discard(request)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no matter; what else there is must be heard of."""
        problem = sys.exception()
        if isinstance(problem, Exception) and not isinstance(problem, OSError):
            self._hub.problems.append(problem)

    def end(self) -> None:
        self.shutdown()
        self._loop.join()
        self.server_close()
        # Clients keep connections open, which would go on being served.
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def __init__(self, hub: Hub, origin: Origin, *args: Any) -> None:
        self._hub = hub
        self._origin: Origin = origin
        super().__init__(*args)

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self._origin, self.command, self.path, headers)
        answer = self._hub.respond(request)
        if answer.never:
            self._hub.ending.wait()
            self.close_connection = True
            return
        if answer.until is not None:
            answer.until.wait(LONGEST_S)
        self._hub.ending.wait(answer.delay_s)
        self._write(answer)

    do_HEAD = do_GET

    def _write(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            body = answer.body[: answer.sent]
            size = answer.piece or max(1, len(body))
            for start in range(0, len(body), size):
                self.wfile.write(body[start : start + size])
                self.wfile.flush()
                self._hub.ending.wait(answer.pause_s)
            self.close_connection |= answer.sent is not None

    def log_message(self, format: str, *args: Any) -> None:
        """The log is the Hub's."""
