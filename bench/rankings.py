"""How far the cheap ways to select agree with the dear one, on real tasks and a real pool.

    python -m bench.rankings --work DIR [--write]

Runs `recycle select` for each task: halving first, so that it pays for its own answers; then
evaluation, which takes over what is there; then the methods that run no adapter. What stands in DIR
is taken as it is. The pool and the tasks are read from the folder that RECYCLE_DATA names.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from scipy import stats

from bench.pages import DOCS, write_table
from bench.timing import machine

PAGE = DOCS / "select.md"
TASKS = (
    "customer_reviews",
    "banking_cards",
    "clinc_domain",
    "bbh_navigate",
    "bbh_web_of_lies",
    "trec",
)
HALVING, EVALUATION = "halving", "evaluation"
CHEAP = ("gradient", "gradient-normalised", "card", "rank", "random")
K, POOL, ROWS = 5, 25, 100
Selection = Mapping[str, Any]


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help=f"keep the table in {PAGE.name}")
    options = parser.parse_args()
    work, data = options.work.absolute(), Path(os.environ["RECYCLE_DATA"])
    work.mkdir(parents=True, exist_ok=True)
    _recycle(work, f"crawl {data / 'pool'} --min-norm 0")
    found = {task: _selections(work, data / "tasks" / task) for task in TASKS}
    text = "\n".join(_table(found))
    print(text)
    if options.write:
        write_table(PAGE, "rankings", text)


def _selections(work: Path, task: Path) -> dict[str, Selection]:
    found = {}
    for method in (HALVING, EVALUATION, *CHEAP):
        file = work / f"{task.name}-{method}.json"
        if not file.exists():
            k = K if method == HALVING else POOL
            about = f" --task {task} --rows {ROWS}" if method not in ("rank", "random") else ""
            file.write_text(_recycle(work, f"select --method {method} -k {k}{about}"))
            print(f"{task.name}: {method}", file=sys.stderr, flush=True)
        found[method] = json.loads(file.read_text())
    return found


def _recycle(work: Path, words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "recycle_cli", "--offline", "-q", *shlex.split(words), "--json"],
        env={**os.environ, "RECYCLE_HOME": str(work / "home")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def _table(found: Mapping[str, Mapping[str, Selection]]) -> Iterator[str]:
    yield (
        f"Of {POOL} adapters; Spearman's correlation with the mean log-likelihood that "
        f"`evaluation` finds (with its accuracy), and how many of its first {K} are among the "
        f"method's first {K}:\n"
    )
    yield f"| method | {' | '.join(found)} | mean | seconds, mean |"
    yield "|---" * (len(found) + 3) + "|"
    for method in CHEAP:
        rows = [_against(of_task[EVALUATION], of_task[method]) for of_task in found.values()]
        yield _row(method, rows, [_seconds(of_task[method]) for of_task in found.values()])
    overlaps = [_overlap(of_task[EVALUATION], of_task[HALVING]) for of_task in found.values()]
    saved = [of_task[HALVING]["cost"] for of_task in found.values()]
    share = mean(cost["rows_scored"] / cost["rows_of_full"] for cost in saved)
    times = [_seconds(of_task[HALVING]) for of_task in found.values()]
    cells = " | ".join(f"{overlap} of {K}" for overlap in overlaps)
    yield (
        f"| halving | {cells} | {mean(overlaps):.1f} of {K}, {share:.0%} of the rows | "
        f"{mean(times):.0f} |"
    )
    # Evaluation took over the answers that halving had found.
    whole = mean(
        _seconds(of_task[EVALUATION]) + _seconds(of_task[HALVING]) for of_task in found.values()
    )
    yield f"| evaluation |{' - |' * (len(found) + 1)} {whole:.0f} |"
    yield f"\n{machine()}; {ROWS} rows, of which {ROWS - ROWS // 5} are scored"


def _row(method: str, rows: Sequence[tuple[float, float, int]], seconds: Sequence[float]) -> str:
    cells = [f"{likely:.2f} ({right:.2f}), {overlap}" for likely, right, overlap in rows]
    likely, right, overlap = (mean(column) for column in zip(*rows, strict=True))
    cells.append(f"{likely:.2f} ({right:.2f}), {overlap:.1f}")
    return f"| {method} | {' | '.join(cells)} | {mean(seconds):.0f} |"


def _against(full: Selection, other: Selection) -> tuple[float, float, int]:
    """Spearman's correlations with log-likelihood and with accuracy, and the overlap at K."""
    scores = {one["sha256"]: one["score"] for one in other["adapters"]}
    shared = [one for one in full["adapters"] if one["sha256"] in scores]
    ours = [scores[one["sha256"]] for one in shared]
    if len(set(ours)) == 1:  # no order at all
        return 0.0, 0.0, _overlap(full, other)
    likely, right = (
        float(stats.spearmanr(ours, [one[name] for one in shared]).statistic)
        for name in ("log_likelihood", "score")
    )
    return likely, right, _overlap(full, other)


def _overlap(full: Selection, other: Selection) -> int:
    one, two = ({a["sha256"] for a in each["adapters"][:K]} for each in (full, other))
    return len(one & two)


def _seconds(selection: Selection) -> float:
    return float(selection["cost"]["elapsed_s"])


if __name__ == "__main__":
    main()
