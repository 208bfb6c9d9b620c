"""Does recycling help? Every method and its controls on tasks that no adapter of a pool has seen.

    python -m bench.results --work DIR [--jobs N] [--threads N] [--write]

It runs the commands that the table in docs/results.md is made of, each once: what stands in DIR is
taken as it is, so a run that was interrupted goes on where it was. The pool and the tasks are read
from the folder that RECYCLE_DATA names. Test rows are scored once, at the end.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.timing import machine

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
MARKERS = re.compile(r"(<!-- results:start -->\n).*(<!-- results:end -->)", re.DOTALL)
TASKS = {
    "customer_reviews": "sentiment: sst2, rotten tomatoes, mpqa, tweets",
    "banking_cards": "banking intents: transfers, clinc banking, clinc cards",
    "bbh_web_of_lies": "none (boolean expressions, of the same collection)",
    "bbh_navigate": "none",
}
SEEDS = (0, 1)
ROWS, STEPS = 100, 60
BASE, TARGET = "base", "target"
# The same number of steps for all that follow gradients, the target LoRA too.
PACE = f"--rows {ROWS} --steps {STEPS}"
LORA = f"{PACE} --method lora --rank 16 --alpha 32 --dropout 0 --lr 1e-3"


@dataclass(frozen=True)
class Arm:
    """A method.

    Args:
        options: of `recycle tune`.
        pool: whether the pool's adapters are given.
        beside: whether the target LoRA is given.
        control: the arm that it has to beat.
    """

    options: str
    pool: bool = True
    beside: bool = False
    control: str = BASE


ARMS: Mapping[str, Arm] = {
    TARGET: Arm(LORA, pool=False),
    "recycle": Arm(PACE, control="random"),
    "random": Arm(f"{PACE} --reinit experts"),
    "adamerging": Arm(f"{PACE} --method adamerging"),
    "lorahub": Arm(f"--rows {ROWS} --method lorahub"),
    "recycle+target": Arm(PACE, beside=True, control="random+target"),
    "random+target": Arm(f"{PACE} --reinit experts", beside=True, control=TARGET),
    "rescale": Arm(f"{PACE} --method rescale", pool=False, beside=True, control=TARGET),
}
ORDER = (BASE, *ARMS)
Scores = NDArray[np.float64]


def main() -> None:
    """Runs what is missing, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="tasks and seeds side by side")
    parser.add_argument("--threads", type=int, help="of each; all cores by default")
    parser.add_argument("--write", action="store_true", help=f"keep the tables in {PAGE.name}")
    options = parser.parse_args()
    study = Study(options.work.absolute(), Path(os.environ["RECYCLE_DATA"]), options.threads)
    cells = [(task, seed) for seed in SEEDS for task in TASKS]
    study.crawl()
    with ThreadPoolExecutor(options.jobs) as workers:
        list(workers.map(lambda cell: study.run_cell(*cell), cells))
    text = "\n".join(tables(study, options.jobs))
    print(text)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        page = MARKERS.sub(lambda match: f"{match[1]}{text}\n{match[2]}", page)
        PAGE.write_text(page, encoding="utf-8")


class Study:
    """The commands, run in a folder."""

    def __init__(self, work: Path, data: Path, threads: int | None) -> None:
        self.work, self.data = work, data
        self._environment = {**os.environ, "RECYCLE_HOME": str(work / "home")}
        if threads:
            self._environment["OMP_NUM_THREADS"] = str(threads)

    def crawl(self) -> None:
        """The pool, as the document lines that the other commands read."""
        file = self.work / "pool.jsonl"
        if not file.exists():
            self.work.mkdir(parents=True, exist_ok=True)
            self._recycle(f"crawl {self.data / 'pool'} --min-norm 0")
            file.write_text(self._recycle("index list --sort id"))

    def run_cell(self, task: str, seed: int) -> None:
        """All arms on one task with one seed, and their scores."""
        folder = self.work / f"{task}-{seed}"
        for name, arm in ARMS.items():
            if not (folder / name).exists():
                self._tune(folder, name, arm, task, seed)
        samples = folder / "samples.jsonl"
        if not samples.exists():
            names = " ".join(str(folder / name) for name in ARMS)
            beside = samples.with_suffix(".new")
            self._recycle(f"eval {names} --task {self.data / 'tasks' / task} --samples {beside}")
            beside.rename(samples)
        print(f"{task}, seed {seed}: done", file=sys.stderr, flush=True)

    def correct(self, task: str, seed: int) -> dict[str, Scores]:
        """Arm -> (rows,) 1 where its answer was right."""
        found: dict[str, list[float]] = {}
        for line in (self.work / f"{task}-{seed}" / "samples.jsonl").open():
            sample = json.loads(line)
            found.setdefault(sample["adapter"], []).append(float(sample["correct"]))
        return {name: np.array(values) for name, values in found.items()}

    def seconds(self, task: str, seed: int, arm: str) -> float:
        """How long the training took."""
        record = self.work / f"{task}-{seed}" / arm / "recycle.json"
        return float(json.loads(record.read_text())["elapsed_s"])

    def _tune(self, folder: Path, name: str, arm: Arm, task: str, seed: int) -> None:
        pool = (self.work / "pool.jsonl").read_text() if arm.pool else None
        words = f"tune {'-' if arm.pool else ''} --task {self.data / 'tasks' / task} {arm.options}"
        beside = f" --target {folder / TARGET}" if arm.beside else ""
        self._recycle(f"{words}{beside} --seed {seed} --resume --out {folder / name}", pool)

    def _recycle(self, words: str, stdin: str | None = None) -> str:
        command = [sys.executable, "-m", "recycle_cli", "--offline", "-q", *shlex.split(words)]
        done = subprocess.run(
            [*command, "--json"],
            input=stdin,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"recycle {words} ended with {done.returncode}")
        return done.stdout


