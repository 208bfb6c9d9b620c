"""What a report is made of, before it is a page or Markdown: sections of blocks.

Both forms are written from the same blocks, so they cannot tell different figures. All text is
plain; whoever writes a form escapes it. The one exception is a figure's SVG, which `plots` makes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, a smaller note under it, and whether it stands out."""

    text: str
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Column:
    """A column's heading; figures are set to the right, words to the left."""

    title: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is the row's heading."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """A plot: what is seen in words, for those who do not see it, and the SVG itself."""

    title: str
    description: str
    svg: str
    wide: bool = False
    kind: str = "figure"


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str
    kind: str = "paragraph"


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]
    kind: str = "bullets"


@dataclass(frozen=True)
class Listing:
    """Text to copy, such as a command; `language` is that of a Markdown fence."""

    title: str
    text: str
    language: str
    kind: str = "listing"


@dataclass(frozen=True)
class Terms:
    """A glossary: words and what they mean."""

    items: Sequence[tuple[str, str]]
    kind: str = "terms"


@dataclass(frozen=True)
class Fold:
    """Blocks that are folded away until asked for."""

    summary: str
    blocks: Sequence["Block"]
    unfolded: bool = False
    kind: str = "fold"


Block: TypeAlias = Table | Figure | Paragraph | Bullets | Listing | Terms | Fold


@dataclass(frozen=True)
class Section:
    """A part of the report; one without blocks is left out."""

    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Place:
    """Where an adapter is: a sentence that ends with a folder, or with what brings it back."""

    words: str
    code: str


@dataclass(frozen=True)
class Opening:
    """The first screen: the verdict and the figures behind it, what to do, where the adapter is,
    and how it was decided."""

    headline: str
    figures: str
    advice: str
    adapter: Place | None
    notes: Sequence[str]
    decided: str


@dataclass(frozen=True)
class Report:
    """A whole report."""

    title: str
    facts: Sequence[str]
    opening: Opening
    sections: Sequence[Section]
