"""Kinds of strangers, each a good adapter and what is changed of it."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from support.strangers.draft import Draft, Tensors

REDOS = "([a-z_.0-9]+)+!"
"""A pattern that takes for ever to say that it does not match."""

PICKLE = b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R."
"""A program in the shape of a file of weights."""

Change = Callable[[Draft], None]


@dataclass(frozen=True)
class Kind:
    """One kind of stranger: what is special about it, what must come of it, how it is made."""

    name: str
    expected: str
    changes: tuple[Change, ...] = ()

    def draft(self, base_model: str, seed: object) -> Draft:
        """A draft of this kind; the same for the same seed."""
        draft = Draft(base_model, Random(f"{seed}/{self.name}"))
        for change in self.changes:
            change(draft)
        return draft

    @property
    def slug(self) -> str:
        """A name that the Hub allows in a repository's id."""
        words = "".join(c if c.isascii() and c.isalnum() else " " for c in self.name.lower())
        return "-".join(words.split())[:48].strip("-")


def kind(name: str, expected: str, *changes: Change) -> Kind:
    """A kind, from its changes in a row."""
    return Kind(name, expected, changes)


def sets(**fields: Any) -> Change:
    """Sets fields of the configuration."""
    return lambda draft: draft.config.update(fields)


def lacks(*fields: str) -> Change:
    """Leaves fields out of the configuration."""

    def change(draft: Draft) -> None:
        for name in fields:
            draft.config.pop(name)

    return change


def adapts(*names: str, rank: int | None = None) -> Change:
    """Adapts these modules, at another rank where one is given."""

    def change(draft: Draft) -> None:
        if rank is not None:
            draft.config |= {"r": rank, "lora_alpha": 2 * rank}
        draft.adapt(*names)

    return change


def bends(how: Callable[[Tensors], Tensors]) -> Change:
    """Changes the tensors."""
    return lambda draft: draft.bends.append(how)


def has(name: str, content: bytes | None) -> Change:
    """Puts a file of this content, or takes the file away."""
    return lambda draft: draft.files.update({name: content})


def is_(**facts: Any) -> Change:
    """Sets attributes of the draft itself."""

    def change(draft: Draft) -> None:
        for name, value in facts.items():
            setattr(draft, name, value)

    return change
