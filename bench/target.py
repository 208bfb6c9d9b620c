"""The ways to train a target LoRA beside AdamW's on an ordinary one, on the embedded model.

What a step costs, in turns; with --work, what comes of equal steps on real tasks: it goes on where
it was. `python -m bench.target --help` says more.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bench.timing import Measured, machine, measure
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.training import Parameters, TrainingPlan
from recycle_cli.evaluation.comparison import compare, with_holm
from recycle_cli.evaluation.tasks import Task, load_task
from recycle_cli.lora.base_names import EMBEDDED_NAME
from recycle_cli.lora.draws import generator_for
from recycle_cli.progress import Silent
from recycle_cli.records import AdapterRef, PairedTest, TuneDocument
from recycle_cli.settings import read_settings
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.lora_catalog import AXES, OPTIONS, LoraOption, lora_pace
from recycle_cli.tuning.lora_form import LoraForm, Setup, former_of, train_form
from recycle_cli.tuning.target_lora import LoraRecipe
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.answers import answer_rows
from recycle_cli.workflows.output_folder import RECORD_FILE
from recycle_cli.workflows.tune import tune
from recycle_cli.workflows.tune_request import TuneRequest

HEADER = (
    "| option | seconds a step | times AdamW's | memory beyond the model | times AdamW's "
    "| numbers trained | optimizer's numbers for each |\n|---|---|---|---|---|---|---|"
)
RECIPE = LoraRecipe(rank=16, alpha=32, dropout=0.0)
ROWS, PROMPT, ANSWER = 8, 120, 8
STEPS, TURNS = 5, 2
USUAL = "adamw"

TASKS = ("trec", "snips", "customer_reviews")
SEEDS = (0, 1)
TRAIN_ROWS, TEST_ROWS = 100, 200
RESULT_STEPS = 40


def unusual() -> list[LoraOption]:
    """All that the catalog offers beside the ordinary."""
    return [option for option in OPTIONS.values() if option.name != AXES[option.axis]]


# --- what a step costs ---------------------------------------------------------------------------


class Stopwatch(Silent):
    """A progress that notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def advance(self, note: str = "") -> None:
        """Notes it."""
        self.ends.append(time.perf_counter())

    def steps(self) -> list[float]:
        """Seconds of each step but the first, in which kernels are made ready."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


@dataclass
class Cost:
    """What trainings of one kind took, turn by turn: the seconds of their steps, and the memory
    that each turn held at most beyond the model."""

    seconds: list[float] = field(default_factory=list)
    turns: list[Measured] = field(default_factory=list)
    trained: int = 0
    kept: int = 0

    @property
    def step(self) -> float:
        """The median step."""
        return statistics.median(self.seconds)

    @property
    def memory(self) -> int:
        """The largest turn's, in bytes."""
        return max(turn.extra_bytes for turn in self.turns)


@dataclass(frozen=True)
class Beside:
    """An option's cost and AdamW's, measured in turns."""

    name: str
    ours: Cost
    usual: Cost

    def row(self) -> str:
        """A row of the table."""
        ours, usual = self.ours, self.usual
        seconds = ours.seconds
        cells = (
            self.name,
            f"{ours.step:.3g} ({min(seconds):.3g} to {max(seconds):.3g})",
            f"{ours.step / usual.step:.2f}",
            f"{ours.memory / 1e6:,.0f} MB",
            f"{ours.memory / usual.memory:.2f}",
            f"{ours.trained:,}",
            f"{ours.kept / ours.trained:.2f}",
        )
        return f"| {' | '.join(cells)} |"


def comparisons(names: Sequence[str] = ()) -> Iterator[Beside]:
    """Every option of the catalog, or some, each with AdamW on an ordinary LoRA in turns."""
    base = load_base_model(EMBEDDED_NAME, read_settings())
    for option in unusual():
        if not names or option.name in names:
            ours, usual = Cost(), Cost()
            for _ in range(TURNS):
                _turn(base, {}, usual)
                _turn(base, {option.axis: option.name}, ours)
            yield Beside(f"--{option.axis} {option.name}", ours, usual)


