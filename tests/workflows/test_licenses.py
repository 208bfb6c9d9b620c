from collections.abc import Sequence

import pytest

from recycle_cli.workflows.licenses import card_licenses, joined_licenses, license_warnings

SILENT, DIFFERENT = "state no licence", "carry different licences"
CHANGED, COMMERCIAL = "Changed copies may not be passed on", "Commercial use is not allowed"
ALIKE, TERMS = "must be passed on under the same licence", "terms ("
RULED_OUT, CONFLICT = "stay ruled out", "These licences conflict"


@pytest.mark.parametrize(
    ("licenses", "said"),
    [
        ([], []),
        (["mit"], []),
        (["mit", "mit"], []),
        (["apache-2.0", "mit"], [DIFFERENT]),
        ([None], [SILENT]),
        (["mit", None], [SILENT]),
        (["other"], [SILENT]),
        (["Unknown"], [SILENT]),
        (["cc-by-4.0"], []),
        (["cc0-1.0"], []),
        (["cc-by-nc-4.0"], [COMMERCIAL]),
        (["cc-by-nc-nd-4.0"], [CHANGED, COMMERCIAL]),
        (["cc-by-nd-4.0"], [CHANGED]),
        (["cc-by-sa-4.0"], [ALIKE]),
        (["cc-by-nc-sa-4.0"], [COMMERCIAL, ALIKE]),
        (["CC-BY-NC-4.0"], [COMMERCIAL]),
        (["gpl-3.0"], [ALIKE]),
        (["agpl-3.0"], [ALIKE]),
        (["lgpl-lr"], [ALIKE]),
        (["osl-3.0"], [ALIKE]),
        (["eupl-1.2"], [ALIKE]),
        (["odbl"], [ALIKE]),
        (["llama3.1"], [TERMS]),
        (["meta-llama-3"], [TERMS]),
        (["gemma"], [TERMS]),
        (["openrail"], [RULED_OUT]),
        (["bigscience-bloom-rail-1.0"], [RULED_OUT]),
        (["creativeml-openrail-m"], [RULED_OUT]),
        (["gpl-3.0", "gpl-3.0"], [ALIKE]),
        (["gpl-3.0", "mit"], [DIFFERENT, ALIKE]),
        (["gpl-3.0", "cc-by-sa-4.0"], [DIFFERENT, ALIKE, CONFLICT]),
        (["gpl-3.0", "cc-by-nc-4.0"], [DIFFERENT, COMMERCIAL, ALIKE, CONFLICT]),
        (["gpl-3.0", "llama3"], [DIFFERENT, ALIKE, TERMS, CONFLICT]),
        (["gpl-3.0", "gemma", None], [SILENT, DIFFERENT, ALIKE, TERMS, CONFLICT]),
        (["gpl-3.0", "openrail"], [DIFFERENT, ALIKE, RULED_OUT, CONFLICT]),
        (["llama3", "gemma"], [DIFFERENT, TERMS, TERMS]),
        (["llama3", "cc-by-nc-4.0"], [DIFFERENT, COMMERCIAL, TERMS]),
    ],
)
def test_what_licences_mean_for_the_result(licenses: Sequence[str | None], said: list[str]) -> None:
    warnings = license_warnings(licenses)
    assert len(warnings) == len(said), warnings
    assert all(text in warning for text, warning in zip(said, warnings, strict=True)), warnings
    assert license_warnings(licenses[::-1]) == warnings


@pytest.mark.parametrize(
    ("licenses", "silent"),
    [
        ([None], "1 of 1"),
        (["mit", None, "other", "none"], "3 of 4"),
        ([None, None, "apache-2.0"], "2 of 3"),
    ],
)
def test_silent_sources_are_counted(licenses: list[str | None], silent: str) -> None:
    assert license_warnings(licenses)[0].startswith(f"{silent} source adapters")


def test_every_licence_is_named_once_where_it_matters() -> None:
    warnings = license_warnings(["gpl-3.0", "llama3", "gpl-3.0", "mit", "llama2"])
    assert "(gpl-3.0, llama2, llama3, mit)" in warnings[0]
    assert "the Llama terms (llama2, llama3)" in " ".join(warnings).replace("The L", "the L")
    assert "conflict: gpl-3.0, llama2, llama3." in warnings[-1]


@pytest.mark.parametrize(
    ("licenses", "joined", "card"),
    [
        ([], [], []),
        (["mit"], ["mit"], ["mit"]),
        (["mit", "apache-2.0", "mit"], ["apache-2.0", "mit"], ["apache-2.0", "mit"]),
        (["mit", None], ["mit"], []),
        ([None], [], []),
    ],
)
def test_a_card_states_licences_only_where_all_sources_do(
    licenses: list[str | None], joined: list[str], card: list[str]
) -> None:
    assert joined_licenses(licenses) == joined
    assert card_licenses(licenses) == card


@pytest.mark.parametrize("silent", ["unknown", "none"])
def test_a_licence_that_says_nothing_is_not_stated(silent: str) -> None:
    assert card_licenses(["mit", silent]) == []
    assert not any(DIFFERENT in warning for warning in license_warnings(["mit", silent]))


def test_terms_are_seen_in_a_card_that_states_several_licences() -> None:
    # As the card of an earlier merge is read.
    assert any(ALIKE in warning for warning in license_warnings(["apache-2.0, gpl-3.0"]))
