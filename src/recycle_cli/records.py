"""The JSON documents that commands print and read: the contract, and nothing else.

Every document is one line of JSON whose first field is `schema`, as in `recycle.merge/1`. Fields
may be added under the same major; readers ignore fields they do not know and refuse majors they
do not know. Sizes are in bytes and durations in seconds, as the field names say.
"""

import json
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recycle_cli.errors import InputError


class Part(BaseModel):
    """A piece of a document. Immutable; unknown fields are ignored, NaN is refused."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Document(Part):
    """A whole document: one line of JSON with its schema in front."""

    kind: ClassVar[str]
    major: ClassVar[int] = 1

    @classmethod
    def schema_name(cls) -> str:
        """The value of the `schema` field, as in `recycle.merge/1`."""
        return f"recycle.{cls.kind}/{cls.major}"

    def to_line(self) -> str:
        """One line of JSON, without the line break."""
        fields = {"schema": self.schema_name(), **self.model_dump(mode="json")}
        return json.dumps(fields, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_fields(cls, fields: dict[str, Any], where: str) -> Self:
        """The document held by a parsed line.

        Raises:
            InputError: a field is missing or has the wrong type; `where` names the line.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(step) for step in first["loc"])
            raise InputError(
                f"{where}: {cls.schema_name()} has a bad field {field!r}: {first['msg']}",
                "pass the line on as the command printed it",
            ) from error


# --- parts that several documents share -----------------------------------------------------


class AdapterRef(Part):
    """An adapter by identity.

    `revision` is the Hub commit, null for a folder; `sha256` is that of the weights file; `path`
    is the folder that holds it, one that PEFT can load unless the adapter routes.
    """

    id: str
    revision: str | None = None
    sha256: str
    path: str


class TaskRef(Part):
    """A task by identity; `sha256` is over its rows, `path` is what `--task` takes."""

    name: str
    sha256: str
    path: str


class RankRange(Part):
    """The smallest and largest rank among an adapter's modules."""

    min: int
    max: int


class Run(Part):
    """How a result came to be: what it takes to run it again, and what it cost.

    `peak_memory_bytes` is what the process held in main memory; `peak_device_memory_bytes` what
    tensors held on the accelerator, null without one.
    """

    seed: int
    versions: dict[str, str]
    command: list[str]
    elapsed_s: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None = None


# --- crawl and index --------------------------------------------------------------------------

AdapterStatus = Literal["accepted", "rejected", "failed"]


class AdapterDocument(Document):
    """One adapter that a crawl looked at. `path` is null unless it was accepted.

    `pool` is the base model that it was vetted for, `base_model` the one that it names; `origin` is
    where it was found, a folder or a repository of the Hub. `norm` is the Frobenius norm of the
    whole update, sqrt(sum over modules of |s B A|^2). `author`, `likes`, `created_at`,
    `last_modified` and `tags` are the Hub's word.
    """

    kind: ClassVar[str] = "adapter"

    id: str
    source: Literal["hub", "folder"]
    origin: str
    revision: str | None = None
    sha256: str | None = None
    path: str | None = None
    status: AdapterStatus
    reason: str | None = None
    detail: str | None = None
    base_model: str | None = None
    rank: RankRange | None = None
    alpha: float | None = None
    use_rslora: bool | None = None
    target_modules: list[str] = Field(default_factory=list)
    license: str | None = None
    size_bytes: int | None = None
    norm: float | None = None
    fingerprint: str | None = None
    downloads: int | None = None
    pool: str | None = None
    author: str | None = None
    likes: int | None = None
    created_at: str | None = None
    last_modified: str | None = None
    tags: list[str] = Field(default_factory=list)


