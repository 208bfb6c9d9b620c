"""Loading tasks, with the message for everything that can be wrong in one; splits; overlap."""

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_cli.errors import ExitCode, InputError
from recycle_cli.evaluation.tasks import Row, load_task, overlap, split_rows

GOOD = {"input": "Is it good? Answer:", "output": "yes", "choices": ["yes", "no"]}
OPEN = {"input": "2 + 2 =", "output": "4"}


def write(path: Path, *rows: Any) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def refusal(source: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        load_task(str(source))
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.hint
    return caught.value


# --- the forms of a task --------------------------------------------------------------------------


def test_one_file_is_for_training(tmp_path: Path) -> None:
    task = load_task(str(write(tmp_path / "mine.jsonl", GOOD, GOOD)))
    assert (task.name, task.path, task.metric) == ("mine", tmp_path / "mine.jsonl", "acc")
    assert task.train == (Row("Is it good? Answer:", "yes", ("yes", "no")),) * 2
    assert task.test == ()


@pytest.mark.parametrize("present", [("train",), ("test",), ("train", "test")])
def test_folder(tmp_path: Path, present: tuple[str, ...]) -> None:
    for part in present:
        write(tmp_path / f"{part}.jsonl", OPEN)
    task = load_task(str(tmp_path))
    assert (task.name, task.metric) == (tmp_path.name, "exact_match")
    assert (len(task.train), len(task.test)) == ("train" in present, "test" in present)


def test_yaml_renames_instructs_and_names(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"question": "2 + 2 =", "label": "4", "options": ["4", "5"]})
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "task.yaml").write_text(
        "name: sums\n"
        "test: ../a.jsonl\n"
        "columns: {input: question, output: label, choices: options}\n"
        "instruction: Add up.\n"
        "metric: exact_match\n"
    )
    by_file = load_task(str(tmp_path / "sub" / "task.yaml"))
    by_folder = load_task(str(tmp_path / "sub"))
    assert by_file.test == (Row("Add up.\n2 + 2 =", "4", ("4", "5")),)
    assert (by_file.name, by_file.metric, by_file.train) == ("sums", "exact_match", ())
    assert by_folder.sha256 == by_file.sha256


def test_yaml_without_a_name_takes_the_folders(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", OPEN)
    (tmp_path / "task.yaml").write_text("train: a.jsonl\n")
    assert load_task(str(tmp_path)).name == tmp_path.name


def test_metric_is_acc_only_where_every_row_has_choices(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GOOD)
    write(tmp_path / "test.jsonl", GOOD, OPEN)
    assert load_task(str(tmp_path)).metric == "exact_match"


def test_sha256_is_of_the_content(tmp_path: Path) -> None:
    plain = load_task(str(write(tmp_path / "plain.jsonl", GOOD, OPEN)))
    other = tmp_path / "other.jsonl"
    reordered = json.dumps(dict(reversed(GOOD.items())), indent=None, separators=(" , ", " : "))
    text = "\ufeff" + reordered + "\r\n\r\n" + json.dumps({**OPEN, "source": "x", "choices": None})
    other.write_bytes(text.encode())
    assert load_task(str(other)).sha256 == plain.sha256
    assert re.fullmatch("[0-9a-f]{64}", plain.sha256)

    changed = [
        write(tmp_path / "order.jsonl", OPEN, GOOD),
        write(tmp_path / "choices.jsonl", {**GOOD, "choices": ["no", "yes"]}, OPEN),
        write(tmp_path / "output.jsonl", GOOD, {**OPEN, "output": "5"}),
    ]
    (tmp_path / "part").mkdir()
    write(tmp_path / "part" / "test.jsonl", GOOD, OPEN)
    changed.append(tmp_path / "part")
    digests = [plain.sha256, *(load_task(str(path)).sha256 for path in changed)]
    assert len(set(digests)) == len(digests)


def test_the_metric_is_part_of_the_sha256(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "task.yaml").write_text("train: a.jsonl\nmetric: exact_match\n")
    assert load_task(str(tmp_path)).sha256 != load_task(str(tmp_path / "a.jsonl")).sha256


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path: Path) -> None:
    row = {"input": "a\u2028b\u0085c\x0bd", "output": "e"}
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert load_task(str(path)).train[0].input == row["input"]


