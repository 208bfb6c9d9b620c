"""The README.md of a result folder: where it comes from, and under which licences."""

from collections.abc import Sequence
from dataclasses import dataclass

UNKNOWN = "unknown"

CARD = """\
---
base_model: {{ base_model }}
library_name: peft
{%- if license %}
license: {{ license }}
{%- endif %}
tags:
- lora
- recycle
- base_model:adapter:{{ base_model }}
---
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
        license: of the result; None where it cannot be told.
    """

    title: str
    summary: str
    base_model: str
    command: str
    facts: Sequence[str]
    sources: Sequence[CardSource] = ()
    figure: str = "weight"
    warnings: Sequence[str] = ()
    license: str | None = None


def render_card(card: Card) -> str:
    """The card as Markdown with the Hub's YAML front matter."""
    import jinja2

    template = jinja2.Environment(autoescape=False, undefined=jinja2.StrictUndefined)
    return template.from_string(CARD).render(vars(card)).rstrip() + "\n"


def license_of_sources(licenses: Sequence[str | None]) -> str | None:
    """The one licence that all sources carry, or None where they differ or one has none."""
    found = set(licenses)
    return next(iter(found)) if len(found) == 1 else None


def license_warnings(licenses: Sequence[str | None]) -> list[str]:
    """What a user should know about the licences of what went into a result."""
    warnings = []
    missing = sum(license is None for license in licenses)
    if missing:
        warnings.append(
            f"{missing} of {len(licenses)} source adapters state no licence: "
            "without one you may have no right to pass the result on."
        )
    known = sorted({license for license in licenses if license})
    if len(known) > 1:
        warnings.append(
            f"The source adapters carry different licences ({', '.join(known)}); "
            "the result has to satisfy all of them."
        )
    return warnings
