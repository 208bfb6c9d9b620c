"""Tasks whose rows are a data set: one of the Hub, or a folder in the same form."""

import re
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from recycle_cli.errors import InputError
from recycle_cli.evaluation.hub_rows import LABELS, RowMaker, as_text
from recycle_cli.evaluation.task_rows import Row, comparable

if TYPE_CHECKING:
    from recycle_cli.evaluation.hub_data import DataSet, Table

HINT = "see docs/tasks.md for the fields of a task from a data set"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PLACES = (".", "/", "~")
SEED = 123
"""Of what is drawn from a data set once for all runs (arXiv 2602.12323)."""
TEST_SHARE = 0.1
UNUSABLE, OVERLAP = "unusable", "overlap"
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(pattern=r"\S")]


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Columns(_Fields):
    """Which columns of a data set make a row.

    Args:
        input: a column; or several by the names that they bear in the input, which then reads
            `NAME - value [SEP] ` a line, as in arXiv 2602.12323.
        output: the column of the answer.
        choices: a column with the options of each row; or `labels`, for the answers that the output
            column can have; None where the answer is open.
    """

    input: str | dict[str, str] = "input"
    output: Text = "output"
    choices: Text | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """A list of columns bears their names, in capitals."""
        columns = [value] if isinstance(value, str) else value
        if isinstance(columns, dict):
            columns = [*columns, *columns.values()]
        if (
            not isinstance(columns, list)
            or not columns
            or not all(isinstance(name, str) and name.strip() for name in columns)
        ):
            raise ValueError("name a column, a list of columns, or columns by NAME: column")
        return {name.upper(): name for name in value} if isinstance(value, list) else value


class Splits(_Fields):
    """The parts of a data set by its own names, or slices of them such as `train[:1000]`."""

    train: Text | None = None
    valid: Text | None = None
    test: Text | None = None


class Rows(_Fields):
    """How many rows of each part are used at most: drawn with a fixed seed."""

    train: Count | None = None
    valid: Count | None = None
    test: Count | None = None


