"""`python -m bench [--only NAME]... [--write]`: prints the tables; --write keeps them."""

import argparse
import os
from pathlib import Path

from bench.pages import DOCS, write_table
from bench.timing import machine

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

README = Path(__file__).parent / "README.md"
HEADER = (
    "| what | recycle | extra memory | compared with | takes | extra memory | times as fast |\n"
    "|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Runs the benches asked for."""
    from bench import algebra, crawl, merge, passes, select, startup, target, tune

    pages = {
        README: {"startup": startup, "algebra": algebra, "passes": passes},
        DOCS / "merge.md": {"merge": merge},
        DOCS / "tune.md": {"tune": tune},
        DOCS / "target-lora.md": {"target": target},
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
            write_table(page, "bench", "\n".join(lines))


if __name__ == "__main__":
    main()
