"""`recycle demo`: the whole pipeline on real adapters, for a task that none of them has seen."""

import contextlib
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError, RecycleError, unknown_name
from recycle_cli.evaluation.tasks import Task, load_task
from recycle_cli.evaluation.verdict import Arm, Decision, Role, decide
from recycle_cli.progress import Progress
from recycle_cli.records import (
    AdapterDocument,
    EvaluationDocument,
    MergeDocument,
    SelectionDocument,
    StudyCells,
    StudyDocument,
    StudyRow,
    TuneDocument,
)
from recycle_cli.settings import Settings
from recycle_cli.workflows.adapters import Source, resolve_documents
from recycle_cli.workflows.crawl import crawl
from recycle_cli.workflows.crawl_request import CrawlRequest
from recycle_cli.workflows.evaluate import EvalRequest, Evaluated, evaluate
from recycle_cli.workflows.index import update_index
from recycle_cli.workflows.merge import merge
from recycle_cli.workflows.merge_request import MergeRequest
from recycle_cli.workflows.output_folder import RECORD_FILE, write_record
from recycle_cli.workflows.provenance import Clock, shown
from recycle_cli.workflows.select import pool_of, select
from recycle_cli.workflows.select_request import SelectRequest
from recycle_cli.workflows.tune import tune
from recycle_cli.workflows.tune_request import LoraShape, Reinit, TuneRequest

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel

# The tasks of examples/tasks that no adapter of examples/pool was trained on.
HELD_OUT = (
    "hotel_reviews",
    "travel_desk",
    "work_places",
    "is_or_are",
    "past_forms",
    "find_name",
    "find_city",
    "larger_counts",
)
SELECTION_FILE = "selection.json"


class Method(StrEnum):
    """The methods that the demo compares, as its table names them."""

    BASE = "base"
    TARGET = "target"
    AVERAGE = "average"
    RECYCLED = "recycled"
    RECYCLED_TARGET = "recycled+target"
    CONTROL = "control"
    CONTROL_TARGET = "control+target"
    RESCALED = "rescaled-target"


WITH_TARGET = " with the target LoRA"
ARMS = (
    Arm(Method.BASE, "the base model", Role.BASE),
    Arm(Method.TARGET, "the target LoRA", Role.TARGET),
    Arm(Method.AVERAGE, "the plain average of the recycled adapters", Role.RECYCLED),
    Arm(Method.RECYCLED, "recycled adapters", Role.RECYCLED, Method.CONTROL),
    Arm(
        Method.RECYCLED_TARGET,
        f"recycled adapters{WITH_TARGET}",
        Role.RECYCLED,
        Method.CONTROL_TARGET,
        has_target=True,
    ),
    Arm(Method.CONTROL, "random adapters", Role.CONTROL),
    Arm(Method.CONTROL_TARGET, f"random adapters{WITH_TARGET}", Role.CONTROL, has_target=True),
    Arm(Method.RESCALED, "the target LoRA rescaled alone", Role.RESCALED, has_target=True),
)


@dataclass(frozen=True)
class Extent:
    """How much the demo does.

    Args:
        rows: training rows of the task used, validation rows included.
        test_rows: test rows scored, or None for all.
        k: adapters selected.
        lora_steps: optimizer steps of the target LoRA.
        steps: optimizer steps of every mixture.
        eval_every: steps between two validations.
    """

    rows: int
    test_rows: int | None
    k: int
    lora_steps: int
    steps: int
    eval_every: int


FULL = Extent(rows=100, test_rows=None, k=5, lora_steps=30, steps=30, eval_every=10)
# The LoRA gets more steps than the mixtures: with as few, it learns nothing, and any rival wins.
FAST = Extent(rows=40, test_rows=80, k=3, lora_steps=20, steps=8, eval_every=4)
# A small LoRA that learns the example tasks within the steps above.
TARGET_SHAPE = LoraShape(rank=8, alpha=16, dropout=0.0)
TARGET_LR = 2e-3


@dataclass(frozen=True)
class DemoRequest:
    """What to show.

    Args:
        out: the folder to write.
        base_model: the canonical name of the base model, that of the example adapters.
        task: one of `HELD_OUT`.
        fast: fewer rows, adapters and steps.
        seed: of everything drawn.
        force: replace what an earlier demo wrote to `out`.
    """

    out: Path
    base_model: str
    task: str = HELD_OUT[0]
    fast: bool = False
    seed: int = 0
    force: bool = False

    @property
    def extent(self) -> Extent:
        """How much it does."""
        return FAST if self.fast else FULL

    def command(self) -> list[str]:
        """The command line that asks for the same."""
        words = ["recycle", "demo", "--task", self.task, "--seed", str(self.seed)]
        return [*words, *["--fast"] * self.fast, "--out", shown(self.out)]


