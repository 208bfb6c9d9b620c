"""The Hugging Face Hub, through its own client library: what is listed, and what files hold.

Every request has timeouts; those that meet a rate limit or a failing server are sent again when
the Hub says so, which is `huggingface_hub`'s own doing. Links are followed within the Hub's origin
alone, so that a token goes nowhere else; where a file's redirect leads to a storage elsewhere, the
client leaves the token behind.
"""

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import httpx2
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # they are exported lazily
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    http_stream_backoff,
    validate_repo_id,
)

from recycle_cli import __version__
from recycle_cli.errors import RecycleError
from recycle_cli.lora.config import AdapterProblem
from recycle_cli.store.text import clean_text

Read = TypeVar("Read")
ATTEMPTS = 3
RETRIES = 5
TIMEOUT = httpx2.Timeout(connect=10, read=30, write=30, pool=60)
FIELDS = (
    "author",
    "sha",
    "lastModified",
    "createdAt",
    "gated",
    "disabled",
    "downloads",
    "likes",
    "tags",
    "siblings",
)
NO_SUCH_FILE = "no_such_file"
COUNTER = "recycle_counter"
"""Under which a request carries who counts it."""
PAGE_SIZE = 1000
MAX_PAGE_BYTES = 64_000_000
MAX_PAGES = 1000
MAX_ERROR_BYTES = 100_000
MAX_TAGS = 100
MAX_FILES = 20
SHA = re.compile(r"[0-9a-f]{40}")
LISTED = ("adapter_config.json", "README.md")
WEIGHTS_NAME = re.compile(r"adapter_model[^/]*")
POLICY = re.compile(r'"(?P<bucket>\w+)";q=(?P<quota>\d+);w=(?P<window>\d+)')


class Unreachable(OSError):
    """The Hub did not answer as it should; another time it may."""

    code = "unreachable"


class Broken(Unreachable):
    """A body ended before its time, or its connection did."""