class CrawlDocument(Document):
    """What a crawl did, counted: `counts` by status, `reasons` by reason code.

    `requests` went to the Hub itself, whose rate limit counts them, `storage_requests` to where it
    redirects to; `bytes` were read; `passed_over` entries of listings name no repository or no
    commit. A dry run of the Hub tells what keeping the accepted adapters would take:
    `requests_to_come`, `bytes_to_come`, and `rate_limited_s`, the least time that the Hub's rate
    limit would have it wait.
    """

    kind: ClassVar[str] = "crawl"

    source: str
    base_model: str
    counts: dict[str, int]
    reasons: dict[str, int]
    requests: int
    bytes: int
    elapsed_s: float
    storage_requests: int = 0
    passed_over: int = 0
    requests_to_come: int | None = None
    bytes_to_come: int | None = None
    rate_limited_s: int | None = None


class ModuleNorm(Part):
    """One module of an adapter: its rank, and the Frobenius norm of its update."""

    rank: int
    norm: float


class OtherRow(Part):
    """Another row of the same adapter: another revision, or another base model that it was vetted
    for."""

    revision: str | None = None
    pool: str | None = None
    status: AdapterStatus
    reason: str | None = None
    sha256: str | None = None


class ShownAdapterDocument(AdapterDocument):
    """An adapter with what `index list` leaves out: `modules` by path, the text of its model card,
    and its other rows, the latest first."""

    modules: dict[str, ModuleNorm] = Field(default_factory=dict)
    card: str = ""
    others: list[OtherRow] = Field(default_factory=list)


class FunnelStep(Part):
    """How many adapters a reason kept out, and how many were left after it."""

    reason: str
    adapters: int
    left: int


class StatsDocument(Document):
    """The pool in figures. The histograms count accepted adapters.

    An adapter counts once for each base model that it was vetted for, in its latest revision.
    `funnel` leads from `found` to `adapters` by the reasons in the order of the checks, failures
    last. `alpha_over_rank` goes by the largest rank. `size_bytes` is what the weights take on disk.
    """

    kind: ClassVar[str] = "stats"

    adapters: int
    counts: dict[str, int]
    reasons: dict[str, int]
    found: int = 0
    funnel: list[FunnelStep] = Field(default_factory=list)
    base_models: dict[str, int]
    ranks: dict[str, int]
    alpha_over_rank: dict[str, int] = Field(default_factory=dict)
    licenses: dict[str, int]
    target_modules: dict[str, int]
    size_bytes: int
    norm: dict[str, float] | None = None


class IndexDocument(Document):
    """What bringing the index up to date did."""

    kind: ClassVar[str] = "index"

    adapters: int
    updated: int
    missing: list[str]
    elapsed_s: float


class Duplicate(Part):
    """A member of a group of duplicates; `cosine` compares its update with that of the first."""

    id: str
    source: str
    revision: str | None = None
    sha256: str | None = None
    path: str | None = None
    status: AdapterStatus
    license: str | None = None
    downloads: int | None = None
    norm: float | None = None
    cosine: float


class DuplicatesDocument(Document):
    """A group of adapters that are the same or nearly so, the one to keep first.

    `relation` is `identical` (the same weights file), `same_update` (other files, the same update
    of the same ranks, as far as their projections tell) or `near` (each has a cosine of at least
    `threshold` with another one of the group). Adapters of a group stand in the groups of a weaker
    relation by their first alone. `base_model` is null where that is not known.
    """

    kind: ClassVar[str] = "duplicates"

    relation: Literal["identical", "same_update", "near"]
    base_model: str | None = None
    threshold: float
    adapters: list[Duplicate]


class DamagedAdapter(AdapterRef):
    """A kept adapter whose folder is `missing` or `damaged`, and how; `repaired` where it was
    fetched again."""

    problem: Literal["missing", "damaged"]
    detail: str
    repaired: bool = False


class VerificationDocument(Document):
    """The state of the adapter cache. `adapters` counts the kept weights, each once, and `bytes`
    what was read of them; `whole` says that none is damaged any more."""

    kind: ClassVar[str] = "verification"

    adapters: int
    bytes: int
    damaged: list[DamagedAdapter]
    whole: bool
    elapsed_s: float


