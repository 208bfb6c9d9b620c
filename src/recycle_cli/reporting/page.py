"""The report as one HTML file that asks nothing of any other host and runs no script."""

import jinja2
from markupsafe import Markup

from recycle_cli.reporting.document import Report

TEMPLATE, STYLE_SHEET = "report.html", "report.css"


def render_page(report: Report) -> str:
    """The page. Everything in it is escaped but the plots and the style sheet, which are ours."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("recycle_cli.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["tied"] = _tied
    assert environment.loader is not None
    style_sheet, _, _ = environment.loader.get_source(environment, STYLE_SHEET)
    page = environment.get_template(TEMPLATE)
    return page.render(report=report, style_sheet=Markup(style_sheet), drawn=Markup)


def _tied(text: str) -> str:
    """Keeps percent signs on the line of their numbers."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")
