"""Strangers' strings, made safe to keep and to show."""

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def clean_text(value: str, limit: int = 300) -> str:
    """The string with everything unprintable replaced, cut to `limit` characters.

    A card, a configuration or a folder's name may hold escape sequences that drive a terminal,
    line breaks, or lone surrogates that neither SQLite nor JSON can carry.
    """
    text = "".join(char if char.isprintable() else REPLACEMENT for char in value[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"
