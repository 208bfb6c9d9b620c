"""Tasks: labelled examples from JSON Lines files, checked line by line."""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recycle_cli.errors import InputError, unknown_name
from recycle_cli.evaluation.metrics import ACC, EXACT_MATCH, find_task_metric, normalise

TASK_FILE = "task.yaml"
TRAIN_FILE = "train.jsonl"
TEST_FILE = "test.jsonl"
FIELDS = ("name", "train", "test", "columns", "instruction", "metric")
COLUMNS = ("input", "output", "choices")
MIN_SPLIT_ROWS = 5
OVERLAP_EXAMPLES = 3

FORMS_HINT = (
    f"a task is a FILE.jsonl of rows, a folder with {TRAIN_FILE} or {TEST_FILE} or both, "
    f"or a {TASK_FILE} (or the folder that holds it)"
)
ROW_HINT = 'a row is {"input": "text", "output": "text"}, with "choices": ["text", ...] if closed'


@dataclass(frozen=True)
class Row:
    """One example. `choices` is empty where the answer is open, else it holds `output`."""

    input: str
    output: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Examples to train on and to test on.

    Args:
        name: from the task.yaml, else the name of the folder or the stem of the file.
        path: what the task was loaded from, absolute.
        sha256: hex digest over the rows and the metric; it does not change with the name, the
            place or the formatting of the files.
        train: may be empty.
        test: may be empty, but not both.
        metric: `acc` or `exact_match`.
    """

    name: str
    path: Path
    sha256: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    metric: str


@dataclass(frozen=True)
class Overlap:
    """How many rows of a test part stand in the training part too, and the first few inputs."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class _Recipe:
    """Where the rows of a task are and how they are read."""

    name: str
    train: Path | None = None
    test: Path | None = None
    columns: tuple[str, str, str] = COLUMNS
    instruction: str = ""
    metric: str | None = None


def load_task(source: str) -> Task:
    """Loads and checks a whole task.

    Args:
        source: the path of a JSON Lines file (its rows are the training part), of a folder with
            `train.jsonl` or `test.jsonl`, or of a `task.yaml` or a folder that holds one.

    Raises:
        InputError: the path is missing or no task, or a row cannot be used; the message names
            the file and the line.
    """
    path = Path(source).expanduser().absolute()
    recipe = _find_recipe(path, source)
    train = _read_rows(recipe.train, recipe) if recipe.train else ()
    test = _read_rows(recipe.test, recipe) if recipe.test else ()
    metric = _decide_metric(recipe, train, test, source)
    return Task(recipe.name, path, _digest(train, test, metric), train, test, metric)