def _turn(base: BaseModel, given: Mapping[str, str], cost: Cost) -> None:
    """Trains for some steps on rows of random tokens."""
    watch = Stopwatch()
    cost.turns.append(measure(functools.partial(_train, base, given, cost, watch)))
    cost.seconds += watch.steps()


def _train(base: BaseModel, given: Mapping[str, str], cost: Cost, watch: Stopwatch) -> None:
    pace = {"lr": 1e-5, **lora_pace(given)}
    plan = TrainingPlan(steps=STEPS, eval_every=STEPS + 1, batch_size=ROWS, **pace)
    rows = _rows()
    settings = METHODS["lora"].settings(given, target=False)
    with former_of(settings)(Setup(base, RECIPE, plan, rows)) as form:
        made: list[torch.optim.Optimizer] = []
        noted = _noting(form, made)
        # The last step is validated; one short row keeps that out of the way.
        train_form(Setup(base, RECIPE, plan, rows), noted, rows[:1], plan, watch)
        cost.trained = sum(p.numel() for p in form.parameters.values() if p.requires_grad)
        states = made[0].state_dict()["state"].values()
        tensors = [value for state in states for value in state.values()]
        cost.kept = sum(value.numel() for value in tensors if isinstance(value, torch.Tensor))


def _noting(form: LoraForm, made: list[torch.optim.Optimizer]) -> LoraForm:
    """The form, with its optimizer put on a list."""

    def optimizer(parameters: Parameters, plan: TrainingPlan) -> torch.optim.Optimizer:
        made.append(form.hooks.optimizer(parameters, plan))
        return made[-1]

    return replace(form, hooks=replace(form.hooks, optimizer=optimizer))


def _rows() -> list[Example]:
    """Rows of random tokens that share no beginning."""
    generator = generator_for("bench", "rows")
    tokens = torch.randint(5, 40_000, (ROWS, PROMPT + ANSWER), generator=generator).tolist()
    return [Example(tuple(row[:PROMPT]), tuple(row[PROMPT:])) for row in tokens]


# --- what comes of it ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One training: an option, or the ordinary way, on a task with a seed."""

    name: str
    given: Mapping[str, str]
    task: str
    seed: int

    def place(self, work: Path) -> Path:
        """Its folder."""
        return work / self.task / f"seed{self.seed}" / self.name


def cells() -> Iterator[Cell]:
    """All of them; the ordinary way first."""
    ways = {USUAL: {}, **{option.name: {option.axis: option.name} for option in unusual()}}
    for name, given in ways.items():
        for task in TASKS:
            yield from (Cell(name, given, task, seed) for seed in SEEDS)


def run(work: Path, steps: int, sweep: bool, wanted: Iterable[Cell]) -> None:
    """Trains and scores what is not there yet; a killed training goes on from where it was."""
    base = load_base_model(EMBEDDED_NAME, read_settings())
    for cell in wanted:
        scores = cell.place(work).with_suffix(".json")
        if not scores.exists():
            if not (cell.place(work) / RECORD_FILE).exists():
                tune(_request(cell, work, steps, sweep), (), None, base, Silent())
            beside = scores.with_suffix(".new")
            beside.write_text(json.dumps(_scored(cell, work, base)), encoding="utf-8")
            beside.replace(scores)
            print(f"{cell.name} on {cell.task}, seed {cell.seed}", flush=True)


def _request(cell: Cell, work: Path, steps: int, sweep: bool) -> TuneRequest:
    return TuneRequest(
        task=_task(cell),
        base_model=EMBEDDED_NAME,
        out=cell.place(work),
        method="lora",
        parameters=cell.given,
        preset="small",
        pace={"steps": steps, "patience": steps},
        auto=("lr",) if sweep else (),
        rows=TRAIN_ROWS,
        seed=cell.seed,
        resume=True,
    )


def _task(cell: Cell) -> Task:
    return load_task(str(Path(os.environ["RECYCLE_DATA"]) / "tasks" / cell.task))


