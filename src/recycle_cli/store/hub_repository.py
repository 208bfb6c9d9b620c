"""What the Hub says of a repository, made of answers that may say anything."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # lazy

from recycle_cli.store.text import clean_text

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
"""What is asked for: the `expand` of a request."""
MAX_TAGS = 100
MAX_FILES = 20
SHA = re.compile(r"[0-9a-f]{40}")
LISTED = ("adapter_config.json", "README.md")
WEIGHTS_NAME = re.compile(r"adapter_model[^/]*")


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


def parse_repository(item: Any) -> HubRepository | None:
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
