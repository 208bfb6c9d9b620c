"""`python -m bench [--only NAME]... [--write]`: prints the tables; --write keeps them."""

import argparse
import os
import re
from pathlib import Path

from bench.timing import machine

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
README, DOCS = HERE / "README.md", HERE.parent / "docs"
MARKERS = re.compile(r"(<!-- bench:start -->\n).*(<!-- bench:end -->)", re.DOTALL)
HEADER = (
    "| what | recycle | extra memory | compared with | takes | extra memory | times as fast |\n"
    "|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Runs the benches asked for."""
    from bench import algebra, crawl, merge, passes, select, startup, tune

    pages = {
        README: {"startup": startup, "algebra": algebra, "passes": passes},
        DOCS / "merge.md": {"merge": merge},
        DOCS / "tune.md": {"tune": tune},
        DOCS / "crawl.md": {"crawl": crawl},
        DOCS / "select.md": {"select": select},
    }
    names = [name for benches in pages.values() for name in benches]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=names)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    for page, benches in pages.items():
        wanted = [name for name in benches if name in (options.only or names)]
        lines = [getattr(benches[wanted[0]], "HEADER", HEADER)] if wanted else []
        print(*lines, sep="\n", flush=True)
        for name in wanted:
            for comparison in benches[name].comparisons():
                lines.append(comparison.row())
                print(lines[-1], flush=True)
        if wanted:
            lines.append(f"\n{machine()}\n")
            print(lines[-1])
        if wanted and options.write:
            _write(page, "\n".join(lines))


def _write(page: Path, table: str) -> None:
    text = page.read_text(encoding="utf-8")
    page.write_text(MARKERS.sub(lambda match: match[1] + table + match[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
