"""The example tasks: reproducible, disjoint, balanced, and as many as promised."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TASKS = Path(__file__).resolve().parents[2] / "examples" / "tasks"
INDEX: dict[str, dict[str, Any]] = json.loads((TASKS / "tasks.json").read_text("ascii"))
ROWS_PER_SPLIT = 400
MOST_WORDS = 45
each_task = pytest.mark.parametrize("task", sorted(INDEX))


@cache
def read_rows(task: str, split: str) -> list[dict[str, Any]]:
    lines = (TASKS / task / f"{split}.jsonl").read_text("ascii").splitlines()
    return [json.loads(line) for line in lines]


@cache
def normalised_inputs(task: str, split: str) -> list[str]:
    rows = read_rows(task, split)
    return [" ".join(re.findall(r"[a-z0-9]+", row["input"].lower())) for row in rows]


def written_files(folder: Path) -> dict[str, bytes]:
    paths = [folder / "tasks.json", *folder.glob("*/*.jsonl")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_generator_reproduces_the_committed_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-B", str(TASKS / "generate.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    assert written_files(tmp_path) == written_files(TASKS)


def test_another_seed_gives_other_rows(tmp_path: Path) -> None:
    command = [sys.executable, "-B", str(TASKS / "generate.py"), "--out", str(tmp_path)]
    subprocess.run([*command, "--seed", "8"], check=True)
    ours, theirs = written_files(TASKS), written_files(tmp_path)
    assert [name for name in ours if ours[name] == theirs[name]] == ["tasks.json"]


def test_there_are_enough_tasks_in_enough_families() -> None:
    families = Counter(facts["family"] for facts in INDEX.values())
    assert len(INDEX) >= 16
    assert len([family for family, members in families.items() if members >= 3]) >= 4
    assert any(members == 1 for members in families.values()), "no unrelated task"


@each_task
def test_splits_are_full_and_share_no_text(task: str) -> None:
    train, test = normalised_inputs(task, "train"), normalised_inputs(task, "test")
    assert len(train) == len(test) == ROWS_PER_SPLIT
    assert len(set(train + test)) == 2 * ROWS_PER_SPLIT


@each_task
def test_rows_are_short_and_answered_by_a_choice(task: str) -> None:
    for row in read_rows(task, "train") + read_rows(task, "test"):
        assert len(row["input"].split()) <= MOST_WORDS
        assert row["output"].strip() == row["output"] != ""
        if INDEX[task]["kind"] == "closed":
            assert row["output"] in row["choices"]
            assert len(set(row["choices"])) == len(row["choices"]) >= 2
        else:
            assert "choices" not in row


@each_task
@pytest.mark.parametrize("split", ["train", "test"])
def test_no_answer_or_place_is_a_safe_guess(task: str, split: str) -> None:
    rows = read_rows(task, split)
    if INDEX[task]["kind"] == "closed":
        # By place in the list: it also holds where every row has choices of its own.
        places = Counter(row["choices"].index(row["output"]) for row in rows)
        assert max(places.values()) - min(places.values()) <= 1
    else:
        answers = Counter(row["output"] for row in rows)
        assert max(answers.values()) <= ROWS_PER_SPLIT // 8


@each_task
def test_test_rows_use_words_that_training_never_saw(task: str) -> None:
    known = {word for text in normalised_inputs(task, "train") for word in text.split()}
    texts = normalised_inputs(task, "test")
    new = [text for text in texts if not known.issuperset(text.split())]
    assert len(new) >= ROWS_PER_SPLIT // 4
