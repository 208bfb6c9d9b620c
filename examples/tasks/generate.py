"""Write the example tasks: `python generate.py [--out DIR] [--seed N]`.

The same seed gives the same bytes on every machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from families import TASKS
from families.task import Row, Task, make_splits

DEFAULT_SEED = 7


def main() -> None:
    """Write every task and the index of the tasks."""
    options = _parse_arguments()
    for task in TASKS:
        _write_task(task, options.out, options.seed)
    _write_index(options.out / "tasks.json")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write the example tasks.")
    here = Path(__file__).resolve().parent
    parser.add_argument("--out", type=Path, default=here, help="folder to write to")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="seed of all drawing")
    return parser.parse_args()


def _write_task(task: Task, out: Path, seed: int) -> None:
    folder = out / task.name
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in make_splits(task, seed).items():
        _write_text(folder / f"{split}.jsonl", _as_lines(rows))


def _as_lines(rows: Iterable[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)


def _write_index(path: Path) -> None:
    index = {
        task.name: {
            "family": task.family,
            "kind": task.kind,
            "question": task.question,
            "choices": list(task.choices or ()),
        }
        for task in TASKS
    }
    _write_text(path, json.dumps(index, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    # Bytes, so that no platform changes the line ends.
    path.write_bytes(text.encode("ascii"))


if __name__ == "__main__":
    main()