def _scored(cell: Cell, work: Path, base: BaseModel) -> dict[str, object]:
    """The scores of the test rows, and what the training's record says."""
    folder, task = cell.place(work), _task(cell)
    text = (folder / RECORD_FILE).read_text(encoding="utf-8")
    record = TuneDocument.model_validate_json(text)
    ref = AdapterRef(id=cell.name, sha256=record.sha256, path=str(folder))
    update = Source(ref).load_to_score(EMBEDDED_NAME)
    answers = answer_rows(base, update, task.test[:TEST_ROWS], task.metric, Silent())
    return {
        "scores": [float(right) for right in answers.correct],
        "valid_loss": record.best.valid_loss,
        "steps": record.settings["steps"],
        "elapsed_s": record.elapsed_s,
        "peak_memory_bytes": record.peak_memory_bytes,
    }


@dataclass(frozen=True)
class Found:
    """The cells of one way that are there: by task, (seeds, rows) of scores; and each record."""

    scores: Mapping[str, list[list[float]]]
    records: Sequence[Mapping[str, float]]


def found(work: Path) -> dict[str, Found]:
    """Every way whose cells are all there."""
    ways: dict[str, dict[str, list[dict[str, object]]]] = {}
    for cell in cells():
        file = cell.place(work).with_suffix(".json")
        if file.exists():
            record = json.loads(file.read_text(encoding="utf-8"))
            ways.setdefault(cell.name, {}).setdefault(cell.task, []).append(record)
    return {
        name: Found(
            {task: [one["scores"] for one in records] for task, records in tasks.items()},  # type: ignore[misc]
            [one for records in tasks.values() for one in records],  # type: ignore[misc]
        )
        for name, tasks in ways.items()
        if all(len(tasks.get(task, ())) == len(SEEDS) for task in TASKS)
    }


def tables(work: Path) -> Iterator[str]:
    """The Markdown of what is there: accuracy, and what differs from the ordinary way."""
    ways = found(work)
    usual = ways.pop(USUAL, None)
    if usual is None:
        yield "The ordinary way has not been run on all tasks and seeds yet."
        return
    tests = with_holm(
        [
            compare(one.scores, usual.scores, baseline_name=USUAL, metric="acc")
            for one in ways.values()
        ]
    )
    yield "| way | accuracy | difference | adjusted p | validation loss | seconds | peak memory |"
    yield "|---|---|---|---|---|---|---|"
    yield _row(USUAL, usual, None)
    for (name, one), test in zip(ways.items(), tests, strict=True):
        yield _row(name, one, test)
    yield (
        f"\nTasks {', '.join(TASKS)}; {len(SEEDS)} seeds, {TRAIN_ROWS} rows to learn from, "
        f"{TEST_ROWS} test rows; {int(usual.records[0]['steps'])} steps. {machine()}"
    )


def _row(name: str, found: Found, test: PairedTest | None) -> str:
    by_task = [statistics.mean(map(statistics.mean, runs)) for runs in found.scores.values()]
    difference = p_value = "-"
    if test:
        low, high = test.interval
        difference = f"{100 * test.difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        p_value = f"{test.p_value if test.adjusted_p_value is None else test.adjusted_p_value:.3f}"
    cells = (
        name,
        f"{100 * statistics.mean(by_task):.1f} %",
        difference,
        p_value,
        f"{statistics.mean(record['valid_loss'] for record in found.records):.3f}",
        f"{statistics.median(record['elapsed_s'] for record in found.records):.0f}",
        f"{max(record['peak_memory_bytes'] for record in found.records) / 1e9:.2f} GB",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [USUAL, *(option.name for option in unusual())]
    parser.add_argument("--option", action="append", choices=names, default=[], help="only these")
    parser.add_argument("--work", type=Path, help="where results are kept")
    parser.add_argument("--steps", type=int, default=RESULT_STEPS, help="of each training")
    parser.add_argument("--sweep", action="store_true", help="find each one's rate first")
    parser.add_argument(
        "--seed", action="append", type=int, choices=SEEDS, default=[], help="only these"
    )
    parser.add_argument("--tables", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if options.work:
        if not options.tables:
            ways, seeds = options.option or names, options.seed or SEEDS
            wanted = [cell for cell in cells() if cell.name in ways and cell.seed in seeds]
            run(options.work, options.steps, options.sweep, wanted)
        print("\n".join(tables(options.work)))
        return
    print(HEADER)
    for one in comparisons(options.option):
        print(one.row(), flush=True)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