# --- what can be wrong with a row -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{nope", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('"text"', "is the text 'text', not an object"),
        ("3", "is the number 3, not an object"),
        ("[]", "is a list, not an object"),
        ("null", "is null, not an object"),
        ({"output": "x"}, "has no field 'input'"),
        ({"input": "x"}, "has no field 'output'"),
        ({"input": " \n", "output": "x"}, "'input' is empty"),
        ({"input": "x", "output": ""}, "'output' is empty"),
        ({"input": ["x"], "output": "x"}, "'input' is a list, not text"),
        ({"input": "x", "output": 3}, "'output' is the number 3, not text"),
        ({"input": "x", "output": True}, "'output' is true, not text"),
        ({"input": "x", "output": None}, "'output' is null, not text"),
        ({"input": "x", "output": {}}, "'output' is an object, not text"),
        ('{"input": "x", "output": "\\ud800"}', "'output' holds half of a surrogate pair"),
        ({**GOOD, "choices": "yes"}, "'choices' is the text 'yes', not a list"),
        ({**GOOD, "choices": []}, "'choices' has 0 of the 2 or more that it needs"),
        ({**GOOD, "choices": ["yes"]}, "'choices' has 1 of the 2 or more that it needs"),
        ({**GOOD, "choices": ["yes", 0]}, "choice 2 of 'choices' is the number 0, not text"),
        ({**GOOD, "choices": ["yes", ""]}, "choice 2 of 'choices' is empty"),
        ({**GOOD, "choices": ["yes", "no", "no"]}, "'choices' has 'no' more than once"),
        (
            {**GOOD, "output": "Yes"},
            "'output' is 'Yes', which is not among 'choices': 'yes', 'no'",
        ),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, bad: Any, message: str) -> None:
    path = write(tmp_path / "t.jsonl", OPEN, "", bad, OPEN)
    error = refusal(path)
    assert error.message.startswith(f"{path}, line 3")
    assert message in error.message


def test_a_number_is_shown_as_text_in_the_hint(tmp_path: Path) -> None:
    error = refusal(write(tmp_path / "t.jsonl", {"input": "x", "output": 3}))
    assert error.hint == 'write it as "3"'


def test_not_utf8_is_named_by_line(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(json.dumps(OPEN).encode() + b'\n{"input": "caf\xe9", "output": "x"}\n')
    assert refusal(path).message == f"{path}, line 2 is not UTF-8"


def test_renamed_columns_are_named_in_errors(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"q": "x", "output": "y"}, {"output": "y"})
    (tmp_path / "task.yaml").write_text("train: a.jsonl\ncolumns: {input: q}\n")
    assert refusal(tmp_path).message == f"{tmp_path / 'a.jsonl'}, line 2 has no field 'q'"


@pytest.mark.parametrize("content", ["", "\n \r\n"])
def test_no_rows(tmp_path: Path, content: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(content)
    assert refusal(path).message == f"{path} has no rows"


# --- what can be wrong with the task --------------------------------------------------------------


def test_missing_path_says_what_a_task_can_be(tmp_path: Path) -> None:
    error = refusal(tmp_path / "none")
    assert error.message == f"there is no task at {str(tmp_path / 'none')!r}"
    for form in ("FILE.jsonl", "train.jsonl", "test.jsonl", "task.yaml"):
        assert form in error.hint


def test_folder_without_a_task(tmp_path: Path) -> None:
    assert "has no task.yaml, train.jsonl or test.jsonl" in refusal(tmp_path).message


def test_other_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", OPEN)
    assert refusal(path).message == f"{str(path)!r} is not a task: its name ends in '.csv'"


def test_folder_named_as_a_file_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").mkdir()
    assert "cannot be read: Is a directory" in refusal(tmp_path).message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "task.yaml, line 1 is not YAML"),
        ("train: a.jsonl\nname: 'x", "task.yaml, line 2 is not YAML"),
        ("just words", "task.yaml does not hold fields"),
        ("", "task.yaml does not hold fields"),
        ("name: x", "task.yaml names neither train nor test"),
        ("train: a.jsonl\ntrian: b.jsonl", "unknown field in"),
        ("train: 3", "task.yaml: train is the number 3, not text"),
        ("train: ''", "task.yaml: train is the text '', not text"),
        ("train: a.jsonl\nname: [x]", "task.yaml: name is a list, not text"),
        ("train: gone.jsonl", "task.yaml: train is 'gone.jsonl', and there is no file"),
        ("train: a.jsonl\ncolumns: input", "columns is the text 'input', not a mapping"),
        ("train: a.jsonl\ncolumns: {inputs: q}", "unknown column in"),
        ("train: a.jsonl\ncolumns: {input: 3}", "columns.input is the number 3, not text"),
        ("train: a.jsonl\nmetric: f1", "a task cannot have 'f1'"),
        ("train: a.jsonl\nmetric: acc", "the metric 'acc' needs choices, and training row 2"),
        ("test: a.jsonl\nmetric: acc", "the metric 'acc' needs choices, and test row 2"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "a.jsonl", GOOD, OPEN)
    (tmp_path / "task.yaml").write_text(text)
    assert message in refusal(tmp_path).message


