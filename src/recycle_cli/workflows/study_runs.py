"""The runs that a study is made of: rankings, target LoRAs, and adapters that are made and scored.

A run knows all that it needs, so that any process that holds the base model can do it.
"""

import errno
import json
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from recycle_cli.evaluation.tasks import Task
from recycle_cli.progress import Silent
from recycle_cli.records import AdapterRef, MergeDocument, TuneDocument
from recycle_cli.settings import Settings
from recycle_cli.tuning.lora_catalog import lora_pace
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.answers import answer_rows
from recycle_cli.workflows.output_folder import RECORD_FILE
from recycle_cli.workflows.provenance import Clock
from recycle_cli.workflows.study_arms import Arm
from recycle_cli.workflows.study_config import TargetChoice
from recycle_cli.workflows.study_store import ADAPTER, RunStore, key_of
from recycle_cli.workflows.tune_request import LORA, LoraShape, TuneRequest
from recycle_cli.workflows.tune_state import COEFFICIENTS_FILE

if TYPE_CHECKING:
    from recycle_cli.engine.base_model import BaseModel

LOSS_VERSION = 2
"""Raised when the loss of the same rows, and so what learns from it, would come out otherwise."""
Made = MergeDocument | TuneDocument
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Common:
    """What all runs of a study have in common.

    Args:
        store: where they are kept.
        base_model: the canonical name of the base model.
        base_digest: stands for its weights and prompts.
        rows: how many of a task's training rows may be used, validation rows included.
        test_rows: how many test rows are scored.
        max_new_tokens: the longest answer that is generated.
        max_memory: bytes that training may take beyond the model.
    """

    store: RunStore
    base_model: str
    base_digest: str
    rows: int | None
    test_rows: int | None
    max_new_tokens: int
    max_memory: int | None


@dataclass(frozen=True)
class Run(ABC):
    """One run.

    Args:
        common: what it shares with others.
        task: the task.
        seed: of the split, the order of rows, what is drawn.
    """

    kind: ClassVar[str]

    common: Common
    task: Task
    seed: int

    @cached_property
    def key(self) -> str:
        """Stands for all that decides what comes out."""
        shared = {"base": self.common.base_digest, "task": self.task.sha256, "seed": self.seed}
        loss = {"loss": LOSS_VERSION} if self.sees_loss else {}
        return key_of(self.kind, {**shared, **loss, **self.inputs()})

    @property
    @abstractmethod
    def sees_loss(self) -> bool:
        """Whether it goes by the loss of the task's training rows."""

    @abstractmethod
    def inputs(self) -> Mapping[str, Any]:
        """What decides what comes out, beside the base model, the task and the seed."""

    @abstractmethod
    def perform(self, base: "BaseModel", settings: Settings, folder: Path) -> dict[str, Any]:
        """Does it; gives what came of it.

        Args:
            base: the loaded base model.
            settings: where the index is.
            folder: to work in.
        """


@dataclass(frozen=True)
class Ranking(Run):
    """A ranking of the whole pool for a task.

    Args:
        method: of `recycle select`.
        pool: the adapters.
        score_on: the rows that it sees, where it scores some.
        target: the target LoRA, for methods that compare with it.
    """

    kind = "ranking"

    method: str
    pool: tuple[Source, ...]
    score_on: str
    target: Source | None = None

    @property
    def sees_loss(self) -> bool:
        """See `Run`."""
        from recycle_cli.selection.catalog import find_selection_method

        return find_selection_method(self.method).needs == "gradient"

    def inputs(self) -> Mapping[str, Any]:
        """See `Run`."""
        return {
            "method": self.method,
            "pool": sorted(source.ref.sha256 for source in self.pool),
            "rows": self.common.rows,
            "score_on": self.score_on,
            "target": self.target.ref.sha256 if self.target else None,
        }

    def perform(self, base: "BaseModel", settings: Settings, folder: Path) -> dict[str, Any]:
        """See `Run`."""
        from recycle_cli.selection.catalog import find_selection_method
        from recycle_cli.workflows.select import select
        from recycle_cli.workflows.select_request import SelectRequest

        scores_rows = find_selection_method(self.method).needs_task
        request = SelectRequest(
            self.task,
            self.common.base_model,
            method=self.method,
            k=len(self.pool),
            seed=self.seed,
            rows=self.common.rows if scores_rows else None,
            score_on=self.score_on if scores_rows else "train",  # type: ignore[arg-type]
            target=self.target,
        )
        document = select(request, self.pool, base, settings, Silent())
        return {"selection": document.model_dump(mode="json")}


