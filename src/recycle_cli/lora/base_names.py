"""When two names mean the same base model, and which names its copies go by."""

import re
from pathlib import Path

from recycle_cli.errors import InputError

EMBEDDED_NAME = "smollm2"
EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
COPIERS = ("unsloth",)
"""Who uploads other people's models again, unchanged or quantised, for training on."""
QUANTISED = re.compile(r"(-unsloth)?-bnb-(4|8)bit$")


def canonical_base_name(name: str) -> str:
    """The name under which a base model is kept: the short name of the embedded model becomes
    its Hub id, everything else stays as it is."""
    return EMBEDDED_ID if name.casefold() == EMBEDDED_NAME else name


def base_name_given(name: str) -> str:
    """The canonical name for what a user typed: a folder's is its absolute path without links, so
    that it has one name however it is spelled.

    Raises:
        InputError: it is empty.
    """
    if not name.strip():
        raise InputError("the name of the base model is empty", "name one: --base-model org/name")
    canonical = canonical_base_name(name)
    if canonical == name and Path(name).is_dir():
        return str(Path(name).resolve())
    return canonical


def same_base_model(one: str, other: str) -> bool:
    """True when both names mean the same base model. Case and a trailing slash do not count;
    parts of a name never match."""
    return normalised_base_name(one) == normalised_base_name(other)


def names_copy_of(name: str, base_model: str) -> bool:
    """True when a name is that of a base model, or of a copy of it that people train on.

    A copy has the same name but for case, a mark of quantisation behind it (`-bnb-4bit`) or
    `Meta-` before it, and the same owner or one of the COPIERS. Whether it has the same shapes is
    for others to say.
    """
    if same_base_model(name, base_model):
        return True
    owner, _, copy = normalised_base_name(name).rpartition("/")
    own, _, original = normalised_base_name(base_model).rpartition("/")
    return owner in (own, *COPIERS) and own != "" and _plain(copy) == _plain(original)


def copies_of(base_model: str) -> list[str]:
    """Hub ids that a base model and its usual copies have, itself first; empty for a folder."""
    owner, _, name = canonical_base_name(base_model.strip().rstrip("/")).partition("/")
    if not name or "/" in name or not owner:
        return []
    names = [name, *([f"Meta-{name}"] if name.startswith("Llama-") else [])]
    found = [f"{owner}/{name}"]
    for copier in COPIERS:
        for one in names:
            found += [f"{copier}/{one}{end}" for end in ("", "-bnb-4bit", "-unsloth-bnb-4bit")]
    return list(dict.fromkeys(found))


def normalised_base_name(name: str) -> str:
    """What names of the same base model have in common."""
    return canonical_base_name(name.strip().rstrip("/")).casefold()


def _plain(name: str) -> str:
    return QUANTISED.sub("", name).removeprefix("meta-")
