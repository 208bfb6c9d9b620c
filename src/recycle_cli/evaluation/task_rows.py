"""Rows of a task: one example each, and what it takes to be one."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from recycle_cli.errors import InputError

COLUMNS = ("input", "output", "choices")
ROW_HINT = 'a row is {"input": "text", "output": "text"}, with "choices": ["text", ...] if closed'


@dataclass(frozen=True)
class Row:
    """One example. `choices` is empty where the answer is open, else it holds `output`."""

    input: str
    output: str
    choices: tuple[str, ...] = ()


def instructed(rows: Iterable[Row], instruction: str) -> tuple[Row, ...]:
    """The rows with an instruction before every input, where there is one."""
    if not instruction:
        return tuple(rows)
    return tuple(replace(row, input=f"{instruction}\n{row.input}") for row in rows)


def comparable(text: str) -> str:
    """The form in which two inputs are compared: whatever their case and white space."""
    return " ".join(text.split()).casefold()


def parse_row(line: bytes, where: str, columns: tuple[str, str, str] = COLUMNS) -> Row:
    """The row that a line of JSON describes; see `make_row`.

    Raises:
        InputError: it is not JSON, or no row.
    """
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8", "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON", ROW_HINT) from error
    if not isinstance(fields, dict):
        raise InputError(f"{where} is {described(fields)}, not an object", ROW_HINT)
    return make_row(fields, where, columns)


def make_row(fields: Mapping[str, Any], where: str, columns: tuple[str, str, str] = COLUMNS) -> Row:
    """The row that some fields describe.

    Args:
        fields: by column name.
        where: how errors name its place.
        columns: which of them are the input, the output and the choices; the last may be missing.

    Raises:
        InputError: a field is missing, or is not as a row needs it.
    """
    input_column, output_column, choices_column = columns
    row = Row(
        _row_text(fields, input_column, where),
        _row_text(fields, output_column, where),
        _row_choices(fields.get(choices_column), choices_column, where),
    )
    if row.choices and row.output not in row.choices:
        raise InputError(
            f"{where}: {output_column!r} is {row.output!r}, which is not among "
            f"{choices_column!r}: {', '.join(map(repr, row.choices))}",
            "the answer must equal one of the choices to the letter",
        )
    return row


def _row_text(fields: Mapping[str, Any], column: str, where: str) -> str:
    if column not in fields:
        raise InputError(f"{where} has no field {column!r}", ROW_HINT)
    return _checked_text(fields[column], repr(column), where)


def _row_choices(value: object, column: str, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InputError(f"{where}: {column!r} is {described(value)}, not a list", ROW_HINT)
    choices = tuple(
        _checked_text(choice, f"choice {number} of {column!r}", where)
        for number, choice in enumerate(value, start=1)
    )
    if len(choices) < 2:
        raise InputError(
            f"{where}: {column!r} has {len(choices)} of the 2 or more that it needs",
            f"list every possible answer, or leave {column!r} out where the answer is open",
        )
    repeated = next((text for text in choices if choices.count(text) > 1), None)
    if repeated is not None:
        raise InputError(
            f"{where}: {column!r} has {repeated!r} more than once", "list every answer once"
        )
    return choices


def _checked_text(value: object, what: str, where: str) -> str:
    if not isinstance(value, str):
        hint = f"write it as {json.dumps(str(value))}" if isinstance(value, int) else ROW_HINT
        raise InputError(f"{where}: {what} is {described(value)}, not text", hint)
    if not value.strip():
        raise InputError(f"{where}: {what} is empty", "fill it in or leave the row out")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(
            f"{where}: {what} holds half of a surrogate pair, which no text can hold",
            "write the character itself, or both of its \\u escapes",
        )
    return value


def described(value: object) -> str:
    """A value as errors show it: its kind in JSON's words, and the value where that is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value!r}"
    return "a list" if isinstance(value, list) else "an object"