def split_rows(
    rows: Sequence[Row], seed: int, valid_share: float = 0.2, limit: int | None = None
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Shuffles rows and parts them into training and validation rows.

    The shuffle is Python's own Mersenne Twister, the same on every platform. For one seed, the
    rows used at a lower limit are among those used at a higher one.

    Args:
        rows: the training part of a task.
        seed: the seed of the shuffle.
        valid_share: the share of rows to validate on, in (0, 1); the number is rounded down as
            in arXiv 2602.12323, but is at least 1.
        limit: how many rows are used at all; None or more than there are means all.

    Returns:
        The training rows and the validation rows, disjoint by position.

    Raises:
        InputError: fewer than 5 rows would be used, or the share is out of range.
    """
    if not 0 < valid_share < 1:
        raise InputError(
            f"the validation share is {valid_share}", "give a share between 0 and 1, such as 0.2"
        )
    used = len(rows) if limit is None else min(limit, len(rows))
    if used < MIN_SPLIT_ROWS:
        raise InputError(
            f"{used} training rows are too few to train and validate on",
            f"at least {MIN_SPLIT_ROWS} are needed; about 100 are usual",
        )
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    valid = max(1, int(valid_share * used))
    return tuple(shuffled[: used - valid]), tuple(shuffled[used - valid : used])


def training_split(
    task: Task, seed: int, limit: int | None = None
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """The training and validation rows of a task, as `split_rows` parts them.

    Raises:
        InputError: the task has no training rows, or too few of them.
    """
    if not task.train:
        raise InputError(
            f"task {task.name} has no training rows",
            f"give a FILE.jsonl, or a folder with a {TRAIN_FILE}",
        )
    return split_rows(task.train, seed, limit=limit)


def overlap(train: Iterable[Row], test: Iterable[Row]) -> Overlap:
    """The rows of `test` whose input stands in `train` too, whatever its case and white space."""
    seen = {_comparable(row.input) for row in train}
    shared = [row.input for row in test if _comparable(row.input) in seen]
    return Overlap(len(shared), tuple(shared[:OVERLAP_EXAMPLES]))


def _comparable(text: str) -> str:
    return " ".join(text.split()).casefold()


# --- where the rows are -----------------------------------------------------------------------


def _find_recipe(path: Path, source: str) -> _Recipe:
    if path.is_dir():
        return _folder_recipe(path, source)
    if not path.exists():
        raise InputError(f"there is no task at {source!r}", FORMS_HINT)
    if path.suffix == ".jsonl":
        return _Recipe(path.stem, train=path)
    if path.suffix in {".yaml", ".yml"}:
        return _yaml_recipe(path)
    raise InputError(f"{source!r} is not a task: its name ends in {path.suffix!r}", FORMS_HINT)


def _folder_recipe(folder: Path, source: str) -> _Recipe:
    if (folder / TASK_FILE).exists():
        return _yaml_recipe(folder / TASK_FILE)
    train, test = (
        part if part.exists() else None for part in (folder / TRAIN_FILE, folder / TEST_FILE)
    )
    if train is None and test is None:
        raise InputError(
            f"the folder {source!r} has no {TASK_FILE}, {TRAIN_FILE} or {TEST_FILE}", FORMS_HINT
        )
    return _Recipe(folder.name, train, test)


def _yaml_recipe(path: Path) -> _Recipe:
    fields = _read_yaml(path)
    for field in fields:
        if field not in FIELDS:
            raise unknown_name(f"field in {path}", str(field), FIELDS)
    texts = {
        field: _yaml_text(fields[field], field, path)
        for field in FIELDS
        if field != "columns" and field in fields
    }
    parts = {part: path.parent / texts[part] for part in ("train", "test") if part in texts}
    if not parts:
        raise InputError(f"{path} names neither train nor test", "give at least one of them")
    for part, file in parts.items():
        if not file.is_file():
            raise InputError(
                f"{path}: {part} is {texts[part]!r}, and there is no file {file}",
                f"give a path relative to the {TASK_FILE}",
            )
    if "metric" in texts:
        find_task_metric(texts["metric"])
    return _Recipe(
        name=texts.get("name", path.absolute().parent.name),
        train=parts.get("train"),
        test=parts.get("test"),
        columns=_yaml_columns(fields.get("columns", {}), path),
        instruction=texts.get("instruction", ""),
        metric=texts.get("metric"),
    )


def _read_yaml(path: Path) -> dict[Any, Any]:
    import yaml

    hint = f"its fields are {', '.join(FIELDS)}"
    try:
        fields = yaml.safe_load(_read_bytes(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise InputError(f"{where} is not YAML", hint) from error
    if not isinstance(fields, dict):
        raise InputError(f"{path} does not hold fields", hint)
    return fields


def _yaml_text(value: object, field: str, path: Path) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{path}: {field} is {_describe(value)}, not text", f"write {field}: some text"
        )
    return value


def _yaml_columns(value: object, path: Path) -> tuple[str, str, str]:
    if not isinstance(value, dict):
        raise InputError(
            f"{path}: columns is {_describe(value)}, not a mapping",
            "write, for example, columns: {input: question, output: answer}",
        )
    for column in value:
        if column not in COLUMNS:
            raise unknown_name(f"column in {path}", str(column), COLUMNS)
    names = [_yaml_text(value.get(column, column), f"columns.{column}", path) for column in COLUMNS]
    return names[0], names[1], names[2]


# --- the rows -----------------------------------------------------------------------------------


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", FORMS_HINT) from error


def _read_rows(path: Path, recipe: _Recipe) -> tuple[Row, ...]:
    # Split at the line feed alone: JSON strings may hold the other separators that
    # str.splitlines breaks at, such as U+2028.
    lines = _read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows = tuple(
        _parse_row(line, f"{path}, line {number}", recipe.columns)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not rows:
        raise InputError(f"{path} has no rows", ROW_HINT)
    if recipe.instruction:
        rows = tuple(replace(row, input=f"{recipe.instruction}\n{row.input}") for row in rows)
    return rows


def _parse_row(line: bytes, where: str, columns: tuple[str, str, str]) -> Row:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8", "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON", ROW_HINT) from error
    if not isinstance(fields, dict):
        raise InputError(f"{where} is {_describe(fields)}, not an object", ROW_HINT)
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


def _row_text(fields: dict[str, Any], column: str, where: str) -> str:
    if column not in fields:
        raise InputError(f"{where} has no field {column!r}", ROW_HINT)
    return _checked_text(fields[column], repr(column), where)


def _row_choices(value: object, column: str, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InputError(f"{where}: {column!r} is {_describe(value)}, not a list", ROW_HINT)
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
        raise InputError(f"{where}: {what} is {_describe(value)}, not text", hint)
    if not value.strip():
        raise InputError(f"{where}: {what} is empty", "fill it in or leave the row out")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(
            f"{where}: {what} holds half of a surrogate pair, which no text can hold",
            "write the character itself, or both of its \\u escapes",
        )
    return value


def _describe(value: object) -> str:
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


# --- the task as a whole ------------------------------------------------------------------------


def _decide_metric(
    recipe: _Recipe, train: tuple[Row, ...], test: tuple[Row, ...], source: str
) -> str:
    closed = all(row.choices for row in train + test)
    metric = recipe.metric or (ACC if closed else EXACT_MATCH)
    for part, rows in (("training", train), ("test", test)):
        for number, row in enumerate(rows, start=1):
            if find_task_metric(metric).needs_choices and not row.choices:
                raise InputError(
                    f"{source}: the metric {metric!r} needs choices, and {part} row {number} has "
                    "none",
                    f"give every row its choices, or use metric: {EXACT_MATCH}",
                )
            if metric == EXACT_MATCH and not normalise(row.output):
                raise InputError(
                    f"{source}: the output {row.output!r} of {part} row {number} is empty once "
                    "it is normalised, so that saying nothing would be right",
                    "give an answer with at least one letter or digit",
                )
    return metric


def _digest(train: tuple[Row, ...], test: tuple[Row, ...], metric: str) -> str:
    parts = {
        part: [[row.input, row.output, list(row.choices)] for row in rows]
        for part, rows in (("train", train), ("test", test))
    }
    canonical = json.dumps({"metric": metric, **parts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
