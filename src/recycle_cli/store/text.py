"""Strangers' strings, made safe to keep and to show."""

import os
from pathlib import Path

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def clean_text(value: str, limit: int = 300) -> str:
    """The string with everything unprintable replaced, cut to `limit` characters.

    A card, a configuration or a folder's name may hold escape sequences that drive a terminal,
    line breaks, or lone surrogates that neither SQLite nor JSON can carry.
    """
    text = "".join(char if char.isprintable() else REPLACEMENT for char in value[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def expanded(name: str | Path) -> Path:
    """The path that a user means, with ~ written out where it names somebody."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  # Path's own raises where it names nobody
