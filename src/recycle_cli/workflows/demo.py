"""`recycle demo`: a small study on real adapters, for a task that none of them has seen."""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recycle_cli.errors import InputError, RecycleError, unknown_name
from recycle_cli.progress import Progress
from recycle_cli.records import AdapterDocument, StudyDocument
from recycle_cli.settings import Settings
from recycle_cli.workflows.crawl import crawl
from recycle_cli.workflows.crawl_request import CrawlRequest
from recycle_cli.workflows.index import update_index
from recycle_cli.workflows.study import FILES, StudyRequest, check_study, study
from recycle_cli.workflows.study_config import StudyConfig, config_of
from recycle_cli.workflows.tune_request import LoraShape

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
        out: the folder to write; one that an earlier demo began goes on.
        base_model: the canonical name of the base model, that of the example adapters.
        task: one of `HELD_OUT`.
        fast: fewer rows, adapters and steps.
        seed: of everything drawn.
        force: begin anew where an earlier demo wrote to `out`.
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

    def config(self) -> StudyConfig:
        """The study that it runs."""
        extent = self.extent
        fields = {
            "name": self.task,
            "base_model": self.base_model,
            "tasks": [str(examples_folder() / "tasks" / self.task)],
            "pool": {"folder": str(examples_folder() / "pool")},
            "rows": extent.rows,
            "test_rows": extent.test_rows,
            "seeds": [self.seed],
            "target": {
                "rank": TARGET_SHAPE.rank,
                "alpha": TARGET_SHAPE.alpha,
                "dropout": TARGET_SHAPE.dropout,
                "lr": TARGET_LR,
                "steps": extent.lora_steps,
                "eval_every": extent.eval_every,
            },
            "pace": {"steps": extent.steps, "eval_every": extent.eval_every},
            "grid": [{"methods": ["recycle", "average"], "k": [extent.k]}],
            "keep": "all",
            "fast": self.fast,
        }
        return config_of(fields, "the demo")


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
        InputError: the task is unknown, or `out` holds what no demo wrote.
        RecycleError: the examples are not installed.
    """
    if request.task not in HELD_OUT:
        raise unknown_name("demo task", request.task, HELD_OUT)
    examples_folder()
    out = request.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "name a folder with --out")
    foreign = {path.name for path in out.iterdir()} - FILES if out.exists() else set()
    if foreign:
        raise InputError(
            f"{out} holds {sorted(foreign)[0]!r}, which no demo wrote",
            "name another folder with --out",
        )


def demo(request: DemoRequest, settings: Settings, progress: Progress) -> StudyDocument:
    """Crawls the example pool, then compares recycling with its controls in a study.

    Raises:
        InputError: as `check_demo`.
        RecycleError: a stage failed; what was finished is taken the next time.
    """
    check_demo(request)
    if request.force:
        shutil.rmtree(request.out, ignore_errors=True)
    _crawl(request, settings, progress)
    asked = StudyRequest(request.config(), request.out)
    title = "Select adapters, merge them, train a LoRA, run the controls, score, compare."
    _announce(title, asked.command(), progress)
    return study(asked, check_study(asked, settings), settings, progress).study


def _crawl(request: DemoRequest, settings: Settings, progress: Progress) -> None:
    from recycle_cli.engine.base_model import linear_shapes

    asked = CrawlRequest(examples_folder() / "pool", request.base_model)
    _announce("Find adapters: vet every one, keep the good ones.", asked.command(), progress)
    shapes = linear_shapes(request.base_model, settings)
    found = [d for d in crawl(asked, settings, shapes, progress) if isinstance(d, AdapterDocument)]
    usable = sum(document.status == "accepted" for document in found)
    progress.message(f"{usable} of {len(found)} can be used")
    _announce("Bring the index up to date.", ["recycle", "index"], progress)
    update_index(settings, progress)


def _announce(title: str, command: Sequence[str], progress: Progress) -> None:
    progress.message(f"\n{title}\n$ {shlex.join(command)}")
