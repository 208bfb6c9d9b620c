"""A data set of the Hub, or a folder in the same form, opened with the `datasets` library."""

import contextlib
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recycle_cli.errors import InputError

if TYPE_CHECKING:
    from recycle_cli.evaluation.hub_task import HubTask

BATCH = 1000
LONGEST_REASON = 300
COMMIT = re.compile("[0-9a-f]{40}")
SPLIT_NAME = re.compile(r"\s*([^\[\s]+)")
HUB_PREFIX = "hf://datasets/"
"""Without it, `datasets` would take a folder of the same name here for the data set."""


@dataclass(frozen=True)
class Table:
    """A part of a data set.

    Args:
        name: what errors call it.
        rows: the part, as `datasets` gives it.
    """

    name: str
    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """Their names."""
        return list(self.rows.column_names)

    def only(self, columns: Sequence[str]) -> "Table":
        """The part with some columns alone."""
        return replace(self, rows=self.rows.select_columns(list(dict.fromkeys(columns))))

    def class_names(self, column: str) -> list[str] | None:
        """What the numbers in a column mean; None where they mean themselves."""
        names: list[str] | None = getattr(self.rows.features[column], "names", None)
        return names

    def values(self, column: str) -> list[Any]:
        """The different values of a column, which holds no lists."""
        values: list[Any] = self.rows.unique(column)
        return values

    def fields(self, order: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The place of each row and its fields, in an order of places."""
        for start in range(0, len(order), BATCH):
            places = list(order[start : start + BATCH])
            batch = self.rows[places]
            for index, place in enumerate(places):
                yield place, {column: values[index] for column, values in batch.items()}

    def shuffled(self, seed: int) -> list[int]:
        """The places of the rows, shuffled as `datasets` does it."""
        order: list[int] = np.random.default_rng(seed).permutation(len(self)).tolist()
        return order

    def parted(self, share: float, seed: int) -> tuple["Table", "Table"]:
        """All but a share of the rows, and these, drawn as `datasets` draws them.

        Raises:
            InputError: there are too few rows.
        """
        if len(self) < 2:
            raise InputError(
                f"{self.name} has {len(self)} rows, too few to set some aside for a test part",
                "name a test part in splits",
            )
        # With `train_test_split` itself a file of the places that were drawn stays in the cache.
        order, count = self.shuffled(seed), math.ceil(share * len(self))
        test, train = (
            self.rows.select(places, keep_in_memory=True)
            for places in (order[:count], order[count:])
        )
        return replace(self, rows=train), Table(f"{self.name}, test rows", test)


@dataclass(frozen=True)
class DataSet:
    """A data set that is ready to be read.

    Args:
        name: what errors call it.
        builder: of `datasets`, with the data prepared.
        revision: the commit that the data are from; None of a folder.
    """

    name: str
    builder: Any
    revision: str | None

    @property
    def splits(self) -> list[str]:
        """The names of its parts."""
        return list(self.builder.info.splits)

    def table(self, split: str) -> Table:
        """A part, a slice of one, or several joined by `+`.

        Raises:
            InputError: there is no such part, or it is no slice.
        """
        for piece in split.split("+"):
            named = SPLIT_NAME.match(piece)
            if named is None or named[1] not in self.splits:
                raise InputError(
                    f"{self.name} has no split {piece.strip()!r}",
                    f"name in splits some of: {', '.join(self.splits)}",
                )
        try:
            return Table(f"{self.name}, split {split}", self.builder.as_dataset(split=split))
        except (ValueError, AssertionError) as error:
            raise InputError(
                f"{self.name}: {split!r} is no slice of a split: {_reason(error)}",
                "write it as in train[:1000] or train[10%:20%]",
            ) from error


@contextlib.contextmanager
def opened(task: "HubTask", folder: Path, cached_only: bool) -> Iterator[DataSet]:
    """A data set, prepared, for as long as its rows are read.

    What is fetched from the Hub stays in the cache of `datasets`; of a folder nothing stays.

    Args:
        task: which data set.
        folder: that a relative path is taken from.
        cached_only: fetch nothing.

    Raises:
        InputError: it cannot be had, or the cache holds another revision of it.
    """
    from recycle_cli.evaluation.lm_eval_run import without_chatter

    with contextlib.ExitStack() as stack:
        if task.local:
            place = _folder(task, folder)
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="recycle-"))
        else:
            place, cache = HUB_PREFIX + task.dataset, None
            stack.enter_context(_offline() if cached_only else contextlib.nullcontext())
        name = task.dataset + (f" ({task.config})" if task.config else "")
        try:
            with without_chatter(), _without_warnings():
                builder = _prepared(place, task, cache)
        # `datasets` lets through whatever the Hub's client, Arrow and the readers of files raise.
        except Exception as error:
            raise _unavailable(name, task, error) from error
        yield DataSet(name, builder, _revision(name, builder, task))


def _folder(task: "HubTask", folder: Path) -> str:
    place = (folder / Path(task.dataset).expanduser()).absolute()
    if not place.is_dir():
        raise InputError(
            f"dataset is {task.dataset!r}, and there is no folder {place}",
            "name a folder, or a data set of the Hub as owner/name",
        )
    return str(place)


def _prepared(place: str, task: "HubTask", cache: str | None) -> Any:
    from datasets import load_dataset_builder

    builder = load_dataset_builder(place, task.config, revision=task.revision, cache_dir=cache)
    builder.download_and_prepare()
    return builder


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Else `datasets` says of every data set that it comes from the cache."""
    from datasets.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Keeps `datasets` to its cache for a while."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _revision(name: str, builder: Any, task: "HubTask") -> str | None:
    """The commit that the data are from.

    Raises:
        InputError: another one is asked for: without the Hub `datasets` takes the latest that the
            cache holds.
    """
    if task.local:
        return None
    found = builder.hash if COMMIT.fullmatch(builder.hash or "") else None
    if task.revision and COMMIT.fullmatch(task.revision) and found != task.revision:
        raise InputError(
            f"the cache holds {name} at {found or 'an unknown revision'}, not at {task.revision}",
            "run it where the Hub can be reached, or leave out revision",
        )
    return found


def _unavailable(name: str, task: "HubTask", error: Exception) -> InputError:
    from datasets import config

    if task.local:
        return InputError(
            f"the folder {name} cannot be read as a data set: {_reason(error)}",
            "it holds files such as train.parquet and test.parquet, or .jsonl, .csv",
        )
    if config.HF_HUB_OFFLINE and isinstance(error, (ConnectionError, FileNotFoundError)):
        return InputError(
            f"the data set {name} is not in this machine's cache",
            "run it once without --offline where the Hub can be reached, or copy the cache "
            "(HF_HOME) from a machine that has it",
        )
    return InputError(
        f"the data set {name} cannot be had: {_reason(error)}",
        "check its name and config and the network; of a gated one accept the terms on its page, "
        "and set HF_TOKEN",
    )


def _reason(error: BaseException) -> str:
    """The words of the error that is at the bottom of it, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]}..."