@dataclass(frozen=True)
class TargetTraining(Run):
    """The target LoRA of a task.

    Args:
        choice: its shape and pace.
    """

    kind = "target"

    choice: TargetChoice

    @property
    def sees_loss(self) -> bool:
        """See `Run`."""
        return True

    def inputs(self) -> Mapping[str, Any]:
        """See `Run`. What is left at its default is left out, so that a new field of a target LoRA
        does not have the old ones trained again."""
        choice = self.choice.model_dump(mode="json", exclude_defaults=True)
        usual = lora_pace({}, 1.0)
        own = lora_pace(self.choice.parameters, 1.0)
        return {
            "choice": choice,
            "rows": self.common.rows,
            **({"default_rate": own} if own != usual else {}),
        }

    def perform(self, base: "BaseModel", settings: Settings, folder: Path) -> dict[str, Any]:
        """See `Run`."""
        from recycle_cli.workflows.tune import tune

        done = made_before(folder)
        choice = self.choice
        shape = LoraShape(
            choice.rank,
            choice.alpha,
            choice.dropout,
            choice.use_rslora,
            choice.target_modules,
        )
        request = TuneRequest(
            self.task,
            self.common.base_model,
            folder / ADAPTER,
            method=LORA,
            parameters=choice.parameters,
            pace=choice.pace,
            rows=self.common.rows,
            lora=shape,
            max_memory=self.common.max_memory,
            resume=True,
            seed=self.seed,
        )
        document = done or tune(request, (), None, base, Silent())
        return {"made": document.model_dump(mode="json")}


@dataclass(frozen=True)
class Cell(Run):
    """An arm on a task with a seed: its adapter is made, and scored on the test rows.

    Args:
        arm: what is made.
        pace: of its training, where it trains.
        sources: the adapters of the pool that it takes, best first.
        target: the target LoRA, where it takes that.
        keep: whether its adapter stays on disk.
    """

    kind = "cell"

    arm: Arm
    pace: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    target: Source | None = None
    keep: bool = False

    def inputs(self) -> Mapping[str, Any]:
        """See `Run`."""
        arm = self.arm
        return {
            "role": arm.role if arm.choice is None else "made",
            "method": arm.method,
            "parameters": arm.choice.parameters if arm.choice else {},
            "pace": dict(self.pace),
            "reinit": arm.reinit,
            "adapters": [source.ref.sha256 for source in self.sources],
            "target": self.target.ref.sha256 if self.target else None,
            "rows": self.common.rows if self.sees_loss else None,
            "test_rows": self.common.test_rows,
            "max_new_tokens": self.common.max_new_tokens,
        }

    @property
    def sees_loss(self) -> bool:
        """See `Run`."""
        choice = self.arm.choice
        return self.arm.role == "rescaled" or (choice is not None and not choice.merges)

    def perform(self, base: "BaseModel", settings: Settings, folder: Path) -> dict[str, Any]:
        """See `Run`."""
        made = made_before(folder) or self._make(base, settings, folder)
        scored = self._scored(made, folder)
        clock = Clock()
        answers = answer_rows(
            base,
            scored.load_to_score(self.common.base_model) if scored else None,
            self.task.test[: self.common.test_rows],
            self.task.metric,
            Silent(),
            self.common.max_new_tokens,
        )
        return {
            "made": made.model_dump(mode="json") if made else None,
            "coefficients": _coefficients_in(folder / ADAPTER),
            "scores": [float(right) for right in answers.correct],
            "predictions": answers.predictions,
            "scored_s": clock.elapsed_s,
        }

    def _make(self, base: "BaseModel", settings: Settings, folder: Path) -> Made | None:
        if self.arm.method is None or self.arm.role == "target":
            return None
        if self.arm.choice is not None and self.arm.choice.merges:
            return self._merge(settings, folder)
        return self._tune(base, folder)

    def _merge(self, settings: Settings, folder: Path) -> MergeDocument:
        from recycle_cli.workflows.merge import merge
        from recycle_cli.workflows.merge_request import MergeRequest

        assert self.arm.choice is not None
        request = MergeRequest(
            self.common.base_model,
            folder / ADAPTER,
            method=self.arm.choice.method,
            parameters=self.arm.choice.parameters,
            seed=self.seed,
        )
        given = [*self.sources, *([self.target] if self.target else [])]
        return merge(request, given, settings, Silent())

    def _tune(self, base: "BaseModel", folder: Path) -> TuneDocument:
        from recycle_cli.workflows.tune import tune

        choice = self.arm.choice
        request = TuneRequest(
            self.task,
            self.common.base_model,
            folder / ADAPTER,
            method=self.arm.method or "",
            parameters=choice.parameters if choice else {},
            pace=self.pace,
            rows=self.common.rows,
            reinit="experts" if self.arm.reinit else "none",
            max_memory=self.common.max_memory,
            resume=True,
            seed=self.seed,
        )
        return tune(request, self.sources, self.target, base, Silent())

    def _scored(self, made: Made | None, folder: Path) -> Source | None:
        """What is put on the base model; None for the base model alone."""
        if made is not None:
            path = str(folder / ADAPTER)
            return Source(AdapterRef(id=self.arm.name, sha256=made.sha256, path=path))
        return self.target if self.arm.role == "target" else next(iter(self.sources), None)


