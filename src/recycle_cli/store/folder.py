"""Adapter folders under a root, and what their model cards say."""

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from recycle_cli.lora.folder import CONFIG_FILE
from recycle_cli.store.text import clean_text

CARD_FILE = "README.md"
MAX_CARD_BYTES = 64 * 1024
MAX_PATH = 4096
DIGITS = 16
FENCE = "---"
CHECKPOINT = re.compile(r"checkpoint-[0-9]{1,9}")


@dataclass(frozen=True)
class FoundFolder:
    """A folder that holds an `adapter_config.json`, or one that could not be looked into.

    Args:
        id: its posix path relative to the root; the root's own name for the root itself.
        folder: the absolute path.
        root: the resolved folder that was searched; files that lead out of it are not read.
        revision: its name among the checkpoints of one training; None for an adapter that is none.
        newer: the later version of the same adapter, where there is one.
    """

    id: str
    folder: Path
    root: Path
    revision: str | None = None
    newer: str | None = None

    @property
    def source(self) -> Literal["hub", "folder"]:
        """The kind of place."""
        return "folder"

    @property
    def facts(self) -> Mapping[str, Any]:
        """A folder says nothing of its adapter beside the adapter itself."""
        return {}

    @property
    def origin(self) -> str:
        """The absolute path as text, safe to keep and to show. Where something was replaced in it,
        a digest of the path stands behind, so that two folders are never taken for one."""
        path = str(self.folder)
        text = clean_text(path, MAX_PATH)
        if text == path:
            return text
        return f"{text}~{hashlib.sha256(os.fsencode(path)).hexdigest()[:DIGITS]}"

    def leads_outside(self, name: str) -> bool:
        """True when a file of the folder is a link to somewhere outside the root."""
        path = self.folder / name
        # realpath, unlike Path.resolve, has an answer for a link that leads to itself.
        return path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(self.root)


@dataclass(frozen=True)
class Card:
    """What a model card's front matter says; empty where it says nothing usable."""

    license: str | None = None
    base_models: tuple[str, ...] = ()


def find_adapters(root: Path, skip: Collection[Path] = ()) -> Iterator[FoundFolder]:
    """The adapter folders at or under a root, parents before children, siblings by name.

    Links to folders are not followed: what they lead to inside the root is found in its own
    place, and what lies outside is none of this crawl's business. A folder that cannot be listed
    is yielded too, so that it is reported instead of passed over.

    Args:
        root: an existing folder.
        skip: folders not to go into, such as the adapter cache.
    """
    root = root.resolve()
    skipped = {path.resolve() for path in skip}
    unlisted: list[Path] = []
    for name, folders, files in os.walk(
        root, onerror=lambda error: unlisted.append(Path(error.filename))
    ):
        folder = Path(name)
        folders[:] = sorted(child for child in folders if folder / child not in skipped)
        if CONFIG_FILE in files:
            yield _found(folder, root)
    for folder in unlisted:
        yield _found(folder, root)


def with_versions(found: Iterable[FoundFolder]) -> list[FoundFolder]:
    """The same adapters, with the checkpoints of one training as versions of one adapter.

    Folders called `checkpoint-N` are versions of the adapter that their parent is, or would be:
    they go by its id, and their own name is the revision. The latest is the parent itself where
    it is an adapter, else the one with the highest N; the others have it as `newer`.
    """
    found = list(found)
    trainings: dict[Path, list[FoundFolder]] = {}
    for one in found:
        if CHECKPOINT.fullmatch(one.folder.name) and one.folder != one.root:
            trainings.setdefault(one.folder.parent, []).append(one)
    there = {one.folder for one in found}
    versions = {}
    for parent, checkpoints in trainings.items():
        root = checkpoints[0].root
        last = max(checkpoints, key=lambda one: int(one.folder.name.rpartition("-")[2]))
        name = _found(parent, root).id
        latest = name if parent in there else f"{name}@{last.folder.name}"
        for one in checkpoints:
            newer = latest if parent in there or one is not last else None
            versions[one.folder] = replace(
                one, id=name, revision=clean_text(one.folder.name), newer=newer
            )
    return [versions.get(one.folder, one) for one in found]


def _found(folder: Path, root: Path) -> FoundFolder:
    name = folder.relative_to(root).as_posix() if folder != root else root.name
    return FoundFolder(clean_text(name, MAX_PATH), folder, root)


def read_card(found: FoundFolder) -> tuple[Card, str]:
    """The card of an adapter folder and its text; both empty where there is none to read.

    Never raises for what a card holds: a stranger's card is a hint, not a condition. The first
    64 KiB are read.
    """
    try:
        if found.leads_outside(CARD_FILE) or not (found.folder / CARD_FILE).is_file():
            return Card(), ""
        with (found.folder / CARD_FILE).open("rb") as file:
            text = file.read(MAX_CARD_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return Card(), ""
    return parse_card(text), text


def parse_card(text: str) -> Card:
    """The licence and base models in a card's YAML front matter. Never raises."""
    fields = _front_matter(text)
    licenses = _strings(fields.get("license"))
    return Card(", ".join(licenses) or None, _strings(fields.get("base_model")))


def _front_matter(text: str) -> dict[Any, Any]:
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != FENCE:
        return {}
    stripped = [line.rstrip() for line in lines[1:]]
    if FENCE not in stripped:
        return {}
    block = "\n".join(lines[1 : 1 + stripped.index(FENCE)])
    try:
        # BaseLoader makes text, lists and objects only; the safe loader's dates and numbers
        # raise errors of many kinds on odd input and would turn "license: no" into False.
        fields = yaml.load(block, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _strings(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    return tuple(
        clean_text(item.strip()) for item in items[:8] if isinstance(item, str) and item.strip()
    )