def test_yaml_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_bytes(b"name: caf\xe9\n")
    assert refusal(tmp_path).message.endswith("task.yaml is not YAML")


def test_unknown_names_come_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", OPEN)
    (tmp_path / "task.yaml").write_text("trian: a.jsonl")
    assert "did you mean train" in refusal(tmp_path).hint


def test_an_answer_that_silence_would_match_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", OPEN, {"input": "x", "output": "..."})
    assert (
        "the output '...' of test row 2 is empty once it is normalised" in refusal(tmp_path).message
    )


# --- splits ---------------------------------------------------------------------------------------


def numbered(count: int) -> list[Row]:
    return [Row(f"input {number}", str(number)) for number in range(count)]


def test_a_hundred_rows_make_80_and_20() -> None:
    train, valid = split_rows(numbered(400), seed=0, limit=100)
    assert (len(train), len(valid)) == (80, 20)


@given(
    count=st.integers(5, 60),
    seed=st.integers(0, 2**32),
    share=st.floats(0.01, 0.99),
    limit=st.none() | st.integers(5, 80),
)
def test_split_is_a_reproducible_partition(
    count: int, seed: int, share: float, limit: int | None
) -> None:
    rows = numbered(count)
    train, valid = split_rows(rows, seed, share, limit)
    used = count if limit is None else min(limit, count)
    assert len(train) + len(valid) == used
    assert len(valid) == max(1, int(share * used))
    assert train
    assert max(Counter(train + valid).values()) == 1
    assert set(train + valid) <= set(rows)
    assert split_rows(rows, seed, share, limit) == (train, valid)


@given(seed=st.integers(0, 1000), limit=st.integers(5, 40))
def test_a_limit_takes_the_first_of_the_shuffled_rows(seed: int, limit: int) -> None:
    # So that what is learnt from fewer rows can be compared with what is learnt from more.
    train, valid = split_rows(numbered(40), seed, limit=limit)
    all_train, all_valid = split_rows(numbered(40), seed)
    assert train + valid == (all_train + all_valid)[:limit]


def test_the_seed_matters_and_the_shuffle_never_changes() -> None:
    train, valid = split_rows(numbered(10), seed=7)
    # Written down once: a change here would change every result that was ever published.
    assert [row.output for row in train + valid] == list("8314709625")
    assert split_rows(numbered(10), seed=8) != (train, valid)


@pytest.mark.parametrize(("count", "limit"), [(4, None), (0, None), (100, 4), (100, 0)])
def test_too_few_rows_to_split(count: int, limit: int | None) -> None:
    used = count if limit is None else limit
    with pytest.raises(InputError, match=f"^{used} training rows are too few"):
        split_rows(numbered(count), seed=0, limit=limit)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_share_out_of_range(share: float) -> None:
    with pytest.raises(InputError, match="the validation share is"):
        split_rows(numbered(10), seed=0, valid_share=share)


def test_overlap_ignores_case_and_white_space() -> None:
    train = [Row("The  cat\nsat.", "a"), Row("A dog", "b")]
    test = [Row(" the cat sat. ", "x"), Row("a dog ran", "y"), Row("A DOG", "z")]
    found = overlap(train, test)
    assert (found.count, found.examples) == (2, (" the cat sat. ", "A DOG"))
    assert overlap([], test).count == 0


def test_overlap_shows_the_first_few() -> None:
    found = overlap(numbered(10), numbered(20))
    assert (found.count, found.examples) == (10, ("input 0", "input 1", "input 2"))


# --- real tasks -----------------------------------------------------------------------------------


def test_real_tasks_load_and_keep_their_parts_apart() -> None:
    data = os.environ.get("RECYCLE_DATA")
    if not data:
        pytest.skip("RECYCLE_DATA is not set: it names the folder that holds tasks/")
    folders = sorted((Path(data) / "tasks").iterdir())
    assert folders
    for folder in folders:
        task = load_task(str(folder))
        assert len(task.train) >= 100
        assert len(task.test) >= 100
        assert overlap(task.train, task.test).count == 0
        assert (task.metric == "acc") == bool(task.train[0].choices)
