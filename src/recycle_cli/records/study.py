"""Documents of `study` and `demo`."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from recycle_cli.records.document import Document, Part, Run, TaskRef
from recycle_cli.records.evaluation import PairedTest
from recycle_cli.records.selection import ScoredAdapter

ArmRole = Literal["base", "target", "recycled", "control", "rescaled", "single"]


class StudyTask(TaskRef):
    """A task of a study, with the rows of each run that are trained and validated on, and those
    that everything is scored on."""

    metric: str
    train_rows: int
    valid_rows: int
    test_rows: int


class StudyArm(Part):
    """What is compared: one way to get an adapter, the same on every task and with every seed.

    `name` is what tables call it, `label` what sentences do. `method` is that of `tune` or `merge`,
    null for the base model and for an adapter of the pool as it is; `selection` and `k` say which
    adapters it is given; `control` names the arm with random adapters in their place.
    """

    name: str
    label: str
    role: ArmRole
    method: str | None = None
    selection: str | None = None
    k: int | None = None
    with_target: bool = False
    settings: dict[str, Any] = Field(default_factory=dict)
    control: str | None = None


class StudyRow(Part):
    """One cell of a study: an arm (its name is `method`) on a task with a seed.

    `interval` is at 95 %, of the first metric; `path` is the adapter's folder where it was kept;
    `elapsed_s` is how long it took to make, without the selection and the target LoRA that others
    share; `scored_s` how long to score; `valid_loss` what its choice rested on, in nats.
    `target_share` is the target LoRA's part of the mean absolute coefficients, in [0, 1].
    """

    method: str
    task: str
    seed: int
    metrics: dict[str, float]
    interval: tuple[float, float]
    p_value_against_target: float | None = None
    path: str | None = None
    elapsed_s: float
    scored_s: float = 0.0
    valid_loss: float | None = None
    adapters: int = 0
    target_share: float | None = None
    peak_memory_bytes: int = 0


class StudyMean(Part):
    """An arm over all tasks, each counted alike; `interval` at 95 % is that of the bootstrap over
    tasks and their rows. `runs` counts cells."""

    method: str
    value: float
    interval: tuple[float, float]
    tasks: int
    runs: int


class Verdict(Part):
    """The answer in one sentence, and the figures that it rests on; `method` is the recycled arm
    that it is about, where it is about one; `notes` are sentences beside it."""

    kind: str
    sentence: str
    method: str | None = None
    figures: dict[str, float]
    notes: list[str] = Field(default_factory=list)


class StudyComparison(PairedTest):
    """An arm (its name is `method`) against another; on one task, or with null on all."""

    method: str
    task: str | None = None


class StudySelection(Part):
    """The ranking that the arms of a task and seed took their adapters from, best first; what it
    cost in passes of the model and in seconds."""

    task: str
    seed: int
    method: str
    adapters: list[ScoredAdapter]
    passes: int
    elapsed_s: float


class StudyFailure(Part):
    """A cell that failed, or whose selection or target LoRA did, and why."""

    method: str
    task: str
    seed: int
    error: str


class StudySource(Part):
    """An adapter of the pool that a study used, in so many cells, with its licence."""

    id: str
    revision: str | None = None
    sha256: str
    license: str | None = None
    cells: int


class StudyCells(Part):
    """How many cells were run, taken from earlier runs, or failed."""

    done: int
    reused: int
    failed: int


class StudyDocument(Document, Run):
    """The table of a study and its verdict.

    `rows` counts the training rows; `fast` says that it ran with less than it should for figures
    that are to be relied on; `adapter` is the folder of the tuned adapter with the lowest
    validation loss, controls apart: the one to take away. `metric` is what the comparisons are in;
    `settings` is the study's configuration in full.
    """

    kind: ClassVar[str] = "study"

    path: str
    name: str = "study"
    base_model: str
    rows: int
    fast: bool = False
    metric: str = "acc"
    verdict: Verdict
    adapter: str | None = None
    tasks: list[StudyTask] = Field(default_factory=list)
    arms: list[StudyArm] = Field(default_factory=list)
    table: list[StudyRow]
    means: list[StudyMean] = Field(default_factory=list)
    comparisons: list[StudyComparison] = Field(default_factory=list)
    selections: list[StudySelection] = Field(default_factory=list)
    failures: list[StudyFailure] = Field(default_factory=list)
    sources: list[StudySource] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)
    cells: StudyCells


class StudyPlanDocument(Document):
    """What a study would take, told by `--dry-run`.

    `runs` counts what has to be done: rankings, target LoRAs, adapters that are made and scored;
    `cells` the rows of its table, some of which are the same run, and `reused` the runs that are
    there already, null where the base model is not at hand to tell. `elapsed_s` is about how long
    the rest takes on this machine with the processes of `--jobs`, from steps measured with the
    cores of one, and null where there is nothing to measure on; `disk_bytes` about what it leaves
    on the disk.
    """

    kind: ClassVar[str] = "plan"

    name: str
    base_model: str
    tasks: list[str]
    missing_tasks: dict[str, str]
    arms: list[str]
    seeds: list[int]
    adapters: int | None = None
    cells: int
    runs: int
    reused: int | None = None
    elapsed_s: float | None = None
    disk_bytes: int | None = None
    notes: list[str] = Field(default_factory=list)


class StudyCoefficients(Part):
    """Where the coefficients of a mixture went: `values[g][i]` is the mean absolute one of adapter
    i in group g, after the activation; the target LoRA, where there is one, is the last."""

    method: str
    task: str
    seed: int
    groups: list[str]
    adapters: list[str]
    values: list[list[float]]


class StudyResults(Document):
    """All that a study's report is made of: its file results.json."""

    kind: ClassVar[str] = "results"

    study: StudyDocument
    coefficients: list[StudyCoefficients] = Field(default_factory=list)