class ForgottenAdapter(Part):
    """A row that was removed from the index; `bytes` were freed on disk, 0 where its weights are
    kept for another row."""

    id: str
    source: str
    revision: str | None = None
    pool: str | None = None
    sha256: str | None = None
    path: str | None = None
    bytes: int


class ForgetDocument(Document):
    """What was forgotten, or what would be, where `dry_run` is true."""

    kind: ClassVar[str] = "forget"

    adapters: list[ForgottenAdapter]
    bytes: int
    dry_run: bool


# --- select -----------------------------------------------------------------------------------


class ScoredAdapter(AdapterRef):
    """A selected adapter: `score` is the method's, higher is better; a target LoRA that was asked
    for has none."""

    score: float | None
    log_likelihood: float | None = None
    role: Literal["pool", "target"] = "pool"


class LeftOut(Part):
    """An adapter that could not be ranked, and why."""

    id: str
    reason: str


class SelectionCost(Part):
    """`passes` counts runs of the model over rows, `rows_scored` the rows of all of them; answers
    that the index held already cost neither. Where a method does with less than every adapter on
    every row, `rows_of_full` is what that would take, and `agreement` the share of the first k that
    the full ranking has too, null unless the index holds all its answers."""

    passes: int
    elapsed_s: float
    rows_scored: int = 0
    rows_of_full: int | None = None
    agreement: float | None = None


class SelectionDocument(Document, Run):
    """A ranking, best first. `tied_at_cut` counts the adapters left out at the score of the last
    one taken."""

    kind: ClassVar[str] = "selection"

    task: TaskRef | None = None
    base_model: str
    method: str
    k: int
    scored_on: str | None = None
    adapters: list[ScoredAdapter]
    target: AdapterRef | None = None
    left_out: list[LeftOut]
    tied_at_cut: int
    cost: SelectionCost


# --- merge and tune ---------------------------------------------------------------------------


class WeightedAdapter(AdapterRef):
    """A source of a merge, with its weight and licence."""

    weight: float
    license: str | None = None


class MergeDocument(Document, Run):
    """A merged adapter, or a model with the merge in its weights.

    `form` is `adapter`, `adapter+residual` (the rest of an exact merge lies in the folder
    `residual`, an adapter too) or `model`; `files` are all that was written, below `path`. `rank`
    is the largest among its modules. `energy_kept` is the share of the exact merge's squared
    Frobenius norm that was kept, in [0, 1], and `energy_by_module` that of every module that was
    cut; where there is a residual, both are about it. `sha256` is that of the weights file; of a
    model, that of the digests of its weights files in the order of their names.
    `max_logit_deviation` compares a model with the base and the unmerged update, where that was
    asked for. `licenses` are those of all sources, each once.
    """

    kind: ClassVar[str] = "merge"

    method: str
    params: dict[str, Any]
    base_model: str
    adapters: list[WeightedAdapter]
    form: Literal["adapter", "adapter+residual", "model"] = "adapter"
    rank: int
    energy_kept: float
    energy_by_module: dict[str, float] = Field(default_factory=dict)
    max_logit_deviation: float | None = None
    path: str
    files: list[str] = Field(default_factory=list)
    sha256: str
    licenses: list[str] = Field(default_factory=list)
    warnings: list[str]


class MethodParameter(Part):
    """A parameter of a method: its option, the values allowed, and its default, null where the
    method chooses."""

    name: str
    option: str
    help: str
    range: str
    default: float | int | str | None


class MethodDocument(Document):
    """A method that a command offers.

    `invariant` says that only the adapters' updates count, not how they are split into factors.
    `lossless` holds the parameters under which one adapter at weight 1 comes back as it is, and is
    null where there are none. `weights` says how the adapters' weights are used.
    """

    kind: ClassVar[str] = "method"

    command: str
    name: str
    summary: str
    detail: str
    formula: str
    paper: str
    parameters: list[MethodParameter]
    weights: str
    invariant: bool
    lossless: dict[str, float | int | str | None] | None
    most_adapters: int | None


class TuneTask(TaskRef):
    """The task of a tuning run, with the number of rows trained on and validated on."""

    train_rows: int
    valid_rows: int


