"""Small tasks on disk."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

COLOURS = ("red", "green", "blue")


def closed_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows with choices; all inputs differ, and every answer comes up."""
    return [
        {
            "input": f"Which colour has item {number}?",
            "output": COLOURS[number * number % 7 % 3],
            "choices": list(COLOURS),
        }
        for number in range(start, start + count)
    ]


def open_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows without choices."""
    return [{"input": row["input"], "output": row["output"]} for row in closed_rows(count, start)]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Writes a JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_task(folder: Path, train: int = 40, test: int = 40, closed: bool = True) -> Path:
    """A task folder whose test rows are none of its training rows."""
    rows = closed_rows if closed else open_rows
    write_rows(folder / "train.jsonl", rows(train))
    write_rows(folder / "test.jsonl", rows(test, start=1000))
    return folder
