"""What comes of each way to train a target LoRA: all with as many steps on real tasks of the folder
that RECYCLE_DATA names, scored on the same test rows and compared row by row.

It goes on where it was. Several processes may each take some of the seeds or ways.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TypedDict

from bench.pages import DOCS, write_table
from bench.target import USUAL, given_by, way_names
from bench.timing import machine
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.evaluation.comparison import compare, with_holm
from recycle_cli.evaluation.tasks import Task, load_task
from recycle_cli.lora.base_names import EMBEDDED_NAME
from recycle_cli.progress import Silent
from recycle_cli.records import AdapterRef, PairedTest, TuneDocument
from recycle_cli.settings import read_settings
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.answers import answer_rows
from recycle_cli.workflows.output_folder import RECORD_FILE
from recycle_cli.workflows.tune import tune
from recycle_cli.workflows.tune_request import TuneRequest

TASKS = ("trec", "snips", "hwu64_scenario")
SEEDS = (0, 1)
PRESET, TRAIN_ROWS, TEST_ROWS = "small", 100, 200
STEPS = 40


@dataclass(frozen=True)
class Cell:
    """One training: an option, or the ordinary way, on a task with a seed."""

    name: str
    task: str
    seed: int

    def place(self, work: Path) -> Path:
        """Its folder."""
        return work / self.task / f"seed{self.seed}" / self.name


class Result(TypedDict):
    """What came of one: the scores of the test rows, and the best validation loss."""

    scores: list[float]
    valid_loss: float


def cells(seeds: Sequence[int]) -> Iterator[Cell]:
    """All of them with these seeds; the ordinary way first."""
    for name in way_names():
        for task in TASKS:
            yield from (Cell(name, task, seed) for seed in seeds)


def run(work: Path, wanted: Iterable[Cell]) -> None:
    """Trains and scores what is not there yet; a killed training goes on from where it was."""
    base = load_base_model(EMBEDDED_NAME, read_settings())
    for cell in wanted:
        scores = cell.place(work).with_suffix(".json")
        if not scores.exists():
            if not (cell.place(work) / RECORD_FILE).exists():
                pace = {"steps": STEPS, "patience": STEPS}
                asked = request(cell.name, cell.task, cell.place(work), cell.seed, pace)
                tune(asked, (), None, base, Silent())
            beside = scores.with_suffix(".new")
            beside.write_text(json.dumps(_scored(cell, work, base)), encoding="utf-8")
            beside.replace(scores)
            print(f"{cell.name} on {cell.task}, seed {cell.seed}", flush=True)


def request(way: str, task: str, out: Path, seed: int, pace: Mapping[str, Any]) -> TuneRequest:
    """To train a LoRA in that way on a task by its name; goes on where it was killed."""
    return TuneRequest(
        task=_task(task),
        base_model=EMBEDDED_NAME,
        out=out,
        method="lora",
        parameters=given_by(way),
        preset=PRESET,
        pace=pace,
        rows=TRAIN_ROWS,
        seed=seed,
        resume=True,
    )


def _task(name: str) -> Task:
    return load_task(str(Path(os.environ["RECYCLE_DATA"]) / "tasks" / name))


def _scored(cell: Cell, work: Path, base: BaseModel) -> Result:
    """What came of a training."""
    folder, task = cell.place(work), _task(cell.task)
    text = (folder / RECORD_FILE).read_text(encoding="utf-8")
    record = TuneDocument.model_validate_json(text)
    ref = AdapterRef(id=cell.name, sha256=record.sha256, path=str(folder))
    update = Source(ref).load_to_score(EMBEDDED_NAME)
    answers = answer_rows(base, update, task.test[:TEST_ROWS], task.metric, Silent())
    return {
        "scores": [float(right) for right in answers.correct],
        "valid_loss": record.best.valid_loss,
    }


Results = Mapping[str, Sequence[Result]]
"""Those of one way: by task, seed by seed."""


def found(work: Path, seeds: Sequence[int]) -> dict[str, Results]:
    """Every way whose results with these seeds are all there."""
    ways: dict[str, dict[str, list[Result]]] = {}
    for cell in cells(seeds):
        file = cell.place(work).with_suffix(".json")
        if file.exists():
            result: Result = json.loads(file.read_text(encoding="utf-8"))
            ways.setdefault(cell.name, {}).setdefault(cell.task, []).append(result)
    return {
        name: tasks
        for name, tasks in ways.items()
        if all(len(tasks.get(task, ())) == len(seeds) for task in TASKS)
    }


def table(work: Path, seeds: Sequence[int]) -> Iterator[str]:
    """The Markdown of what is there: accuracy, and what differs from the ordinary way."""
    ways = found(work, seeds)
    usual = ways.pop(USUAL, None)
    if usual is None:
        yield "The ordinary way has not been run on all tasks and seeds yet."
        return
    tests = with_holm(
        [
            compare(_scores(one), _scores(usual), baseline_name=USUAL, metric="acc")
            for one in ways.values()
        ]
    )
    yield f"| way | {' | '.join(TASKS)} | mean | difference | adjusted p | validation loss |"
    yield "|---|" + "---|" * (len(TASKS) + 4)
    yield _row(USUAL, usual, None)
    for (name, one), test in zip(ways.items(), tests, strict=True):
        yield _row(name, one, test)
    yield (
        f"\nAccuracy in %, {len(seeds)} seed{'s' * (len(seeds) > 1)} (the mean of each in "
        "brackets); the difference of the means in points, with an interval of 95 % over tasks and "
        "rows; p by a test over rows, which speaks of these adapters alone, by Holm over the "
        f"{len(ways)} of them; the mean of the best validation losses. {STEPS} steps of "
        f"`--preset {PRESET}`, {TRAIN_ROWS} rows to learn from, a fifth of them for validation, "
        f"{TEST_ROWS} test rows a task. {machine()}"
    )


def _scores(results: Results) -> dict[str, list[list[float]]]:
    """By task, (seeds, rows)."""
    return {task: [one["scores"] for one in seeds] for task, seeds in results.items()}


def _row(name: str, results: Results, test: PairedTest | None) -> str:
    scores = _scores(results)
    by_task = [mean(map(mean, seeds)) for seeds in scores.values()]
    by_seed = [mean(map(mean, tasks)) for tasks in zip(*scores.values(), strict=True)]
    each = f" ({', '.join(f'{100 * one:.1f}' for one in by_seed)})" if len(by_seed) > 1 else ""
    difference = p_value = "-"
    if test:
        low, high = test.interval
        difference = f"{100 * test.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        p = test.p_value if test.adjusted_p_value is None else test.adjusted_p_value
        p_value = f"{p:.3f}" if p >= 0.001 else "< 0.001"
    cells = (
        name,
        *(f"{100 * one:.1f}" for one in by_task),
        f"{100 * mean(by_task):.1f}{each}",
        difference,
        p_value,
        f"{mean(one['valid_loss'] for seeds in results.values() for one in seeds):.3f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Runs what is asked for and not there yet, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = way_names()
    parser.add_argument("--work", type=Path, required=True, help="where results are kept")
    parser.add_argument("--option", action="append", choices=names, default=[], help="only these")
    parser.add_argument(
        "--seed", action="append", type=int, choices=SEEDS, default=[], help="only these"
    )
    parser.add_argument("--tables", action="store_true", help="run nothing")
    parser.add_argument("--write", action="store_true", help="keep the table in docs")
    options = parser.parse_args()
    ways, seeds = options.option or names, options.seed or SEEDS
    if not options.tables:
        run(options.work, [cell for cell in cells(seeds) if cell.name in ways])
    text = "\n".join(table(options.work, seeds))
    print(text)
    if options.write:
        write_table(DOCS / "target-lora.md", "results", text)


if __name__ == "__main__":
    main()