def examples_folder() -> Path:
    """The folder with the example pool and tasks: installed with the package, or in the checkout.

    Raises:
        RecycleError: it is in neither place.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "examples", package.parents[1] / "examples"):
        if (folder / "pool").is_dir() and (folder / "tasks").is_dir():
            return folder
    raise RecycleError(
        "the example adapters and tasks are not installed", "run it from a checkout: make demo"
    )


def check_demo(request: DemoRequest) -> None:
    """Checks, before anything is loaded, that the demo can run.

    Raises:
        InputError: the task is unknown, or `out` holds something.
        RecycleError: the examples are not installed.
    """
    if request.task not in HELD_OUT:
        raise unknown_name("demo task", request.task, HELD_OUT)
    examples_folder()
    out = request.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "name a folder with --out")
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    foreign = there - {SELECTION_FILE, RECORD_FILE, *Method}
    if there and not request.force:
        raise InputError(f"{out} exists", "name another folder with --out, or replace it: --force")
    if foreign:
        raise InputError(
            f"{out} holds {sorted(foreign)[0]!r}, which no demo wrote",
            "name another folder with --out",
        )


@contextlib.contextmanager
def _making(out: Path) -> Iterator[None]:
    """Sets what an earlier demo wrote aside, and puts it back when this one fails."""
    beside = out.absolute().with_name(f".{out.name}.old")
    earlier = out.exists()
    if earlier:
        shutil.rmtree(beside, ignore_errors=True)
        out.rename(beside)
    try:
        out.mkdir(parents=True)
        yield
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        if earlier:
            beside.rename(out)
        raise
    shutil.rmtree(beside, ignore_errors=True)


def demo(
    request: DemoRequest, settings: Settings, base: "BaseModel", progress: Progress
) -> StudyDocument:
    """Runs the commands' workflows in order: crawl, index, select, merge, tune, eval.

    Raises:
        InputError: as `check_demo`.
        RecycleError: a stage failed; `out` is as it was.
    """
    clock = Clock()
    check_demo(request)
    task = load_task(str(examples_folder() / "tasks" / request.task))
    run = _Demo(request, settings, base, progress, task)
    with _making(request.out):
        chosen = run.choose(run.find_pool())
        write_record(request.out / SELECTION_FILE, chosen)
        run.make_all(resolve_documents([chosen], settings))
        document = run.conclude(run.score(), clock)
        write_record(request.out / RECORD_FILE, document)
    return document


@dataclass
class _Demo:
    """A demo under way, and the adapters that it has made so far."""

    request: DemoRequest
    settings: Settings
    base: "BaseModel"
    progress: Progress
    task: Task
    made: dict[Method, MergeDocument | TuneDocument] = field(default_factory=dict)

    def find_pool(self) -> list[Source]:
        """Crawls the example pool and brings the index up to date."""
        asked = CrawlRequest(examples_folder() / "pool", self.request.base_model)
        self._announce("Find adapters: vet every one, keep the good ones.", asked.command())
        documents = crawl(asked, self.settings, self.base.shapes, self.progress)
        found = {d.sha256 for d in documents if isinstance(d, AdapterDocument)}
        self._announce("Bring the index up to date.", ["recycle", "index"])
        update_index(self.settings, self.progress)
        pool = pool_of(self.request.base_model, self.settings)
        return [source for source in pool if source.ref.sha256 in found]

    def choose(self, pool: Sequence[Source]) -> SelectionDocument:
        """Selects adapters by how well they do the task as they are."""
        extent = self.request.extent
        request = SelectRequest(
            self.task,
            self.request.base_model,
            method="evaluation",
            k=extent.k,
            seed=self.request.seed,
            rows=extent.rows,
        )
        title = f"Select the {extent.k} adapters that do the task best as they are."
        self._announce(title, request.command(pool))
        return select(request, pool, self.base, self.settings, self.progress)

    def make_all(self, chosen: Sequence[Source]) -> None:
        """Makes every adapter that the verdict compares."""
        target = self._tune(Method.TARGET, "Train a LoRA from scratch on the same examples.")
        self._average(chosen)
        merge_title = "Merge the selected adapters adaptively"
        self._tune(Method.RECYCLED, f"{merge_title}.", chosen)
        self._tune(Method.RECYCLED_TARGET, f"{merge_title}, beside the LoRA.", chosen, target)
        control = "Control: the same with random adapters"
        self._tune(Method.CONTROL, f"{control}.", chosen, reinit="experts")
        self._tune(Method.CONTROL_TARGET, f"{control}, beside the LoRA.", chosen, target, "experts")
        self._tune(Method.RESCALED, "Control: rescale the LoRA alone.", target=target)

    def score(self) -> Evaluated:
        """Scores everything on the same test rows."""
        request = EvalRequest(
            (self.task,),
            self.request.base_model,
            baseline=Method.TARGET,
            rows=self.request.extent.test_rows,
        )
        sources = [self._source(method) for method in self.made]
        self._announce("Score them all on rows that none has seen.", request.command(sources))
        return evaluate(request, sources, self.base, self.progress)

    def conclude(self, evaluated: Evaluated, clock: Clock) -> StudyDocument:
        """The table and the verdict."""
        correct: dict[str, list[bool]] = {}
        for sample in evaluated.samples:
            correct.setdefault(sample.adapter, []).append(sample.correct)
        decision = decide(
            {method: {self.task.name: flags} for method, flags in correct.items()},
            ARMS,
            metric=self.task.metric,
            examples=self.request.extent.rows,
            seed=self.request.seed,
        )
        rows = [self._row(document, decision) for document in evaluated.documents]
        return StudyDocument(
            path=str(self.request.out.absolute()),
            base_model=self.request.base_model,
            rows=self.request.extent.rows,
            fast=self.request.fast,
            verdict=decision.verdict,
            adapter=self._best(),
            table=rows,
            cells=StudyCells(done=len(rows), reused=0, failed=0),
            **clock.fields(self.request.seed, self.request.command()),
        )

    def _best(self) -> str:
        """The tuned adapter with the lowest validation loss; test rows have no say in it."""
        candidates = (Method.TARGET, Method.RECYCLED, Method.RECYCLED_TARGET)
        tuned = [d for m in candidates if isinstance(d := self.made[m], TuneDocument)]
        return min(tuned, key=lambda document: document.best.valid_loss).path

    def _row(self, document: EvaluationDocument, decision: Decision) -> StudyRow:
        adapter = document.adapter
        method = Method(adapter if isinstance(adapter, str) else adapter.id)
        test = decision.tests.get((method, Method.TARGET))
        made = self.made.get(method)
        return StudyRow(
            method=method,
            task=self.task.name,
            seed=self.request.seed,
            metrics=document.metrics,
            interval=document.interval[self.task.metric],
            p_value_against_target=test.p_value if test else None,
            path=made.path if made else None,
            elapsed_s=made.elapsed_s if made else 0.0,
        )

    def _average(self, chosen: Sequence[Source]) -> None:
        out = self.request.out / Method.AVERAGE
        request = MergeRequest(self.request.base_model, out)
        self._announce("Average the selected adapters, without data.", request.command(chosen))
        self.made[Method.AVERAGE] = merge(request, chosen, self.settings, self.progress)

    def _tune(
        self,
        method: Method,
        title: str,
        chosen: Sequence[Source] = (),
        target: Source | None = None,
        reinit: Reinit = "none",
    ) -> Source:
        mixes = bool(chosen or target)
        extent = self.request.extent
        request = TuneRequest(
            self.task,
            self.request.base_model,
            self.request.out / method,
            method=("recycle" if chosen else "rescale") if mixes else "lora",
            rows=extent.rows,
            pace={
                "steps": extent.steps if mixes else extent.lora_steps,
                "eval_every": extent.eval_every,
                **({} if mixes else {"lr": TARGET_LR}),
            },
            lora=LoraShape() if mixes else TARGET_SHAPE,
            reinit=reinit,
            seed=self.request.seed,
        )
        self._announce(title, request.command(chosen, target))
        self.made[method] = tune(request, chosen, target, self.base, self.progress)
        return self._source(method)

    def _announce(self, title: str, command: Sequence[str]) -> None:
        self.progress.message(f"\n{title}\n$ {shlex.join(command)}")

    def _source(self, method: Method) -> Source:
        (source,) = resolve_documents([self.made[method]], self.settings)
        return source
