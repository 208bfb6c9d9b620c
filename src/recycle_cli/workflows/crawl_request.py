"""What `recycle crawl` is asked to do."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError
from recycle_cli.workflows.provenance import shown

if TYPE_CHECKING:
    from recycle_cli.store.vetting import VettingLimits

HUB = "hub"
WORKERS = 8
NAMED = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class CrawlRequest:
    """What to crawl, and what to let in.

    Args:
        folder: where to look for adapter folders; None for the Hub.
        base_model: the canonical name of the base model.
        also_bases: other names of the base model, which adapters of it may state.
        ids: of the Hub, look at these alone: `owner/name`, with `@revision` or without.
        author: of the Hub, look at this owner's alone.
        limit: look at this many adapters at most: the first in the order of their paths, or of the
            list; of a listing of the Hub the most downloaded.
        licenses: the licences allowed, or None for any and none.
        max_rank: the largest rank allowed.
        max_bytes: the largest weights file allowed, or None for the usual limit.
        min_norm: what the norm of the whole update must be above, or None for the usual limit.
        max_norm: the largest, likewise.
        max_cache_bytes: what the weights in the adapter cache may take, or None for no limit.
        workers: how many adapters of the Hub to look at at once.
        dry_run: keep and record nothing; of the Hub, fetch no weights either.
    """

    folder: Path | None
    base_model: str
    also_bases: frozenset[str] = frozenset()
    ids: tuple[str, ...] = ()
    author: str | None = None
    limit: int | None = None
    licenses: frozenset[str] | None = None
    max_rank: int | None = None
    max_bytes: int | None = None
    min_norm: float | None = None
    max_norm: float | None = None
    max_cache_bytes: int | None = None
    workers: int = WORKERS
    dry_run: bool = False

    @property
    def source(self) -> str:
        """The kind of place."""
        return HUB if self.folder is None else "folder"

    @property
    def place(self) -> str:
        """The place, as the user would write it."""
        return HUB if self.folder is None else shown(self.folder)

    def command(self) -> list[str]:
        """The command line that asks for the same of a folder."""
        words = ["recycle", "crawl", self.place, "--base-model", self.base_model]
        for option, value in {
            "--limit": self.limit,
            "--max-rank": self.max_rank,
            "--max-bytes": self.max_bytes,
            "--min-norm": self.min_norm,
            "--max-norm": self.max_norm,
        }.items():
            words += [option, str(value)] if value is not None else []
        for name in sorted(self.also_bases):
            words += ["--also-base", name]
        for name in sorted(self.licenses or ()):
            words += ["--license", name]
        return [*words, *["--dry-run"] * self.dry_run]

    def limits(self) -> "VettingLimits":
        """What it lets in."""
        from recycle_cli.store.vetting import VettingLimits

        given: Mapping[str, float | None] = {
            "max_weights_bytes": self.max_bytes,
            "min_norm": self.min_norm,
            "max_norm": self.max_norm,
        }
        known = {name: value for name, value in given.items() if value is not None}
        usual = VettingLimits(max_rank=self.max_rank, licenses=self.licenses)
        return replace(usual, **known)  # type: ignore[arg-type]  # of the fields' own types


def read_ids(file: Path) -> tuple[str, ...]:
    """The ids in a file, one a line, each once; empty lines and those that begin with # are passed
    over.

    Raises:
        InputError: it cannot be read, holds none, a line is no id, or two name an adapter at two
            revisions.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--ids-from {file} cannot be read: {error}", "name a text file"
        ) from error
    ids: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if not word or word.startswith("#"):
            continue
        if not NAMED.fullmatch(word):
            raise InputError(
                f"line {number} of {file} is {word[:100]!r}, which is no id of the Hub",
                "write owner/name or owner/name@revision, one a line",
            )
        repo_id = word.partition("@")[0]
        first, before = ids.setdefault(repo_id, (number, word))
        if before != word:
            raise InputError(
                f"lines {first} and {number} of {file} name {repo_id} at two revisions",
                "a pool holds an adapter at one revision: leave one of the two out",
            )
    if not ids:
        raise InputError(f"--ids-from {file} holds no id", "write owner/name, one a line")
    return tuple(word for _, word in ids.values())
