"""Rows of a task from the columns of a data set."""

import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recycle_cli.errors import InputError
from recycle_cli.evaluation.task_rows import Row, described, instructed, make_row

if TYPE_CHECKING:
    from recycle_cli.evaluation.hub_data import Table
    from recycle_cli.evaluation.hub_task import Columns

LABELS = "labels"
SEPARATOR = " [SEP] \n"
LETTERS = string.ascii_uppercase
MOST_LABELS = 200
COLUMN_HINT = "name a column of text, numbers, or options: a list, or {label: [...], text: [...]}"


class RowMaker:
    """Makes the rows of a task.

    Args:
        columns: which make a row.
        labels: what answers are called, by the values of the output column; may be empty.
        instruction: put before every input; `{labels}` in it stands for all answers.
        tables: the parts of the data set, which have the same columns.

    Raises:
        InputError: the answers are to be labels, and are too many to be.
    """

    def __init__(
        self,
        columns: "Columns",
        labels: Mapping[str, str],
        instruction: str,
        tables: "Sequence[Table]",
    ) -> None:
        self.columns = columns
        self.labels = labels
        self.class_names = tables[0].class_names(columns.output)
        self.choices = self._all_answers(tables) if columns.choices == LABELS else None
        self.instruction = instruction.replace("{labels}", "; ".join(self.choices or ()))

    def _all_answers(self, tables: "Sequence[Table]") -> list[str]:
        if self.labels:
            return list(dict.fromkeys(self.labels.values()))
        if self.class_names:
            return list(self.class_names)
        column = self.columns.output
        found = {value for table in tables for value in table.values(column)}
        values = sorted(found - {None, ""}, key=lambda value: (isinstance(value, str), value))
        if len(values) > MOST_LABELS:
            raise InputError(
                f"{tables[0].name}: {column!r} has {len(values):,} different values, which are no "
                "labels",
                "leave out columns.choices, or name a column with the options of each row",
            )
        return [as_text(value) for value in values]

    def row(self, fields: Mapping[str, Any], where: str) -> Row:
        """The row that some fields make, with the instruction before its input.

        Args:
            fields: by column.
            where: how errors name the row.

        Raises:
            InputError: it is no row.
        """
        columns = self.columns
        made = {
            "input": self._input(fields, where),
            "output": self._answer(fields[columns.output], where),
            "choices": self.choices,
        }
        if columns.choices not in (None, LABELS):
            options = _options(fields[columns.choices], columns.choices, where)
            made["choices"] = list(options.values())
            made["output"] = _chosen(fields[columns.output], options) or made["output"]
        return instructed([make_row(made, where)], self.instruction)[0]

    def _input(self, fields: Mapping[str, Any], where: str) -> str:
        """Of one column its text, of several each with its name."""
        columns = self.columns.input
        if isinstance(columns, str):
            return _shown(fields[columns], columns, where)
        texts = {name: _shown(fields[column], column, where) for name, column in columns.items()}
        return SEPARATOR.join(f"{name} - {text}" for name, text in texts.items() if text.strip())

    def _answer(self, value: Any, where: str) -> str:
        """The text of an answer. That there is none data sets say with -1 too."""
        column = self.columns.output
        if isinstance(value, list | dict):
            raise InputError(
                f"{where}: {column!r} is {described(value)}, not an answer", COLUMN_HINT
            )
        name = "" if value is None else as_text(value)
        if self.class_names is not None and isinstance(value, int):
            name = self.class_names[value] if value >= 0 else ""
        if not name.strip():
            raise InputError(
                f"{where} has no answer: {column!r} is {described(value)}",
                "leave such rows out, leave_out: [unusable]; or name a part with answers in splits",
            )
        if not self.labels:
            return name
        label = self.labels.get(as_text(value), self.labels.get(name))
        if label is None:
            raise InputError(
                f"{where}: labels does not name {as_text(value)!r}, which {column!r} is",
                "add it, or leave such rows out: leave_out: [unusable]",
            )
        return label


def as_text(value: Any) -> str:
    """A text as it is, and numbers and truth values as text."""
    return value if isinstance(value, str) else str(value)


def _shown(value: Any, column: str, where: str) -> str:
    """A value as inputs show it: options one a line, each with its letter."""
    if value is None:
        return ""
    if isinstance(value, list | dict):
        options = _options(value, column, where)
        return "\n".join(f"{mark}: {text}" for mark, text in options.items())
    return as_text(value)


def _options(value: Any, column: str, where: str) -> dict[str, str]:
    """The options of a row by their marks: their own, or letters, or numbers where these end."""
    texts, marks = value, None
    if isinstance(value, dict) and {"label", "text"} <= value.keys():
        texts, marks = value["text"], value["label"]
    if not isinstance(texts, list) or not all(
        isinstance(text, str | int | float) for text in texts
    ):
        raise InputError(f"{where}: {column!r} is {described(value)}, not options", COLUMN_HINT)
    if marks is None:
        marks = LETTERS if len(texts) <= len(LETTERS) else map(str, range(len(texts)))
    return {as_text(mark): as_text(text) for mark, text in zip(marks, texts, strict=False)}


def _chosen(value: Any, options: Mapping[str, str]) -> str | None:
    """The text of the option that an answer names: by its text, its mark or its place from 0; None
    where it names none."""
    texts = list(options.values())
    if isinstance(value, int):
        return texts[value] if 0 <= value < len(texts) else None
    if value in texts:
        return str(value)
    if value in options:
        return options[value]
    return texts[int(value)] if str(value).isdecimal() and int(value) < len(texts) else None