class HubTask(_Fields):
    """The fields of a task.yaml that names a data set.

    Args:
        dataset: its name on the Hub, or a folder that begins with `.`, `/` or `~`.
        config: which of its configurations, where it has several.
        revision: a commit, tag or branch of its repository on the Hub.
        splits: which of its parts; with None `train`, `validation` and `test` where it has them.
        columns: what makes a row.
        labels: what answers are called, by the values of the output column.
        instruction: put before every input; `{labels}` in it stands for all answers.
        rows: how many are used at most.
        max_characters: the longest input that is used.
        leave_out: `unusable`: rows that no model could be scored on; `overlap`: training rows whose
            input stands in the test rows too. Both are errors unless they are named.
    """

    dataset: str
    config: Text | None = None
    revision: Text | None = None
    splits: Splits | None = None
    columns: Columns = Columns()
    labels: dict[str, Text] = Field(default_factory=dict)
    instruction: str = ""
    rows: Rows = Rows()
    max_characters: Count | None = None
    leave_out: frozenset[Literal["unusable", "overlap"]] = frozenset()

    @classmethod
    def of(cls, fields: Mapping[str, Any], where: str) -> Self:
        """The task that some fields describe.

        Args:
            fields: as they were written.
            where: how errors name their source.

        Raises:
            InputError: a field holds what it cannot.
        """
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(str(step) for step in first["loc"])
            message = first["msg"].removeprefix("Value error, ")
            raise InputError(f"{where}: {f'{name}: ' * bool(name)}{message}", HINT) from error

    @property
    def local(self) -> bool:
        """Whether it is a folder."""
        return self.dataset.startswith(PLACES)

    @field_validator("labels", mode="before")
    @classmethod
    def _by_text(cls, value: Any) -> Any:
        """YAML reads keys such as 0 and true as what they are."""
        return {as_text(key): name for key, name in value.items()} if type(value) is dict else value

    @field_validator("leave_out", mode="before")
    @classmethod
    def _any_of(cls, value: Any) -> Any:
        return frozenset(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.local and not HUB_ID.fullmatch(self.dataset):
            raise ValueError(
                f"dataset is {self.dataset!r}, which is neither a name on the Hub (owner/name) nor "
                "a folder (./name)"
            )
        if self.local and self.revision:
            raise ValueError("revision is of a data set on the Hub, and this one is a folder")
        if "{labels}" in self.instruction and self.columns.choices != LABELS:
            raise ValueError("{labels} in the instruction needs columns.choices: labels")
        if self.labels and self.columns.choices not in (None, LABELS):
            raise ValueError("labels names the answers, and columns.choices has their texts")
        return self


@dataclass(frozen=True)
class HubParts:
    """The rows of a data set, each with the instruction before its input.

    Args:
        train: may be empty, as may be the others.
        valid: empty where the data set has no such part.
        test: a tenth of the training part where the data set has no such part.
        revision: the commit that they are from, where it is known.
    """

    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    test: tuple[Row, ...]
    revision: str | None


def read_hub_task(task: HubTask, folder: Path, cached_only: bool = False) -> HubParts:
    """Reads the rows of a task from its data set.

    Args:
        task: what to read.
        folder: that a relative path is taken from.
        cached_only: fetch nothing; what is in this machine's cache has to do.

    Raises:
        InputError: the data set cannot be had, lacks a part or a column, or a row cannot be used;
            the message names the part and the row.
    """
    from recycle_cli.evaluation.hub_data import opened

    with opened(task, folder, cached_only) as data:
        tables = {
            part: _narrowed(task, table)
            for part, table in _tables(data, task.splits or _usual(data)).items()
        }
        maker = RowMaker(task.columns, task.labels, task.instruction, list(tables.values()))

        def pick(part: str, seen: Set[str] = frozenset()) -> tuple[Row, ...]:
            limit = getattr(task.rows, part)
            return _picked(task, maker, tables[part], limit, seen) if part in tables else ()

        test = pick("test")
        seen = {comparable(row.input) for row in test} if OVERLAP in task.leave_out else set()
        train, valid = pick("train", seen), pick("valid", seen)
        return HubParts(train, valid, test, data.revision)


def _usual(data: "DataSet") -> Splits:
    """The parts of a data set that are called as most call them."""

    def first(*names: str) -> str | None:
        return next((name for name in names if name in data.splits), None)

    found = Splits(
        train=first("train"), valid=first("validation", "valid", "dev"), test=first("test")
    )
    if not found.train and not found.test:
        raise InputError(
            f"{data.name} has neither a train nor a test part, but {', '.join(data.splits)}",
            f"say which is which, as in splits: {{train: {data.splits[0]}}}",
        )
    return found


def _tables(data: "DataSet", splits: Splits) -> "dict[str, Table]":
    """The parts of a task; a tenth of the training rows serve as test rows where it has none."""
    named = {part: name for part, name in splits if name}
    tables = {part: data.table(name) for part, name in named.items()}
    if "test" not in tables and "train" in tables:
        tables["train"], tables["test"] = tables["train"].parted(TEST_SHARE, SEED)
    if not tables:
        raise InputError(f"splits names no part of {data.name}", f"it has {', '.join(data.splits)}")
    return tables


def _narrowed(task: HubTask, table: "Table") -> "Table":
    """A part with the columns that its rows are made of.

    Raises:
        InputError: it lacks one.
    """
    columns = task.columns
    inputs = [columns.input] if isinstance(columns.input, str) else list(columns.input.values())
    choices = [] if columns.choices in (None, LABELS) else [columns.choices]
    wanted = [*inputs, columns.output, *choices]
    for column in wanted:
        if column not in table.columns:
            raise InputError(
                f"{table.name} has no column {column!r}",
                f"name in columns some of: {', '.join(table.columns)}",
            )
    return table.only(wanted)


def _picked(
    task: HubTask,
    maker: RowMaker,
    table: "Table",
    limit: int | None,
    seen: Set[str] = frozenset(),
) -> tuple[Row, ...]:
    """The rows of a part that are used.

    Args:
        task: says which.
        maker: makes them.
        table: the part.
        limit: how many at most.
        seen: inputs that are left out, as `comparable` has them.

    Raises:
        InputError: there is none, or more of them are of no use than not.
    """
    longest = task.max_characters or sys.maxsize
    found: list[Row] = []
    unusable: list[InputError] = []
    usable = 0
    all_used = limit is None or limit >= len(table)
    for number, fields in table.fields(range(len(table)) if all_used else table.shuffled(SEED)):
        if len(found) == limit:
            break
        try:
            row = maker.row(fields, f"{table.name}, row {number + 1}")
        except InputError as error:
            if UNUSABLE not in task.leave_out:
                raise
            unusable.append(error)
            continue
        usable += 1
        if len(row.input) <= longest and comparable(row.input) not in seen:
            found.append(row)
    if len(unusable) > usable:
        raise InputError(
            f"{len(unusable)} rows of {table.name} are of no use, and {usable} are, as "
            f"{unusable[0].message}",
            unusable[0].hint,
        )
    if not found:
        raise InputError(
            f"{table.name} has no rows that can be used",
            "look at splits, max_characters and leave_out",
        )
    return tuple(found)
