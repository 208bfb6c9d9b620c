"""The README.md of a result folder: where it comes from, and under which licences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CARD = """\
---
{{ front_matter }}---
# {{ title }}

{{ summary }}
{% for warning in warnings %}
> **Warning.** {{ warning }}
{% endfor %}
{%- if sources %}
| adapter | revision | sha256 | {{ figure }} | licence |
|---|---|---|---|---|
{%- for source in sources %}
| {{ source.id }} | {{ source.revision or "-" }} | `{{ source.sha256[:12] }}` | \
{{ "%.4g" | format(source.figure) }} | {{ source.license or "unknown" }} |
{%- endfor %}
{% endif %}
{%- for line in facts %}
- {{ line }}
{%- endfor %}
{%- if energies %}

<details><summary>Share of the squared norm kept, by module</summary>

| module | kept |
|---|---|
{%- for module, energy in energies.items() %}
| {{ module }} | {{ "%.4f" | format(energy) }} |
{%- endfor %}

</details>
{%- endif %}

Made by:

```
{{ command }}
```
"""


@dataclass(frozen=True)
class CardSource:
    """A row of the card's table."""

    id: str
    revision: str | None
    sha256: str
    figure: float
    license: str | None


@dataclass(frozen=True)
class Card:
    """What a card says.

    Args:
        title: its heading.
        summary: one sentence.
        base_model: the base model's name.
        sources: the adapters in it.
        figure: what the number in each row is, as in "weight".
        facts: lines of the list below the table.
        command: the command line that made it.
        warnings: shown before everything else.
        licenses: of the result; none where they cannot be told.
        model: whether it is a whole model, not an adapter.
        routed: whether it is an adapter that PEFT cannot load.
        energies: the share of the squared norm that was kept, by module, where some was cut.
    """

    title: str
    summary: str
    base_model: str
    command: str
    facts: Sequence[str]
    sources: Sequence[CardSource] = ()
    figure: str = "weight"
    warnings: Sequence[str] = ()
    licenses: Sequence[str] = ()
    model: bool = False
    routed: bool = False
    energies: Mapping[str, float] = field(default_factory=dict)


def render_card(card: Card) -> str:
    """The card as Markdown with the Hub's YAML front matter."""
    import jinja2
    import yaml

    front = yaml.safe_dump(_front_matter(card), sort_keys=False, allow_unicode=True)
    template = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined)
    text = template.from_string(CARD).render(vars(card), front_matter=front)
    return text.rstrip() + "\n"


def _front_matter(card: Card) -> dict[str, Any]:
    """What the Hub reads."""
    if card.model:
        fields: dict[str, Any] = {
            "base_model": card.base_model,
            "base_model_relation": "merge",
            "library_name": "transformers",
        }
        tags = ["merge", "recycle"]
    elif card.routed:
        fields = {"base_model": card.base_model, "library_name": "recycle"}
        tags = ["recycle", "routed-adapters"]
    else:
        fields = {"base_model": card.base_model, "library_name": "peft"}
        tags = ["lora", "recycle", f"base_model:adapter:{card.base_model}"]
    if card.licenses:
        several = list(card.licenses)
        fields["license"] = several if len(several) > 1 else several[0]
    return {**fields, "tags": tags}
