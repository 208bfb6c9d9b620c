"""What a task is, and how its rows are made."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

from families.sampling import Sampler, Split

ROWS_PER_SPLIT = 400
TRIES_PER_ROW = 2_000


class Row(TypedDict, total=False):
    """One line of a task's JSONL file; open tasks have no choices."""

    input: str
    output: str
    choices: list[str]


@dataclass(frozen=True)
class Example:
    """One text with its answer; `choices` only where they differ from row to row."""

    text: str
    answer: str
    choices: tuple[str, ...] = ()


Maker = Callable[[Sampler, int], Example]


@dataclass(frozen=True)
class Task:
    """A named task: the question put above every text and the maker of its examples.

    An open task has no `choices` (None); they are empty where every row brings its own.
    """

    name: str
    family: str
    question: str
    heading: str
    make: Maker
    choices: tuple[str, ...] | None = None

    @property
    def kind(self) -> str:
        """Whether the answer is one of the choices or free text."""
        return "open" if self.choices is None else "closed"

    def row(self, example: Example) -> Row:
        """Lay an example out as the row that is stored."""
        row = Row(
            input=f"{self.question}\n{self.heading}: {example.text}\nAnswer:",
            output=example.answer,
        )
        if choices := example.choices or self.choices:
            row["choices"] = list(choices)
        return row


def labelled(choices: Sequence[str], write: Callable[[Sampler, str], str]) -> Maker:
    """Make a maker that goes round the choices, so that the answers come out balanced."""

    def make(sampler: Sampler, number: int) -> Example:
        answer = choices[number % len(choices)]
        return Example(write(sampler, answer), answer)

    return make


def make_splits(task: Task, seed: int) -> dict[Split, list[Row]]:
    """Make both splits of a task; no text occurs twice, within a split or across them."""
    seen: set[str] = set()
    splits: tuple[Split, Split] = ("train", "test")
    return {split: _make_rows(task, seed, split, seen) for split in splits}


def normalised(text: str) -> str:
    """Reduce a text to what counts when two are compared: its letters and digits."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _make_rows(task: Task, seed: int, split: Split, seen: set[str]) -> list[Row]:
    # A seed that is a string is hashed by `random` itself, alike on every machine.
    rng = random.Random(f"{seed}:{task.name}:{split}")
    rows = [_new_row(task, rng, split, number, seen) for number in range(ROWS_PER_SPLIT)]
    rng.shuffle(rows)
    return rows


def _new_row(task: Task, rng: random.Random, split: Split, number: int, seen: set[str]) -> Row:
    for _ in range(TRIES_PER_ROW):
        sampler = Sampler(rng, split)
        example = task.make(sampler, number)
        key = normalised(example.text)
        if key not in seen and (split == "train" or sampler.drew_kept_back):
            seen.add(key)
            return task.row(example)
    raise RuntimeError(f"{task.name}: no new {split} row in {TRIES_PER_ROW} tries; add words")