class MixedAdapter(AdapterRef):
    """A source of a mixture. `coefficient_mean` and `coefficient_max_abs` sum up its
    coefficients after the activation function, over the modules that it has; where the result
    routes token by token, its shares of the tokens of some training rows."""

    role: Literal["pool", "target"]
    license: str | None = None
    coefficient_mean: float
    coefficient_max_abs: float


class BestStep(Part):
    """The step whose weights were kept (0 is the start), and its validation loss in nats."""

    step: int
    valid_loss: float


class SweepTrial(Part):
    """A short training with one candidate for the rate, the rank, or both: how many steps it had,
    how many more were trained before modules were scored, and its lowest validation loss in nats.
    That is null where a loss was no longer a finite number; the steps are then those that it should
    have had."""

    lr: float | None = None
    rank: int | None = None
    steps: int
    proxy_steps: int = 0
    valid_loss: float | None


class TuneSweep(Part):
    """How the rate and the rank of a LoRA were found: the candidates, the short trainings that they
    had, and the steps of every kind and the seconds that all of these took, in all processes where
    the run was interrupted, beyond the training itself."""

    grid: dict[str, list[float]]
    trials: list[SweepTrial]
    chosen: dict[str, float]
    steps: int
    elapsed_s: float


class TuneDocument(Document, Run):
    """A tuned adapter: a target LoRA (`adapters` is empty), a mixture folded into one LoRA, or a
    routed adapter, which is no LoRA; then `rank` is the largest sum of ranks in a module.

    `history` holds [step, validation loss] pairs; `figures` are the method's own; `energy_kept` is
    the share of the squared norm that a limit on the export's rank kept, in [0, 1];
    `max_logit_deviation` compares the exported adapter with the model as trained, on one batch of
    training rows; `files` are all that was written, below `path`; `sweep` tells how a rate or rank
    that was left to be found was.
    """

    kind: ClassVar[str] = "tune"

    method: str
    settings: dict[str, Any]
    base_model: str
    task: TuneTask
    adapters: list[MixedAdapter]
    target: AdapterRef | None = None
    best: BestStep
    history: list[tuple[int, float]]
    figures: dict[str, float] = Field(default_factory=dict)
    rank: int
    energy_kept: float = 1.0
    max_logit_deviation: float
    path: str
    files: list[str] = Field(default_factory=list)
    sha256: str
    warnings: list[str]
    sweep: TuneSweep | None = None


class BudgetDocument(Document):
    """The memory that a tuning would take, told by `--dry-run`.

    `model_bytes` and `adapters_bytes` are those of the base model's weights and of the adapters'
    factors in its dtype; `training_bytes` is what a step takes beyond those, with `rows_a_pass` of
    its `batch_size` rows at once: gradients, moments, what is kept for the backward pass.
    `free_bytes` is what may be taken. `products` tells how the adapters' products are computed.
    """

    kind: ClassVar[str] = "budget"

    method: str
    base_model: str
    device: str
    dtype: str
    adapters: int
    trained_numbers: int
    model_bytes: int
    adapters_bytes: int
    training_bytes: int
    free_bytes: int
    batch_size: int
    rows_a_pass: int
    gradient_checkpointing: bool
    products: str


# --- eval -------------------------------------------------------------------------------------


class EvaluatedTask(TaskRef):
    """What was scored, the number of rows, and the split they are from.

    `origin` is `file` for a task of one's own and `lm-eval` for one of lm-eval's, whose `path` is
    its name. A `group` is lm-eval's, with lm-eval's own figures; `mean` stands for all tasks of the
    run, each counted alike. `members` are the tasks of a group or a mean, `num_fewshot` the
    examples in front of each prompt.
    """

    rows: int
    split: str
    kind: Literal["task", "group", "mean"] = "task"
    origin: Literal["file", "lm-eval"] = "file"
    members: list[str] = Field(default_factory=list)
    num_fewshot: int | None = 0