def tables(study: Study, jobs: int) -> Iterator[str]:
    """The Markdown of the results."""
    scores = {task: {arm: _mean_over_seeds(study, task, arm) for arm in ORDER} for task in TASKS}
    yield "Accuracy in %, mean over the seeds, with 95 % intervals over the test rows:\n"
    yield f"| method | {' | '.join(TASKS)} | mean |"
    yield "|---" * (len(TASKS) + 2) + "|"
    for arm in ORDER:
        rows = [scores[task][arm] for task in TASKS]
        yield _row(arm, [*([row] for row in rows), rows])
    yield "\nDifference in points to what each has to beat, on the same rows:\n"
    yield f"| comparison | {' | '.join(TASKS)} | mean |"
    yield "|---" * (len(TASKS) + 2) + "|"
    for ours, theirs in _comparisons():
        rows = [scores[task][ours] - scores[task][theirs] for task in TASKS]
        yield _row(f"{ours} - {theirs}", [*([row] for row in rows), rows], signed=True)
    yield "\nEach seed by itself, accuracy in %:\n"
    yield f"| method | {' | '.join(TASKS)} | seconds to train, median |"
    yield "|---" * (len(TASKS) + 2) + "|"
    for arm in ORDER:
        yield _seeds_row(study, arm)
    relatives = "; ".join(f"{task}: {what}" for task, what in TASKS.items())
    yield f"\nRelatives of the tasks in the pool: {relatives}."
    yield f"\n{machine()}; {jobs} runs side by side"


def _comparisons() -> list[tuple[str, str]]:
    pairs = [(name, TARGET) for name in ARMS if name != TARGET]
    return pairs + [(name, arm.control) for name, arm in ARMS.items() if arm.control != TARGET]


def _mean_over_seeds(study: Study, task: str, arm: str) -> Scores:
    mean: Scores = np.mean([study.correct(task, seed)[arm] for seed in SEEDS], axis=0)
    return mean


def _row(name: str, cells: Sequence[Sequence[Scores]], signed: bool = False) -> str:
    texts = []
    for rows in cells:
        low, high = _interval(rows)
        value = 100 * np.mean([row.mean() for row in rows])
        sign = "+" if signed else ""
        texts.append(f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})")
    return f"| {name} | {' | '.join(texts)} |"


def _interval(rows: Sequence[Scores], draws: int = 10_000) -> tuple[float, float]:
    """The percentile bootstrap over rows, within each task, for the mean of the tasks' means."""
    generator = np.random.default_rng(0)
    means = [row[generator.integers(0, len(row), (draws, len(row)))].mean(axis=1) for row in rows]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    return 100 * float(low), 100 * float(high)


def _seeds_row(study: Study, arm: str) -> str:
    texts = [
        ", ".join(f"{100 * study.correct(task, seed)[arm].mean():.1f}" for seed in SEEDS)
        for task in TASKS
    ]
    if arm == BASE:
        return f"| {arm} | {' | '.join(texts)} | - |"
    times = [study.seconds(task, seed, arm) for task in TASKS for seed in SEEDS]
    return f"| {arm} | {' | '.join(texts)} | {np.median(times):.0f} |"


if __name__ == "__main__":
    main()