@dataclass(frozen=True)
class HubRepository:
    """What the Hub says of a model repository at one commit.

    Args:
        id: `owner/name`.
        sha: the commit, 40 hex digits.
        files: those of its files at the root that matter here.
        tags: at most 100.
        gated: readable by those alone whom its owner lets in.
        disabled: closed by the Hub.
        author, downloads, likes, created_at, last_modified: as the Hub says; times in ISO 8601.
        listed: whether all this is known; else only the id and the commit are.
        problem: why nothing is known of it, where that is so.
    """

    id: str
    sha: str
    files: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    gated: bool = False
    disabled: bool = False
    author: str | None = None
    downloads: int | None = None
    likes: int | None = None
    created_at: str | None = None
    last_modified: str | None = None
    listed: bool = True
    problem: Exception | None = None

    @property
    def source(self) -> Literal["hub", "folder"]:
        """The kind of place."""
        return "hub"

    @property
    def origin(self) -> str:
        """The place."""
        return self.id

    @property
    def revision(self) -> str | None:
        """The commit; None where it could not be asked for."""
        return self.sha or None

    @property
    def newer(self) -> str | None:
        """The Hub is asked for one commit alone."""
        return None

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the Hub says of it: fields of AdapterDocument."""
        return {
            "author": self.author,
            "downloads": self.downloads,
            "likes": self.likes,
            "created_at": self.created_at,
            "last_modified": self.last_modified,
            "tags": list(self.tags),
        }

    def tagged(self, prefix: str) -> tuple[str, ...]:
        """What follows a prefix in its tags, as in `license:`."""
        return tuple(tag.removeprefix(prefix) for tag in self.tags if tag.startswith(prefix))


def pinned(repo_id: str, revision: str) -> HubRepository | None:
    """A repository at a commit, of which nothing was asked yet; None where `revision` is none."""
    return HubRepository(repo_id, revision, listed=False) if SHA.fullmatch(revision) else None


def unread(repo_id: str, revision: str, problem: Exception) -> HubRepository:
    """A repository that could not be asked for, and why."""
    name = clean_text(repo_id)
    return HubRepository(name, revision if SHA.fullmatch(revision) else "", problem=problem)


@dataclass
class Traffic:
    """What has gone over the wire: requests to the Hub itself, which its rate limit counts, those
    to the storage that it redirects to, and bytes of bodies read."""

    requests: int = 0
    storage_requests: int = 0
    bytes: int = 0


class Hub:
    """The Hub, or a mirror of it. Safe to use from several threads.

    Args:
        endpoint: its address; None for `HF_ENDPOINT`, or the Hub's own.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.traffic = Traffic()
        self.quotas: dict[str, tuple[int, int]] = {}
        self._headers = build_hf_headers(library_name="recycle-cli", library_version=__version__)
        self._lock = threading.Lock()

    @property
    def has_token(self) -> bool:
        """Whether there is a token that the client sends."""
        return "authorization" in {name.lower() for name in self._headers}

    def adapters_of(
        self, base_models: Sequence[str], author: str | None = None, limit: int | None = None
    ) -> list[HubRepository]:
        """The repositories that say they are PEFT adapters of these base models, each once, the
        most downloaded first.

        Args:
            base_models: Hub ids.
            author: of this owner alone.
            limit: at most this many.

        Raises:
            RecycleError: the Hub cannot be asked.
        """
        found: dict[str, HubRepository] = {}
        for name in base_models:
            for repository in self._listing(name, author, limit):
                found.setdefault(repository.id, repository)
        ordered = sorted(found.values(), key=lambda one: (-(one.downloads or 0), one.id))
        return ordered[:limit]

    def repository(self, repo_id: str, revision: str | None = None) -> HubRepository:
        """One repository, at a branch, a tag or a commit; on its main branch by default.

        Raises:
            AdapterProblem: `not_found` or `disabled`.
            Unreachable: the Hub cannot be asked.
        """
        with explained(repo_id):
            validate_repo_id(repo_id)
        at = f"/revision/{quote(revision, safe='')}" if revision else ""
        url = f"{self.endpoint}/api/models/{repo_id}{at}"
        with explained(repo_id):
            body, _ = self._whole(url, [("expand", field) for field in FIELDS])
        repository = _parse(_json(body, repo_id))
        if repository is None:
            raise Unreachable(f"the Hub's answer about {repo_id} names no commit")
        return repository

    def read(self, repository: HubRepository, path: str, limit: int) -> bytes:
        """The start of a file, at most `limit` bytes.

        Raises:
            AdapterProblem: it may not be read, or is not there.
            Unreachable: the Hub cannot be asked.
        """

        def read() -> bytes:
            with self.open(self.url_of(repository, path)) as response:
                return self.start_of(response, limit)

        with explained(repository.id):
            return again_where_broken(read)

    def url_of(self, repository: HubRepository, path: str) -> str:
        """Where a file is, at the repository's commit."""
        return hf_hub_url(repository.id, path, revision=repository.sha, endpoint=self.endpoint)

    @contextlib.contextmanager
    def open(
        self, url: str, headers: Mapping[str, str] | None = None, params: Any = None
    ) -> Iterator[httpx2.Response]:
        """The open response to a GET; the token goes along to the Hub itself alone.

        Raises:
            Broken: from within the block, where the body broke off.
            httpx2.HTTPError, OSError: there is none; `explained` says which means what.
        """
        # Compressed bodies have no offsets, and may grow without bounds.
        sent = {**self._headers, **(headers or {}), "Accept-Encoding": "identity"}
        if _origin(url) != _origin(self.endpoint):
            sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
        with contextlib.ExitStack() as stack:
            with _whole_session(url):
                _have_requests_counted()
                response = stack.enter_context(
                    http_stream_backoff(
                        "GET",
                        url,
                        params=params,
                        headers=sent,
                        timeout=TIMEOUT,
                        max_retries=RETRIES,
                        extensions={COUNTER: self._count},
                    )
                )
            self._note_quota(response)
            hf_raise_for_status(_short(response) if response.status_code >= 400 else response)
            try:
                yield response
            except (httpx2.HTTPError, httpx2.StreamError) as error:
                # Left as it is, it would make the client send the request again from within.
                reason = str(error) or type(error).__name__
                raise Broken(f"{url} broke off: {reason}") from error

    def _listing(
        self, base_model: str, author: str | None, limit: int | None
    ) -> Iterator[HubRepository]:
        page_size = PAGE_SIZE if limit is None else min(limit, PAGE_SIZE)
        query = [("filter", f"base_model:adapter:{base_model}"), ("filter", "peft")]
        query += [("sort", "downloads"), ("limit", str(page_size))]
        query += [("author", author)] if author else []
        query += [("expand", field) for field in FIELDS]
        url: str | None = f"{self.endpoint}/api/models"
        given, seen = 0, set[str]()
        while url is not None and (limit is None or given < limit):
            if url in seen:
                raise RecycleError(
                    f"the listing of {base_model} goes in a circle, back to {clean_text(url)}",
                    "check HF_ENDPOINT",
                )
            seen.add(url)
            if len(seen) > MAX_PAGES:
                raise RecycleError(
                    f"the listing of {base_model} has more than {MAX_PAGES} pages",
                    "look at less of it: --limit, --author or --ids-from",
                )
            try:
                with explained(base_model):
                    body, response = self._whole(url, query)
                page = _json(body, base_model)
            except (AdapterProblem, OSError) as error:
                raise RecycleError(
                    f"the adapters of {base_model} cannot be listed: {clean_text(str(error))}",
                    "check the network, HF_ENDPOINT and HF_TOKEN",
                ) from error
            if not isinstance(page, list):
                raise RecycleError(f"{url} answers with no list", "check HF_ENDPOINT")
            for item in page:
                repository = _parse(item)
                if repository is not None:
                    given += 1
                    yield repository
            url, query = self._next(response), []

    def _next(self, response: httpx2.Response) -> str | None:
        link = response.links.get("next", {}).get("url")
        if link is None:
            return None
        try:
            url = urljoin(str(response.url), link)
            elsewhere = _origin(url) != _origin(self.endpoint)
        except ValueError as error:
            raise RecycleError(
                f"the listing goes on at {clean_text(link)}, which is no address",
                "check HF_ENDPOINT",
            ) from error
        if elsewhere:
            raise RecycleError(
                f"the listing goes on at {'://'.join(_origin(url))}, not at {self.endpoint}",
                "a token goes to one address only: set HF_ENDPOINT to where the listing leads",
            )
        return url

    def _whole(self, url: str, query: Sequence[tuple[str, str]]) -> tuple[bytes, httpx2.Response]:
        def read() -> tuple[bytes, httpx2.Response]:
            with self.open(url, params=list(query) or None) as response:
                return self.start_of(response, MAX_PAGE_BYTES + 1), response

        body, response = again_where_broken(read)
        if len(body) > MAX_PAGE_BYTES:
            raise Unreachable(f"{url} answers with more than {MAX_PAGE_BYTES} bytes")
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

    def _count(self, request: httpx2.Request) -> None:
        with self._lock:
            if _origin(str(request.url)) == _origin(self.endpoint):
                self.traffic.requests += 1
            else:
                self.traffic.storage_requests += 1

    def _note_quota(self, response: httpx2.Response) -> None:
        """Remembers what the Hub says of its limits: requests in a window of seconds, by bucket."""
        for one in (*response.history, response):
            for match in POLICY.finditer(one.headers.get("ratelimit-policy", "")):
                self.quotas[match["bucket"]] = int(match["quota"]), int(match["window"])


