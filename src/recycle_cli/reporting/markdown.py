"""The report as Markdown: the same words and tables, without the plots."""

import re
from collections.abc import Iterator, Sequence

from recycle_cli.reporting.document import (
    Block,
    Bullets,
    Cell,
    Fold,
    Listing,
    Opening,
    Paragraph,
    Report,
    Table,
    Terms,
)

# What would start markup, HTML's included, or end a table's cell.
MARKUP = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def render_markdown(report: Report) -> str:
    """The report's text."""
    parts = [f"# {escaped(report.title)}", *_opening(report.opening)]
    parts.append("\n".join(f"- {escaped(fact)}" for fact in report.facts))
    for section in report.sections:
        written = [text for block in section.blocks for text in _written(block)]
        if written:
            parts += [f"## {escaped(section.title)}", *written]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """Strangers' text on one line, to be read and not to be obeyed."""
    line = " ".join(text.split())
    for character, entity in ENTITIES.items():
        line = line.replace(character, entity)
    return MARKUP.sub(r"\\\g<0>", line)


def _opening(opening: Opening) -> Iterator[str]:
    yield f"**{escaped(opening.headline)}**"
    advice = f"**What to do.** {escaped(opening.advice)}"
    if opening.adapter:
        place = opening.adapter
        advice += f" {escaped(place.words)} {escaped(place.code)}."
    yield advice
    if opening.figures:
        yield escaped(opening.figures)
    if opening.notes:
        yield _bullets(opening.notes)
    if opening.decided:
        yield f"How this was decided. {escaped(opening.decided)}"


def _written(block: Block) -> Iterator[str]:
    match block:
        case Table():
            yield _table(block)
        case Fold():
            inner = [text for part in block.blocks for text in _written(part)]
            if inner:
                yield f"### {escaped(block.summary)}"
                yield from inner
        case Paragraph():
            yield escaped(block.text)
        case Bullets():
            yield _bullets(block.items)
        case Listing():
            yield f"### {escaped(block.title)}"
            yield _listing(block)
        case Terms():
            yield _bullets([f"{word}: {meaning}" for word, meaning in block.items])


def _table(table: Table) -> str:
    heads = " | ".join(escaped(column.title) for column in table.columns)
    rules = "|".join("--:" if column.numeric else "---" for column in table.columns)
    rows = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table.rows]
    return "\n".join([f"{escaped(table.caption)}:", "", f"| {heads} |", f"|{rules}|", *rows])


def _cell(cell: Cell) -> str:
    text = f"**{escaped(cell.text)}**" if cell.strong else escaped(cell.text)
    return f"{text} ({escaped(cell.note)})" if cell.note else text


def _listing(listing: Listing) -> str:
    """A fence longer than any run of backticks in the text, so that none of them ends it."""
    runs = [len(run) for run in re.findall("`+", listing.text)]
    fence = "`" * max([3, *(run + 1 for run in runs)])
    return f"{fence}{listing.language}\n{listing.text}\n{fence}"


def _bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {escaped(item)}" for item in items)
