"""The report as a browser shows it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from reporting.chromium import MISSING, Page, chromium_page, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason=MISSING)

PHONE, DESK = 360, 1100

# Elements that stick out of the page and do not lie in a box that scrolls by itself. The window is
# no measure: a phone's grows with what it shows.
STICKING_OUT = """
[...document.body.querySelectorAll('*')].filter(element =>
    element.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5
    && !element.closest('.scrolled')
).map(element => element.outerHTML.slice(0, 120))
"""
FLAT_PLOTS = """
[...document.querySelectorAll('svg')].filter(plot => {
    const box = plot.getBoundingClientRect(), shapes = plot.querySelectorAll('path, use, rect');
    return box.width < 250 || box.height < 100 || shapes.length < 3;
}).length
"""
# The least contrast of text with the page, after WCAG 2.
LEAST_CONTRAST = """
(() => {
    const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(part => part / 255)
        .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
    const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const page = light(getComputedStyle(document.body).backgroundColor);
    return Math.min(...[...document.querySelectorAll('p, td, th, small, a, li, svg text')].map(
        element => contrast(page, light(getComputedStyle(element)[
            element.tagName === 'text' ? 'fill' : 'color']))));
})()
"""
UNFOLD = "document.querySelectorAll('details').forEach(fold => { fold.open = true })"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium_page(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_browser_shows_all_of_it(page: Page, folder: Path, width: int, scheme: str) -> None:
    page.open(folder / "report.html", width, scheme)
    page.evaluate(UNFOLD)
    assert page.evaluate(
        "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )
    assert page.evaluate(STICKING_OUT) == []
    plots = page.evaluate("document.querySelectorAll('figure svg').length")
    assert plots == page.evaluate("document.querySelectorAll('figure').length") >= 6
    assert page.evaluate(FLAT_PLOTS) == 0
    assert page.evaluate(LEAST_CONTRAST) >= 4.5
    assert page.complaints() == []
    assert page.requested() <= {(folder / "report.html").as_uri(), "data:,"}


def test_light_and_dark_differ(page: Page, folder: Path) -> None:
    def paper(scheme: str) -> str:
        page.open(folder / "report.html", DESK, scheme)
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    assert paper("light") != paper("dark")


def test_what_to_do_is_on_a_phones_first_screen(page: Page, folder: Path) -> None:
    page.open(folder / "report.html", PHONE)
    bottom = page.evaluate("document.querySelector('.advice').getBoundingClientRect().bottom")
    assert bottom < 640


def test_a_faulty_page_would_be_noticed(page: Page, tmp_path: Path) -> None:
    faulty = tmp_path / "faulty.html"
    faulty.write_text(
        '<!DOCTYPE html><meta name="viewport" content="width=device-width">'
        '<script>nothing()</script><p style="width: 500px">wide</p>',
        encoding="utf-8",
    )
    page.open(faulty, PHONE)
    assert page.evaluate(STICKING_OUT)
    assert page.complaints()