@contextlib.contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turns the client's errors into what they mean for an adapter.

    Raises:
        AdapterProblem: `gated`, `disabled`, `not_found` or `no_such_file`.
        Unreachable: anything else.
    """
    try:
        yield
    except GatedRepoError as error:
        raise AdapterProblem("gated", f"{repo_id} is gated, and it does not let you in") from error
    except DisabledRepoError as error:
        raise AdapterProblem("disabled", f"the Hub has closed {repo_id}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise AdapterProblem("not_found", f"the Hub has no {repo_id} that you may see") from error
    except EntryNotFoundError as error:
        raise AdapterProblem(NO_SUCH_FILE, f"{repo_id} has no such file") from error
    except Unreachable:
        raise
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unreachable(f"{repo_id} cannot be read from the Hub: {reason}") from error


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


def _have_requests_counted() -> None:
    """Has the client tell of every request, redirects and repetitions included."""
    session = get_session()
    hooks = session.event_hooks
    if _tell_counter not in hooks["request"]:
        session.event_hooks = {**hooks, "request": [*hooks["request"], _tell_counter]}


def _tell_counter(request: httpx2.Request) -> None:
    if (counter := request.extensions.get(COUNTER)) is not None:
        counter(request)


def again_where_broken(read: Callable[[], Read]) -> Read:
    """Reads a short body, from the start again where it broke off."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(Broken):
            return read()
    return read()


def _json(body: bytes, what: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Unreachable(f"the Hub's answer about {what} is not JSON") from error


def _parse(item: Any) -> HubRepository | None:
    """A repository as a listing has it; None for an entry that cannot be one."""
    if not isinstance(item, dict):
        return None
    repo_id, sha = item.get("id"), item.get("sha")
    if not isinstance(repo_id, str) or not isinstance(sha, str) or not SHA.fullmatch(sha):
        return None
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return None
    return HubRepository(
        id=repo_id,
        sha=sha,
        files=_files(item.get("siblings")),
        tags=tuple(clean_text(tag) for tag in _strings(item.get("tags"))[:MAX_TAGS]),
        gated=item.get("gated") not in (None, False),
        disabled=item.get("disabled") is True,
        author=_text(item.get("author")),
        downloads=_count_of(item.get("downloads")),
        likes=_count_of(item.get("likes")),
        created_at=_text(item.get("createdAt")),
        last_modified=_text(item.get("lastModified")),
    )


def _files(siblings: Any) -> tuple[str, ...]:
    """The names at the root that matter; others, wherever they would lead, are never used."""
    entries = siblings if isinstance(siblings, list) else []
    names = _strings([entry.get("rfilename") for entry in entries if isinstance(entry, dict)])
    kept = [name for name in names if name in LISTED or WEIGHTS_NAME.fullmatch(name)]
    return tuple(kept[:MAX_FILES])


def _strings(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _text(value: Any) -> str | None:
    return clean_text(value) if isinstance(value, str) else None


def _count_of(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 1 << 53 else None


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc
