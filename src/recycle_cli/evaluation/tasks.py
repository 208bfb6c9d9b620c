"""Tasks: labelled examples from JSON Lines files, checked line by line, or from a data set."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycle_cli.errors import InputError, unknown_name
from recycle_cli.evaluation.hub_task import HubTask, read_hub_task
from recycle_cli.evaluation.metrics import ACC, EXACT_MATCH, find_task_metric, normalise
from recycle_cli.evaluation.task_rows import (
    COLUMNS,
    ROW_HINT,
    Row,
    comparable,
    described,
    instructed,
    parse_row,
)

__all__ = [
    "Overlap",
    "Row",
    "Task",
    "load_task",
    "load_task_fields",
    "overlap",
    "split_rows",
    "task_name",
    "training_split",
]

TASK_FILE = "task.yaml"
TRAIN_FILE = "train.jsonl"
TEST_FILE = "test.jsonl"
FILE_FIELDS = ("train", "test")
FIELDS = ("name", *FILE_FIELDS, "columns", "instruction", "metric")
HUB_FIELDS = tuple(name for name in HubTask.model_fields if name not in FIELDS)
ALL_FIELDS = (*FIELDS, *HUB_FIELDS)
MIN_SPLIT_ROWS = 5
VALID_SHARE = 0.2
OVERLAP_EXAMPLES = 3

FORMS_HINT = (
    f"a task is a FILE.jsonl of rows, a folder with {TRAIN_FILE} or {TEST_FILE} or both, "
    f"or a {TASK_FILE} (or the folder that holds it)"
)


@dataclass(frozen=True)
class Task:
    """Examples to train on and to test on.

    Args:
        name: from the task.yaml, else the name of the folder or the stem of the file.
        path: what the task was loaded from, absolute; of a data set that no file names, its name.
        sha256: hex digest over the rows and the metric; it does not change with the name, the
            place or the formatting of the files.
        train: may be empty.
        test: may be empty, but not both.
        metric: `acc` or `exact_match`.
        valid: rows to validate on, where they are a part of their own; else empty, and some of the
            training rows serve.
        revision: the commit of the data set on the Hub, where the rows are from there and it is
            known.
    """

    name: str
    path: Path
    sha256: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    metric: str
    valid: tuple[Row, ...] = ()
    revision: str | None = None


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
    data_set: HubTask | None = None
    folder: Path = Path()


def load_task(source: str, cached_only: bool = False) -> Task:
    """Loads and checks a whole task.

    Args:
        source: the path of a JSON Lines file (its rows are the training part), of a folder with
            `train.jsonl` or `test.jsonl`, or of a `task.yaml` or a folder that holds one.
        cached_only: fetch nothing: a data set of the Hub has to be in this machine's cache.

    Raises:
        InputError: the path is missing or no task, or a row cannot be used; the message names
            the file and the line, or the data set and the row.
    """
    path = Path(source).expanduser().absolute()
    return _load(_find_recipe(path, source), path, source, cached_only)


def load_task_fields(fields: Mapping[str, Any], cached_only: bool = False) -> Task:
    """Loads and checks a task from the fields of a `task.yaml`.

    Args:
        fields: paths in them are taken from the folder where the command runs.
        cached_only: as of `load_task`.

    Raises:
        InputError: as of `load_task`.
    """
    name = task_name(fields)
    recipe = _recipe(fields, f"task {name}", Path.cwd(), name)
    if recipe.data_set:
        return _load(recipe, Path(recipe.data_set.dataset), f"task {name}", cached_only)
    path = recipe.train or recipe.test or Path()
    return _load(recipe, path.absolute(), f"task {name}", cached_only)


def task_name(source: str | Mapping[str, Any]) -> str:
    """What a task is called as far as its path or its fields tell, without reading anything."""
    if isinstance(source, str):
        path = Path(source)
        named = path.parent if path.name == TASK_FILE else path
        return named.stem if named.suffix == ".jsonl" else named.name
    if "name" in source or "dataset" in source:
        return str(source.get("name") or Path(str(source["dataset"])).name)
    return Path(str(source.get("train", source.get("test", "task")))).stem


def _load(recipe: _Recipe, path: Path, source: str, cached_only: bool) -> Task:
    if recipe.data_set:
        found = read_hub_task(recipe.data_set, recipe.folder, cached_only)
        train, valid, test, revision = found.train, found.valid, found.test, found.revision
    else:
        train, test = (
            _read_rows(file, recipe) if file else () for file in (recipe.train, recipe.test)
        )
        valid, revision = (), None
    metric = _decide_metric(recipe, {"training": train, "validation": valid, "test": test}, source)
    digest = _digest(train, test, metric, valid)
    return Task(recipe.name, path, digest, train, test, metric, valid, revision)


def split_rows(
    rows: Sequence[Row], seed: int, valid_share: float = VALID_SHARE, limit: int | None = None
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
    used = _used(len(rows), limit)
    shuffled = _shuffled(rows, seed)
    valid = max(1, int(valid_share * used))
    return shuffled[: used - valid], shuffled[used - valid : used]


def _used(there: int, limit: int | None) -> int:
    """How many rows are trained and validated on."""
    used = there if limit is None else min(limit, there)
    if used < MIN_SPLIT_ROWS:
        raise InputError(
            f"{used} training rows are too few to train and validate on",
            f"at least {MIN_SPLIT_ROWS} are needed; about 100 are usual",
        )
    return used


def _shuffled(rows: Sequence[Row], seed: int) -> tuple[Row, ...]:
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return tuple(shuffled)


def training_split(
    task: Task, seed: int, limit: int | None = None
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """The training and validation rows of a task, as `split_rows` parts them.

    Of a task with validation rows of its own, a fifth of the limit is drawn from those, and the
    rest from its training rows: the paper's way (arXiv 2602.12323).

    Raises:
        InputError: the task has no training rows, or too few of them.
    """
    if not task.train:
        raise InputError(
            f"task {task.name} has no training rows",
            f"give a FILE.jsonl, or a folder with a {TRAIN_FILE}",
        )
    if not task.valid:
        return split_rows(task.train, seed, limit=limit)
    used = _used(len(task.train) + len(task.valid), limit)
    train, valid = _shuffled(task.train, seed), _shuffled(task.valid, seed)
    if used == len(train) + len(valid):
        return train, valid
    valid = valid[: max(1, int(VALID_SHARE * used))]
    return train[: used - len(valid)], valid


def overlap(train: Iterable[Row], test: Iterable[Row]) -> Overlap:
    """The rows of `test` whose input stands in `train` too, whatever its case and white space."""
    seen = {comparable(row.input) for row in train}
    shared = [row.input for row in test if comparable(row.input) in seen]
    return Overlap(len(shared), tuple(shared[:OVERLAP_EXAMPLES]))


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
    return _recipe(_read_yaml(path), str(path), path.parent, path.absolute().parent.name)


def _recipe(fields: Mapping[Any, Any], where: str, folder: Path, name: str) -> _Recipe:
    """The recipe that the fields of a task.yaml give.

    Args:
        fields: as they were written.
        where: how errors name their source.
        folder: that relative paths are taken from.
        name: of the task, where it gives itself none.
    """
    for field in fields:
        if field not in ALL_FIELDS:
            raise unknown_name(f"field in {where}", str(field), ALL_FIELDS)
    texts = {
        field: _yaml_text(fields[field], field, where)
        for field in FIELDS
        if field != "columns" and field in fields
    }
    if "metric" in texts:
        find_task_metric(texts["metric"])
    name, metric = texts.get("name", name), texts.get("metric")
    if any(field in fields for field in HUB_FIELDS):
        return _Recipe(name, metric=metric, data_set=_data_set(fields, where), folder=folder)
    parts = {part: folder / texts[part] for part in FILE_FIELDS if part in texts}
    if not parts:
        raise InputError(
            f"{where} names neither train nor test",
            "give at least one of them, or a data set: dataset: owner/name",
        )
    for part, file in parts.items():
        if not file.is_file():
            raise InputError(
                f"{where}: {part} is {texts[part]!r}, and there is no file {file}",
                f"give a path relative to the {TASK_FILE}",
            )
    return _Recipe(
        name=name,
        train=parts.get("train"),
        test=parts.get("test"),
        columns=_yaml_columns(fields.get("columns", {}), where),
        instruction=texts.get("instruction", ""),
        metric=metric,
    )


def _data_set(fields: Mapping[Any, Any], where: str) -> HubTask:
    """The data set that the fields of a task.yaml name, and how its rows are made."""
    if "dataset" not in fields:
        field = next(field for field in HUB_FIELDS if field in fields)
        raise InputError(
            f"{where}: {field} is of a data set, and none is named",
            f"name one, dataset: owner/name, or leave out {field}",
        )
    files = [field for field in FILE_FIELDS if field in fields]
    if files:
        raise InputError(
            f"{where} names both a data set and files ({', '.join(files)})",
            "rows come from one of them: leave out dataset, or the files",
        )
    own = {name: value for name, value in fields.items() if name in HubTask.model_fields}
    return HubTask.of(own, where)


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


def _yaml_text(value: object, field: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{where}: {field} is {described(value)}, not text", f"write {field}: some text"
        )
    return value


def _yaml_columns(value: object, where: str) -> tuple[str, str, str]:
    if not isinstance(value, dict):
        raise InputError(
            f"{where}: columns is {described(value)}, not a mapping",
            "write, for example, columns: {input: question, output: answer}",
        )
    for column in value:
        if column not in COLUMNS:
            raise unknown_name(f"column in {where}", str(column), COLUMNS)
    names = [
        _yaml_text(value.get(column, column), f"columns.{column}", where) for column in COLUMNS
    ]
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
        parse_row(line, f"{path}, line {number}", recipe.columns)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    )
    if not rows:
        raise InputError(f"{path} has no rows", ROW_HINT)
    return instructed(rows, recipe.instruction)


# --- the task as a whole ------------------------------------------------------------------------


def _decide_metric(recipe: _Recipe, parts: Mapping[str, tuple[Row, ...]], source: str) -> str:
    closed = all(row.choices for rows in parts.values() for row in rows)
    metric = recipe.metric or (ACC if closed else EXACT_MATCH)
    for part, rows in parts.items():
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


def _digest(
    train: tuple[Row, ...], test: tuple[Row, ...], metric: str, valid: tuple[Row, ...] = ()
) -> str:
    # Validation rows are named only where there are some: a task keeps the digest that it had
    # before there were any.
    named = {"train": train, "test": test} | ({"valid": valid} if valid else {})
    parts = {
        part: [[row.input, row.output, list(row.choices)] for row in rows]
        for part, rows in named.items()
    }
    canonical = json.dumps({"metric": metric, **parts}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()
