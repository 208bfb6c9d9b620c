"""Listings, their pages, and what is told of a repository."""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from support.hub.messages import Answer, Request, as_json, error
from support.hub.repository import Repository
from support.hub.shelves import Refused, Shelves

BRIEF = ("likes", "private", "downloads", "tags", "library_name", "createdAt")
FULL = (*BRIEF, "author", "sha", "lastModified", "gated", "disabled", "siblings")
SORTS = ("downloads", "likes", "lastModified", "createdAt", "trendingScore")


def listing(request: Request, shelves: Shelves) -> Answer:
    """One page of the repositories that a query finds."""
    found = [one for one in shelves.repositories.values() if _is_asked_for(one, request, shelves)]
    key = request.parameter("sort")
    if key is not None:
        if key not in SORTS:
            raise Refused(error(400, f"sort: unknown value {key}"))
        found.sort(key=lambda one: facts_of(one, one.sha).get(key, 0), reverse=True)
    fields = fields_asked(request, FULL if request.parameter("full") == "true" else BRIEF)
    page, link = page_of(request, shelves, found)
    answer = as_json([chosen(facts_of(one, one.sha), fields) for one in page])
    return answer.with_headers(Link=link) if link else answer


def _is_asked_for(repository: Repository, request: Request, shelves: Shelves) -> bool:
    if not shelves.shows(request.token, repository):
        return False
    known = {*repository.tags, repository.library_name}
    author, search = request.parameter("author"), request.parameter("search")
    gated = request.parameter("gated")
    return (
        known.issuperset(request.query.get("filter", []))
        and author in (None, repository.author)
        and (search or "").casefold() in repository.id.casefold()
        and (gated is None or (gated == "true") == bool(repository.gated))
    )


def page_of(
    request: Request, shelves: Shelves, found: Sequence[Any]
) -> tuple[Sequence[Any], str | None]:
    """The page that a cursor means, and the link to the next one where there is one."""
    start = _read_cursor(request.parameter("cursor"))
    asked = request.parameter("limit")
    size = min(shelves.page_size, int(asked)) if asked else shelves.page_size
    end = start + size
    if end >= len(found):
        return found[start:], None
    query = {**request.query, "cursor": [_cursor(end)]}
    url = f"{shelves.hub_url}{request.path}?{urlencode(query, doseq=True)}"
    return found[start:end], f'<{url}>; rel="next"'


def _cursor(start: int) -> str:
    return base64.urlsafe_b64encode(json.dumps({"start": start}).encode()).decode()


def _read_cursor(cursor: str | None) -> int:
    if cursor is None:
        return 0
    try:
        return int(json.loads(base64.urlsafe_b64decode(cursor))["start"])
    except (ValueError, LookupError, TypeError) as problem:
        raise Refused(error(400, "Invalid cursor")) from problem


def facts_of(repository: Repository, sha: str) -> dict[str, Any]:
    """Everything that is told of a repository; a listing gives no sizes and no digests."""
    return {
        "_id": repository.sha[:24],
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.author,
        "sha": sha,
        "lastModified": repository.last_modified,
        "createdAt": repository.created_at,
        "gated": repository.gated,
        "private": repository.private,
        "disabled": repository.disabled,
        "downloads": repository.downloads,
        "likes": repository.likes,
        "library_name": repository.library_name,
        "tags": list(repository.tags),
        "siblings": [{"rfilename": path} for path in repository.commits[sha]],
    }


def fields_asked(request: Request, usual: Sequence[str]) -> Sequence[str]:
    """The fields that a request asks for, or the usual ones."""
    asked = request.query.get("expand")
    if not asked:
        return ("modelId", *usual)
    unknown = sorted(set(asked) - set(FULL))
    if unknown:
        raise Refused(error(400, f"expand: unknown value {unknown[0]}"))
    return asked


def chosen(facts: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """These fields of a repository, and its id."""
    return {name: facts[name] for name in ("_id", "id", *fields)}
