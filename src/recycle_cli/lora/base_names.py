"""When two names mean the same base model."""

from pathlib import Path

EMBEDDED_NAME = "smollm2"
EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def canonical_base_name(name: str) -> str:
    """The name under which a base model is kept: the short name of the embedded model becomes
    its Hub id, everything else stays as it is."""
    return EMBEDDED_ID if name.casefold() == EMBEDDED_NAME else name


def base_name_given(name: str) -> str:
    """The canonical name for what a user typed: a folder's is its absolute path without links, so
    that it has one name however it is spelled."""
    canonical = canonical_base_name(name)
    if canonical == name and Path(name).is_dir():
        return str(Path(name).resolve())
    return canonical


def same_base_model(one: str, other: str) -> bool:
    """True when both names mean the same base model. Case and a trailing slash do not count;
    parts of a name never match."""
    return _normalised(one) == _normalised(other)


def _normalised(name: str) -> str:
    return canonical_base_name(name.strip().rstrip("/")).casefold()
