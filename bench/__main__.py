"""`python -m bench [--only NAME]... [--write]`: prints the table; --write keeps it in README.md."""

import argparse
import os
import platform
import re
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

README = Path(__file__).with_name("README.md")
MARKERS = re.compile(r"(<!-- bench:start -->\n).*(<!-- bench:end -->)", re.DOTALL)
HEADER = "| what | recycle | compared with | takes | times as fast |\n|---|---|---|---|---|"


def machine() -> str:
    """The processor, its cores, and the versions that the figures depend on."""
    from recycle_cli.workflows.provenance import versions

    names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores; {found}"


def main() -> None:
    """Runs the benches asked for."""
    from bench import algebra, passes, startup

    benches = {"startup": startup, "algebra": algebra, "passes": passes}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=list(benches))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    lines = [HEADER]
    print(HEADER, flush=True)
    for name in options.only or benches:
        for comparison in benches[name].comparisons():
            lines.append(comparison.row())
            print(lines[-1], flush=True)
    lines.append(f"\n{machine()}\n")
    print(lines[-1])
    if options.write:
        text = README.read_text(encoding="utf-8")
        table = "\n".join(lines)
        README.write_text(
            MARKERS.sub(lambda match: match[1] + table + match[2], text), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