def made_before(folder: Path) -> Made | None:
    """The adapter that an interrupted run made; None where it did not come so far."""
    try:
        fields = json.loads((folder / ADAPTER / RECORD_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    kind = TuneDocument if fields["schema"] == TuneDocument.schema_name() else MergeDocument
    return kind.model_validate(fields)


def _coefficients_in(folder: Path) -> dict[str, Any] | None:
    """Where a mixture's coefficients went, as `tune` wrote it; None where it wrote none."""
    try:
        return dict(json.loads((folder / COEFFICIENTS_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class Failure:
    """Why a run failed."""

    error: str


@dataclass(frozen=True)
class AskDigest:
    """The question what stands for the base model's weights and prompts, asked as a job: whoever
    asks need not hold the model."""


@dataclass
class StudyWorker:
    """Does runs on a base model that it holds; `sharing` processes share the machine's memory."""

    base: "BaseModel"
    settings: Settings
    sharing: int = 1

    def work(self, job: Run | AskDigest) -> Failure | str | None:
        """Does a run and keeps what came of it; one that fails does so alone. Or answers."""
        return self.base.digest if isinstance(job, AskDigest) else self._do(job)

    def _do(self, run: Run) -> Failure | None:
        from recycle_cli.errors import RecycleError

        store, run = run.common.store, self._within_memory(run)
        try:
            outcome = run.perform(self.base, self.settings, store.begin(run.key))
            if isinstance(run, Cell) and not run.keep:
                store.drop_adapter(run.key)
            store.finish(run.key, {"kind": run.kind, "inputs": run.inputs(), **outcome})
        except Exception as error:
            # No room for a run is no room for the next one, nor for a note that it failed.
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise
            message = error.message if isinstance(error, RecycleError) else repr(error)
            store.fail(run.key, message, traceback.format_exc())
            return Failure(message)
        return None

    def _within_memory(self, run: Run) -> Run:
        """The run with its part of the memory, where other processes train at the same time."""
        from recycle_cli.engine.budget import free_memory

        if self.sharing == 1 or run.common.max_memory is not None:
            return run
        part = free_memory(self.base.compute.device) // self.sharing
        return replace(run, common=replace(run.common, max_memory=part))


@dataclass(frozen=True)
class Employer:
    """Makes a worker in a process of its own.

    Args:
        base_model: what it loads.
        settings: where the index is, and where it runs.
        threads: cores that it uses.
        sharing: how many share the machine's memory.
    """

    base_model: str
    settings: Settings
    threads: int
    sharing: int = 1

    def __call__(self) -> StudyWorker:
        """The worker."""
        import torch

        from recycle_cli.engine.base_model import load_base_model

        torch.set_num_threads(self.threads)
        base = load_base_model(self.base_model, self.settings)
        return StudyWorker(base, self.settings, self.sharing)


def sources_of(selection: Mapping[str, Any], pool: Sequence[Source], k: int) -> tuple[Source, ...]:
    """The first k adapters of a ranking."""
    known = {source.ref.sha256: source for source in pool}
    return tuple(known[adapter["sha256"]] for adapter in selection["adapters"][:k])