class PairedTest(Part):
    """A comparison with a baseline on the same rows.

    `difference` is ours minus the baseline's, over `rows` rows of `tasks` tasks, each task counted
    alike; `interval` is a paired bootstrap interval at 95 %. `adjusted_p_value` allows for how many
    comparisons were made. `equivalence_p_value` is that of the difference lying within `margin` to
    either side of zero, null where that was not asked.
    """

    baseline: str
    metric: str
    difference: float
    interval: tuple[float, float]
    p_value: float
    test: str
    rows: int = 0
    tasks: int = 1
    adjusted_p_value: float | None = None
    equivalence_p_value: float | None = None
    margin: float | None = None


class EvaluationDocument(Document, Run):
    """The metrics of one adapter (or "base") on one task.

    `form` says what was scored: the base model, an adapter on it, adapters that route, or a model
    with a merge in its weights. `metric` is the one that adapters are compared by. Of a task of
    one's own, `acc` is by log-likelihood per character, as lm-eval's `acc_norm` is, and `acc_sum`
    by summed log-likelihood; of lm-eval's tasks, names are lm-eval's, and its `acc` is the latter.
    `stderr` and `interval` (95 %) hold those metrics that have one; less is better where
    `higher_is_better` says false.
    """

    kind: ClassVar[str] = "evaluation"

    adapter: Literal["base"] | AdapterRef
    form: Literal["base", "adapter", "routed", "model"] | None = None
    base_model: str
    task: EvaluatedTask
    metric: str | None = None
    metrics: dict[str, float]
    higher_is_better: dict[str, bool] = Field(default_factory=dict)
    stderr: dict[str, float]
    interval: dict[str, tuple[float, float]]
    paired: PairedTest | None = None
    warnings: list[str] = Field(default_factory=list)


# --- study and demo ---------------------------------------------------------------------------

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
    the rest takes with one process, from steps measured on this machine, and null where there is
    nothing to measure on; `disk_bytes` about what it leaves on the disk.
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


DOCUMENTS: dict[str, type[Document]] = {
    document.kind: document
    for document in (
        AdapterDocument,
        CrawlDocument,
        StatsDocument,
        IndexDocument,
        DuplicatesDocument,
        VerificationDocument,
        ForgetDocument,
        SelectionDocument,
        MergeDocument,
        MethodDocument,
        TuneDocument,
        BudgetDocument,
        EvaluationDocument,
        StudyDocument,
        StudyPlanDocument,
    )
}


def read_documents(lines: Iterable[str], where: str = "standard input") -> list[Document]:
    """Parses JSON Lines. The whole input is checked before anything is returned.

    Args:
        lines: the lines of the input; blank ones are passed over.
        where: how errors name the input.

    Raises:
        InputError: a line is not a document of a known kind and major, or there is none.
    """
    documents = [
        _parse_line(line, f"{where}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not documents:
        raise InputError(
            f"{where} is empty",
            "the command before the pipe failed or found nothing; run it alone to see why",
        )
    return documents


def _parse_line(line: str, where: str) -> Document:
    hint = "feed it the output of a recycle command run with --json"
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON", hint) from error
    if not isinstance(fields, dict) or not isinstance(fields.get("schema"), str):
        raise InputError(f"{where} has no schema field", hint)
    return document_class(fields["schema"], where).from_fields(fields, where)


def document_class(schema: str, where: str) -> type[Document]:
    """The model for a `schema` value such as `recycle.merge/1`.

    Raises:
        InputError: the kind is unknown, or its major is one this version cannot read.
    """
    name, _, major = schema.removeprefix("recycle.").partition("/")
    known = DOCUMENTS.get(name) if schema.startswith("recycle.") else None
    if known is None:
        raise InputError(
            f"{where} is a {schema!r}, which is no recycle document",
            f"known kinds: {', '.join(f'recycle.{kind}' for kind in DOCUMENTS)}",
        )
    if major != str(known.major):
        raise InputError(
            f"{where} is a {schema!r}; this version reads {known.schema_name()!r}",
            "use the version of recycle that wrote it",
        )
    return known
