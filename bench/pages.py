"""Where the tables of the benches stand: between two marks in a page."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def write_table(page: Path, name: str, table: str) -> None:
    """Puts a table where the page has `<!-- NAME:start -->` and `<!-- NAME:end -->`."""
    marks = re.compile(rf"(<!-- {name}:start -->\n).*(<!-- {name}:end -->)", re.DOTALL)
    text = page.read_text(encoding="utf-8")
    text = marks.sub(lambda match: f"{match[1]}{table.rstrip()}\n{match[2]}", text)
    page.write_text(text, encoding="utf-8")
