"""What the licences of several adapters mean for what is made of them. No legal advice."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

SILENT = re.compile(r"other|unknown|none", re.IGNORECASE)
NON_COMMERCIAL = re.compile(r"cc-by-nc.*|.*-nc-.*|.*non-?commercial.*", re.IGNORECASE)
NO_DERIVATIVES = re.compile(r"cc-by(-nc)?-nd.*", re.IGNORECASE)
SHARE_ALIKE = re.compile(r"cc-by(-nc)?-sa.*|[al]?gpl.*|osl.*|eupl.*|odbl.*", re.IGNORECASE)
BASE_MODEL_TERMS = {
    "Llama": re.compile(r"llama.*|meta-llama.*", re.IGNORECASE),
    "Gemma": re.compile(r"gemma.*", re.IGNORECASE),
}
USE_RESTRICTED = re.compile(r".*openrail.*|.*rail-.*", re.IGNORECASE)


@dataclass(frozen=True)
class _Terms:
    """The licences of a result's sources that carry one kind of term."""

    names: list[str]

    @classmethod
    def matching(cls, known: Sequence[str], pattern: re.Pattern[str]) -> "_Terms":
        return cls([name for name in known if pattern.fullmatch(name)])

    def __bool__(self) -> bool:
        return bool(self.names)

    def __str__(self) -> str:
        return ", ".join(self.names)


def joined_licenses(licenses: Sequence[str | None]) -> list[str]:
    """The licences that sources state, each once, sorted. A card may state several at once."""
    stated = {name.strip() for license in licenses if license for name in license.split(",")}
    return sorted(name for name in stated if name and not SILENT.fullmatch(name))


def card_licenses(licenses: Sequence[str | None]) -> list[str]:
    """What a card can state: the licences of all sources, or none where one of them is silent."""
    return [] if _silent(licenses) else joined_licenses(licenses)


def license_warnings(licenses: Sequence[str | None]) -> list[str]:
    """What a user should know about the licences of what went into a result.

    Args:
        licenses: of each source, as the Hub spells them; None where none is stated.
    """
    known = joined_licenses(licenses)
    warnings = _about_silence(licenses)
    if len(known) > 1:
        warnings.append(
            f"The source adapters carry different licences ({', '.join(known)}); "
            "the result has to satisfy all of them."
        )
    return warnings + _about_terms(known)


def _about_silence(licenses: Sequence[str | None]) -> list[str]:
    silent = _silent(licenses)
    if not silent:
        return []
    return [
        f"{silent} of {len(licenses)} source adapters state no licence: "
        "without one you may have no right to pass the result on."
    ]


def _silent(licenses: Sequence[str | None]) -> int:
    """How many sources do not say under which licence they stand."""
    return sum(license is None or SILENT.fullmatch(license) is not None for license in licenses)


def _about_terms(known: Sequence[str]) -> list[str]:
    warnings = []
    if terms := _Terms.matching(known, NO_DERIVATIVES):
        warnings.append(f"Changed copies may not be passed on under {terms}; a merge is one.")
    non_commercial = _Terms.matching(known, NON_COMMERCIAL)
    if non_commercial:
        warnings.append(f"Commercial use is not allowed under {non_commercial}.")
    share_alike = _Terms.matching(known, SHARE_ALIKE)
    if share_alike:
        warnings.append(f"Results must be passed on under the same licence: {share_alike}.")
    rules = [share_alike] if share_alike else []
    for name, pattern in BASE_MODEL_TERMS.items():
        if terms := _Terms.matching(known, pattern):
            rules.append(terms)
            warnings.append(
                f"The {name} terms ({terms}) go with the result: pass them on, "
                f"keep to their use policy, and name {name} as they ask."
            )
    if terms := _Terms.matching(known, USE_RESTRICTED):
        rules.append(terms)
        warnings.append(f"The uses that {terms} rules out stay ruled out in the result.")
    return warnings + _about_conflicts(share_alike, non_commercial, rules)


def _about_conflicts(
    share_alike: _Terms, non_commercial: _Terms, rules: Sequence[_Terms]
) -> list[str]:
    """Terms that no one licence can satisfy together."""
    if not share_alike:
        return []
    others = {name for terms in (*rules, non_commercial) for name in terms.names}
    if len(others) < 2:
        return []
    return [
        f"These licences conflict: {', '.join(sorted(others))}. Share-alike asks for its own "
        "licence on the whole result, which the others do not allow."
    ]
