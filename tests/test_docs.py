"""Pages that are written from the code are fresh, and links between pages lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"),
                *ROOT.glob("bench/*.md"), *ROOT.glob("examples/*/README.md")])  # fmt: skip


def test_pages_written_from_the_code_are_fresh() -> None:
    spec = importlib.util.spec_from_file_location("docs_write", ROOT / "docs/write.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs/documents.md").read_text(encoding="utf-8") == module.page(), (
        "run: make docs"
    )
    assert (ROOT / "docs/merge.md").read_text(encoding="utf-8") == module.merge_page(), (
        "run: make docs"
    )
    assert (ROOT / "docs/crawl.md").read_text(encoding="utf-8") == module.crawl_page(), (
        "run: make docs"
    )
    assert (ROOT / "docs/select.md").read_text(encoding="utf-8") == module.select_page(), (
        "run: make docs"
    )
    assert (ROOT / "docs/tune.md").read_text(encoding="utf-8") == module.tune_page(), (
        "run: make docs"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    anchors = {"#" + "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
               for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}  # fmt: skip
    assert set(re.findall(r"\]\((#[^)]+)\)", text)) <= anchors
