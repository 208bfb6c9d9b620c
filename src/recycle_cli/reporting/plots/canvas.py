"""Drawing for a page: SVG whose colours are the page's own, the same bytes every time.

Matplotlib writes colours into the SVG. It is given stand-ins, which are then replaced by the CSS
variables that the page defines for light and for dark. Figures are as wide as a phone, so that
their text stays readable there; wide ones scroll in a box of their own.
"""

import io
import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from recycle_cli.reporting.document import Figure

WIDTH = 400.0
UNITS_AN_INCH = 72.0
TEXT_SIZE, SMALL_SIZE = 11.0, 9.5

# The stand-ins, and what takes their place. The hues are told apart by people who see fewer
# colours (Okabe and Ito); marks differ in shape too.
INK, FAINT, PAPER = "#010001", "#010002", "#010003"
BLUE, ORANGE, GREEN, PINK = "#010004", "#010005", "#010006", "#010007"
HEAT = "#010008"
VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--line)",
    PAPER: "var(--paper)",
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    PINK: "var(--pink)",
    HEAT: "var(--heat)",
}

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "recycle",
    "font.family": "sans-serif",
    "font.size": TEXT_SIZE,
    # Names are strangers': a dollar sign in one starts no formula.
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": TEXT_SIZE,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": SMALL_SIZE,
    "ytick.labelsize": SMALL_SIZE,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": SMALL_SIZE,
    "legend.handlelength": 2.6,
    "axes.unicode_minus": True,
}


class Drawing:
    """A figure being drawn, with sizes in its own units, as in `Drawing("forest", 400, 300)`."""

    def __init__(self, name: str, width: float, height: float) -> None:
        self.name, self.width, self.height = name, width, height
        self.canvas = Canvas(figsize=(width / UNITS_AN_INCH, height / UNITS_AN_INCH))

    def axes(self, left: float, top: float, right: float, bottom: float) -> Axes:
        """Axes within these margins."""
        return self.canvas.add_axes(
            (
                left / self.width,
                bottom / self.height,
                (self.width - left - right) / self.width,
                (self.height - top - bottom) / self.height,
            )
        )

    def finished(self, title: str, description: str) -> Figure:
        """The figure for the page."""
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # The browser has the glyphs that matplotlib's font, used for measuring, may lack.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            self.canvas.savefig(buffer, format="svg", metadata={"Date": None})
        svg = _for_page(buffer.getvalue(), self.name, title, description, self.width, self.height)
        return Figure(title, description, svg, wide=self.width > WIDTH)


def style() -> AbstractContextManager[None]:
    """The look of all plots, for a `with` statement around the drawing of one."""
    return rc_context(STYLE)


def named(text: str) -> str:
    """A stranger's text without what XML forbids."""
    return "".join(character if character.isprintable() else " " for character in text)


def span(values: Sequence[float], padding: float = 0.06) -> tuple[float, float]:
    """The limits of an axis that shows all values with some room."""
    low, high = min(values), max(values)
    room = padding * ((high - low) or 1.0)
    return low - room, high + room


def _for_page(
    svg: str, name: str, title: str, description: str, width: float, height: float
) -> str:
    """The SVG's drawing in an element of our own, that fits the page and can be read aloud.

    Everything but the root's content goes: the page has a document type and a style sheet, and
    metadata would name other hosts. Identifiers get the figure's name in front, since those of
    several figures on a page may not be the same.
    """
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})", _page_colour, body)
    head = (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="--span: {width / WIDTH:.3g}" role="img" '
        f'aria-labelledby="{name}-title {name}-text">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-text">{escape(description)}</desc>'
    )
    return f"{head}{body.strip()}</svg>"


def _page_colour(match: re.Match[str]) -> str:
    return f"{match[1]}: {VARIABLES.get(match[2], match[2])}"
