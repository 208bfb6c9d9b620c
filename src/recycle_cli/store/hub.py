"""The Hugging Face Hub, through its own client library: what is listed, and what files hold.

Every request has timeouts; those that meet a rate limit or a failing server are sent again when
the Hub says so, which is `huggingface_hub`'s own doing. Links are followed within the Hub's origin
alone, so that a token goes nowhere else; where a file's redirect leads to a storage elsewhere, the
client leaves the token behind.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote, urljoin

import httpx2
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # lazy

from recycle_cli.errors import RecycleError
from recycle_cli.lora.config import AdapterProblem
from recycle_cli.store.hub_errors import AskedToWait, Unreachable, again_where_broken, explained
from recycle_cli.store.hub_repository import FIELDS, SHA, HubRepository, parse_repository
from recycle_cli.store.hub_requests import Patience, Requests, origin_name
from recycle_cli.store.text import clean_text

PAGE_SIZE = 1000
MAX_PAGES = 1000


class Hub(Requests):
    """The Hub, or a mirror of it. Safe to use from several threads.

    Args:
        endpoint: its address; None for `HF_ENDPOINT`, or the Hub's own.
        patience: how long it is waited for.
    """

    def __init__(self, endpoint: str | None = None, patience: Patience | None = None) -> None:
        super().__init__((endpoint or constants.ENDPOINT).rstrip("/"), patience)
        self.passed_over = 0  # entries of listings that name no repository, or no commit

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
            body, _ = self.whole(url, [("expand", field) for field in FIELDS])
        repository = parse_repository(_json(body, repo_id))
        if repository is None:
            raise Unreachable(f"the Hub's answer about {repo_id} names no commit")
        if revision is not None and SHA.fullmatch(revision) and repository.sha != revision:
            raise Unreachable(f"asked for {repo_id}@{revision}, the Hub tells of {repository.sha}")
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
                    body, response = self.whole(url, query)
                page = _json(body, base_model)
            except (AdapterProblem, OSError) as error:
                raise RecycleError(
                    f"the adapters of {base_model} cannot be listed: {clean_text(str(error))}",
                    "try again then"
                    if isinstance(error, AskedToWait)
                    else "check the network, HF_ENDPOINT and HF_TOKEN",
                ) from error
            if not isinstance(page, list):
                raise RecycleError(f"{url} answers with no list", "check HF_ENDPOINT")
            for item in page:
                repository = parse_repository(item)
                if repository is None:
                    self.passed_over += 1
                    continue
                given += 1
                yield repository
            url, query = self._next(response), []

    def _next(self, response: httpx2.Response) -> str | None:
        link = response.links.get("next", {}).get("url")
        if link is None:
            return None
        try:
            url = urljoin(str(response.url), link)
            elsewhere = not self.is_at_hub(url)
        except ValueError as error:
            raise RecycleError(
                f"the listing goes on at {clean_text(link)}, which is no address",
                "check HF_ENDPOINT",
            ) from error
        if elsewhere:
            raise RecycleError(
                f"the listing goes on at {origin_name(url)}, not at {self.endpoint}",
                "a token goes to one address only: set HF_ENDPOINT to where the listing leads",
            )
        return url


def _json(body: bytes, what: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Unreachable(f"the Hub's answer about {what} is not JSON") from error
