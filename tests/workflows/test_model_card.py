import dataclasses
from typing import Any

import pytest
import yaml

from recycle_cli.workflows.model_card import Card, CardSource, render_card

SOURCES = [
    CardSource("lab/one", "main", "a" * 64, 0.5, "mit"),
    CardSource("two", None, "b", 1, None),
]
CARD = Card(
    title="merged",
    summary="2 adapters merged.",
    base_model="org/base",
    command="recycle merge one two",
    facts=["Rank 3."],
    sources=SOURCES,
    warnings=["Beware."],
)


def front_matter(card: Card) -> tuple[dict[str, Any], str]:
    _, front, text = render_card(card).split("---\n", 2)
    fields = yaml.safe_load(front)
    assert isinstance(fields, dict)
    return fields, text


@pytest.mark.parametrize(
    ("licenses", "stated"),
    [
        ([], None),
        (["mit"], "mit"),
        (["apache-2.0"], "apache-2.0"),
        (["apache-2.0", "mit"], ["apache-2.0", "mit"]),
    ],
)
def test_licences_are_stated_as_the_hub_reads_them(licenses: list[str], stated: Any) -> None:
    fields, _ = front_matter(dataclasses.replace(CARD, licenses=licenses))
    assert fields.get("license") == stated
    assert ("license" in fields) == (stated is not None)


def test_an_adapter_and_a_model_are_told_apart() -> None:
    adapter, _ = front_matter(CARD)
    assert adapter == {
        "base_model": "org/base",
        "library_name": "peft",
        "tags": ["lora", "recycle", "base_model:adapter:org/base"],
    }
    model, _ = front_matter(dataclasses.replace(CARD, model=True))
    assert model == {
        "base_model": "org/base",
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "recycle"],
    }


def test_the_text_tells_sources_warnings_facts_and_energies() -> None:
    _, text = front_matter(dataclasses.replace(CARD, energies={"m.a": 0.51234}))
    assert "# merged\n\n2 adapters merged.\n" in text
    assert "> **Warning.** Beware." in text
    assert f"| lab/one | main | `{'a' * 12}` | 0.5 | mit |" in text
    assert "| two | - | `b` | 1 | unknown |" in text
    assert "\n- Rank 3.\n" in text
    assert "| m.a | 0.5123 |" in text
    assert "```\nrecycle merge one two\n```\n" in text
    assert "<details>" not in render_card(CARD)


@pytest.mark.parametrize("name", ["no", "1.0", "mit: x", "*mit", "mit # own", "[mit", "x\ny: z"])
def test_any_licence_stays_text(name: str) -> None:
    fields, _ = front_matter(dataclasses.replace(CARD, licenses=[name]))
    assert fields["license"] == name


@pytest.mark.parametrize("name", ["/models/v2: new", "/models/a #1", "@org/base", "123"])
def test_any_base_model_stays_text(name: str) -> None:
    fields, _ = front_matter(dataclasses.replace(CARD, base_model=name))
    assert fields["base_model"] == name
