"""What `recycle select` is asked to do, and whether that can be done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from recycle_cli.errors import InputError
from recycle_cli.evaluation.tasks import Row, Task, training_split
from recycle_cli.selection.catalog import AGGREGATES, METHODS, find_selection_method
from recycle_cli.workflows.adapters import Source
from recycle_cli.workflows.provenance import shown

ScoreOn = Literal["train", "all"]


@dataclass(frozen=True)
class SelectRequest:
    """What to select.

    Args:
        task: the task to select for; methods that need none take None.
        base_model: the canonical name of the base model.
        method: a name in the selection catalog.
        k: how many adapters to take, at least 1.
        seed: of the split, and of random scores.
        rows: how many of the task's training rows may be used, or None for all.
        score_on: the training part of those rows, or all of them, as the paper does.
        aggregate: how modules are put together, where the method compares updates.
        target: the target LoRA to compare with, or to put first.
        include_target: put the target LoRA first, marked as such.
        named: whether the pool was named by the user, not taken from the index.
        filters: what the index was asked for besides, by option.
        workers: processes that score, at least 1.
        ray: the address of a Ray cluster that scores, or None.
    """

    task: Task | None
    base_model: str
    method: str = "evaluation"
    k: int = 10
    seed: int = 0
    rows: int | None = None
    score_on: ScoreOn = "train"
    aggregate: Literal["macro", "micro"] = "macro"
    target: Source | None = None
    include_target: bool = False
    named: bool = False
    filters: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    ray: str | None = None

    @property
    def runs_model_here(self) -> bool:
        """Whether this process needs the base model; workers load their own."""
        return find_selection_method(self.method).needs_model and not self.elsewhere

    @property
    def elsewhere(self) -> bool:
        """Whether adapters are scored by other processes than this one."""
        return self.workers > 1 or self.ray is not None

    def command(self, pool: Sequence[Source]) -> list[str]:
        """The command line that asks for the same."""
        words = ["recycle", "select"]
        words += [source.word for source in pool] if self.named else []
        words += ["--base-model", self.base_model, "--method", self.method]
        words += ["-k", str(self.k), "--seed", str(self.seed)]
        words += ["--task", shown(self.task.path)] if self.task else []
        words += ["--rows", str(self.rows)] if self.rows else []
        words += ["--score-on", self.score_on] if self.score_on != "train" else []
        words += ["--aggregate", self.aggregate] if self.aggregate != "macro" else []
        words += ["--target", self.target.word] if self.target else []
        words += ["--include-target"] * self.include_target
        for option, value in self.filters.items():
            words += [option, value]
        words += ["--workers", str(self.workers)] if self.workers > 1 else []
        return words

    def rows_to_score(self) -> tuple[Row, ...]:
        """The rows that the method looks at, of the task that there has to be.

        Raises:
            InputError: there are too few.
        """
        assert self.task is not None
        train, valid = training_split(self.task, self.seed, self.rows)
        return train + valid if self.score_on == "all" else train


def check_request(request: SelectRequest, pool: Sequence[Source]) -> None:
    """Checks, before anything is loaded, that the request makes sense.

    Raises:
        InputError: the method is unknown, lacks a task or a target or has no use for what is
            asked, the task has too few rows, or what was named is no LoRA.
    """
    for source in [*pool, *([request.target] if request.target else [])]:
        source.check_is_lora()
    method = find_selection_method(request.method)
    if method.needs_task and request.task is None:
        raise InputError(f"--method {method.name} needs a task", "name one with --task")
    if method.needs_task:
        request.rows_to_score()
    elif request.rows is not None or request.score_on != "train":
        raise InputError(
            f"--method {method.name} scores no rows", "leave out --rows and --score-on"
        )
    _check_target(request)
    _check_aggregate(request)
    if method.needs != "rows" and request.elsewhere:
        option = "--ray" if request.ray else "--workers"
        raise InputError(
            f"{option} has no effect with --method {method.name}, which runs no adapter",
            "leave it out",
        )
    if request.workers > 1 and request.ray:
        raise InputError("--workers and --ray both say who scores", "leave one of them out")


def _check_target(request: SelectRequest) -> None:
    compares = find_selection_method(request.method).needs == "target"
    if compares and request.target is None:
        raise InputError(
            f"--method {request.method} compares with a target LoRA", "name it with --target"
        )
    if request.include_target and request.target is None:
        raise InputError("--include-target puts the target LoRA first", "name it with --target")
    if request.target and not compares and not request.include_target:
        raise InputError(
            f"--target has no effect with --method {request.method}",
            "leave it out, or put it first with --include-target",
        )


def _check_aggregate(request: SelectRequest) -> None:
    if request.aggregate not in AGGREGATES:
        raise InputError(
            f"--aggregate is {request.aggregate!r}", f"use one of: {', '.join(AGGREGATES)}"
        )
    if request.aggregate != "macro" and not find_selection_method(request.method).aggregates:
        takers = ", ".join(method.name for method in METHODS.values() if method.aggregates)
        raise InputError(
            f"--aggregate has no effect with --method {request.method}",
            f"leave it out, or use one of: {takers}",
        )
