"""Tasks from data sets: the rows that columns make, the parts, what is left out, and every refusal.

The data sets are written and, where rows are drawn, drawn again with the `datasets` library itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.data_sets import COMMIT, Part, pairs, put_in_cache, use_cache, write_data
from support.tasks import write_rows

import recycle_cli
from recycle_cli.errors import ExitCode, InputError
from recycle_cli.evaluation.hub_task import HubTask, Splits
from recycle_cli.evaluation.tasks import Row, Task, load_task, load_task_fields, training_split


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_cache(monkeypatch, tmp_path / "cache")


def write_task(folder: Path, **fields: Any) -> Path:
    """A task.yaml that names the data set beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({"dataset": "./data", **fields})
    (folder / "task.yaml").write_text(text, encoding="utf-8")
    return folder


def load(folder: Path, **fields: Any) -> Task:
    return load_task(str(write_task(folder, **fields)))


def refusal(folder: Path, **fields: Any) -> InputError:
    return refused(str(write_task(folder, **fields)))


def refused(source: str | Mapping[str, Any]) -> InputError:
    with pytest.raises(InputError) as caught:
        load_task(source) if isinstance(source, str) else load_task_fields(source)
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


PAIR = {"input": ["premise", "hypothesis"], "output": "label", "choices": "labels"}


# --- rows -----------------------------------------------------------------------------------------


def test_several_columns_make_an_input_and_label_names_the_answers(tmp_path: Path) -> None:
    write_data(tmp_path / "data", train=pairs(6), test=pairs(3, start=100))
    task = load(tmp_path, columns=PAIR, instruction="Does it follow? One of: {labels}.")
    assert task.train[1] == Row(
        "Does it follow? One of: no; maybe; yes.\n"
        "PREMISE - There are 1 cats. [SEP] \nHYPOTHESIS - There are 2 cats.",
        "maybe",
        ("no", "maybe", "yes"),
    )
    assert [row.output for row in task.test] == ["maybe", "yes", "no"]
    assert (task.name, task.metric, len(task.train), task.valid) == (tmp_path.name, "acc", 6, ())


def test_input_columns_bear_the_names_that_they_are_given(tmp_path: Path) -> None:
    write_data(tmp_path / "data", train=pairs(3), test=pairs(1))
    columns = {"input": {"A": "hypothesis", "B": "label"}, "output": "premise"}
    task = load(tmp_path, columns=columns)
    assert task.test == (Row("A - There are 0 cats. [SEP] \nB - 0", "There are 0 cats."),)
    assert task.metric == "exact_match"


def test_an_empty_column_has_no_line(tmp_path: Path) -> None:
    part: Part = {"a": ["x", ""], "b": ["y", "z"], "label": [0, 1]}
    write_data(tmp_path / "data", train=part, test=part)
    task = load(tmp_path, columns={"input": ["a", "b"], "output": "label"})
    assert [row.input for row in task.test] == ["A - x [SEP] \nB - y", "B - z"]


@pytest.mark.parametrize(
    ("given", "answers", "choices"),
    [
        ([0, 2, 1, 10], ["0", "2", "1", "10"], ("0", "1", "2", "10")),
        (["b", "a", "b", "c"], ["b", "a", "b", "c"], ("a", "b", "c")),
        ([True, False, True, True], ["True", "False", "True", "True"], ("False", "True")),
    ],
)
def test_labels_without_names_are_themselves(
    tmp_path: Path, given: list[Any], answers: list[str], choices: tuple[str, ...]
) -> None:
    part: Part = {"text": list("wxyz"), "label": given}
    write_data(tmp_path / "data", names=None, train=part, test=part)
    task = load(tmp_path, columns={"input": "text", "output": "label", "choices": "labels"})
    assert [row.output for row in task.test] == answers
    assert {row.choices for row in task.test} == {choices}


@pytest.mark.parametrize(
    ("given", "names"),
    [([0, 1], None), ([False, True], None), (["0", "1"], None), ([0, 1], ["f", "t"])],
)
def test_labels_can_be_called_otherwise(
    tmp_path: Path, given: list[Any], names: list[str] | None
) -> None:
    part: Part = {"text": ["x", "y"], "label": given}
    write_data(tmp_path / "data", names=names, train=part, test=part)
    for called in (names or given, given):
        task = load(
            tmp_path,
            columns={"input": "text", "output": "label", "choices": "labels"},
            labels={called[0]: "fine", called[1]: "rude"},
        )
        assert task.test == (
            Row("x", "fine", ("fine", "rude")),
            Row("y", "rude", ("fine", "rude")),
        )


OPTIONS = [["red", "blue"], ["green", "B"]]


@pytest.mark.parametrize(
    ("options", "answers", "expected"),
    [
        (OPTIONS, [1, 0], ["blue", "green"]),
        (OPTIONS, ["B", "A"], ["blue", "green"]),
        (OPTIONS, ["1", "0"], ["blue", "green"]),
        # A text that stands among the options is itself before it is a letter.
        (OPTIONS, ["red", "B"], ["red", "B"]),
        (
            [{"label": ["1", "2"], "text": one} for one in OPTIONS],
            ["2", "1"],
            ["blue", "green"],
        ),
    ],
)
def test_answers_by_place_letter_or_text_of_an_option(
    tmp_path: Path, options: list[Any], answers: list[Any], expected: list[str]
) -> None:
    part: Part = {"q": ["first", "second"], "options": options, "answer": answers}
    write_data(tmp_path / "data", train=part, test=part)
    columns = {"input": "q", "output": "answer", "choices": "options"}
    rows = load(tmp_path, columns=columns).test
    assert [row.output for row in rows] == expected
    assert [list(row.choices) for row in rows] == OPTIONS


def test_options_in_an_input_stand_one_a_line(tmp_path: Path) -> None:
    part: Part = {
        "q": ["Which?"],
        "plain": [["red", "blue"]],
        "marked": [{"label": ["x", "y"], "text": ["red", "blue"]}],
        "answer": ["B"],
    }
    write_data(tmp_path / "data", train=part, test=part)
    columns = {"input": ["q", "plain", "marked"], "output": "answer"}
    assert load(tmp_path, columns=columns).test[0].input == (
        "Q - Which? [SEP] \nPLAIN - A: red\nB: blue [SEP] \nMARKED - x: red\ny: blue"
    )


def test_json_lines_do_too_and_the_digest_is_of_the_rows(tmp_path: Path) -> None:
    rows = [{"q": f"{number} + 1 =", "a": str(number + 1)} for number in range(6)]
    write_rows(tmp_path / "hub" / "data" / "train.jsonl", rows[:4])
    write_rows(tmp_path / "hub" / "data" / "test.jsonl", rows[4:])
    columns = {"input": "q", "output": "a"}
    task = load(tmp_path / "hub", columns=columns, name="sums")
    files = tmp_path / "files"
    for part in ("train", "test"):
        file = tmp_path / "hub" / "data" / f"{part}.jsonl"
        made = [json.loads(line) for line in file.read_text().splitlines()]
        write_rows(files / f"{part}.jsonl", ({"input": r["q"], "output": r["a"]} for r in made))
    plain = load_task(str(files))
    assert (task.train, task.test, task.sha256) == (plain.train, plain.test, plain.sha256)
    assert task.name == "sums"


def test_of_a_folder_nothing_stays_in_the_cache(tmp_path: Path, cache: Path) -> None:
    write_data(tmp_path / "data", train=pairs(30))
    load(tmp_path, columns=PAIR, rows={"train": 5, "test": 2})
    assert not cache.exists()


# --- parts ----------------------------------------------------------------------------------------


def test_without_a_test_part_a_tenth_of_the_rows_is_one(tmp_path: Path) -> None:
    from datasets import Dataset

    part = pairs(95)
    write_data(tmp_path / "data", train=part)
    task = load(tmp_path, columns={"input": "premise", "output": "hypothesis"})
    drawn = Dataset.from_dict(part).train_test_split(test_size=0.1, seed=123)
    assert [row.input for row in task.test] == drawn["test"]["premise"]
    assert [row.input for row in task.train] == drawn["train"]["premise"]
    assert len(task.test) == 10


def test_parts_are_drawn_as_datasets_shuffles_them(tmp_path: Path) -> None:
    from datasets import Dataset

    train, test = pairs(40), pairs(30, start=100)
    write_data(tmp_path / "data", train=train, test=test)
    columns = {"input": "premise", "output": "hypothesis"}
    task = load(tmp_path, columns=columns, rows={"train": 7, "test": 100})
    assert [r.input for r in task.train] == Dataset.from_dict(train).shuffle(seed=123)["premise"][
        :7
    ]
    assert [row.input for row in task.test] == test["premise"]


def test_splits_by_other_names_and_slices(tmp_path: Path) -> None:
    write_data(tmp_path / "data", train=pairs(20), dev=pairs(10, 50), other=pairs(10, 80))
    splits = {"train": "train[:50%]+other[:2]", "valid": "dev[5:]", "test": "other[2:]"}
    task = load(tmp_path, columns={"input": "premise", "output": "label"}, splits=splits)
    kept = [*range(10), 80, 81]
    assert [row.input for row in task.train] == [f"There are {number} cats." for number in kept]
    assert len(task.valid) == 5
    assert len(task.test) == 8


@pytest.mark.parametrize("name", ["validation", "valid", "dev"])
def test_a_validation_part_is_drawn_from_for_validation(tmp_path: Path, name: str) -> None:
    write_data(tmp_path / "data", train=pairs(200), test=pairs(9, 900), **{name: pairs(60, 500)})
    task = load(tmp_path, columns=PAIR)
    assert (len(task.train), len(task.valid), len(task.test)) == (200, 60, 9)
    train, valid = training_split(task, seed=1, limit=100)
    assert (len(train), len(valid)) == (80, 20)
    assert set(train) <= set(task.train)
    assert set(valid) <= set(task.valid)
    fewer = training_split(task, seed=1, limit=10)
    assert (fewer[0], fewer[1]) == (train[:8], valid[:2])
    assert training_split(task, seed=2, limit=100) != (train, valid)
    everything = training_split(task, seed=1)
    assert (len(everything[0]), len(everything[1])) == (200, 60)
    with pytest.raises(InputError, match="4 training rows are too few"):
        training_split(task, seed=1, limit=4)


def test_validation_rows_are_part_of_the_digest(tmp_path: Path) -> None:
    write_data(tmp_path / "data", train=pairs(20), test=pairs(9, 900), validation=pairs(6, 500))
    whole = load(tmp_path, columns=PAIR)
    parts = {"train": "train", "test": "test"}
    assert load(tmp_path, columns=PAIR, splits=parts).sha256 != whole.sha256


def test_a_test_part_alone_is_a_task(tmp_path: Path) -> None:
    write_data(tmp_path / "data", test=pairs(9))
    task = load(tmp_path, columns=PAIR)
    assert (task.train, len(task.test)) == ((), 9)


# --- what is left out -----------------------------------------------------------------------------


def test_rows_without_a_label_are_refused_or_left_out(tmp_path: Path) -> None:
    part: Part = {"text": list("abcd"), "label": [0, -1, 1, None]}
    write_data(tmp_path / "data", train=part, test={"text": ["e"], "label": [2]})
    columns = {"input": "text", "output": "label", "choices": "labels"}
    error = refusal(tmp_path, columns=columns)
    assert error.message == "./data, split train, row 2 has no answer: 'label' is the number -1"
    task = load(tmp_path, columns=columns, leave_out=["unusable"])
    assert [row.input for row in task.train] == ["a", "c"]


def test_more_useless_rows_than_others_are_a_mistake(tmp_path: Path) -> None:
    part: Part = {"text": list("abc"), "label": [0, 1, 2]}
    write_data(tmp_path / "data", train=part, test=part)
    error = refusal(
        tmp_path,
        columns={"input": "text", "output": "label"},
        labels={0: "nil"},
        leave_out=["unusable"],
    )
    assert error.message.startswith("2 rows of ./data, split test are of no use, and 1 are, as")
    assert "labels does not name '1', which 'label' is" in error.message


def test_training_rows_that_are_test_rows_too_can_be_left_out(tmp_path: Path) -> None:
    write_data(tmp_path / "data", train=pairs(20), validation=pairs(6, 8), test=pairs(10, start=10))
    columns = {"input": "premise", "output": "label"}
    assert len(load(tmp_path, columns=columns).train) == 20
    # That most rows are left out for this is no sign of a mistake.
    task = load(tmp_path, columns=columns, leave_out=["overlap", "unusable"])
    assert (len(task.train), len(task.valid), len(task.test)) == (10, 2, 10)


def test_long_inputs_are_left_out(tmp_path: Path) -> None:
    part: Part = {"text": ["short", "x" * 30, "tiny"], "label": [0, 1, 2]}
    write_data(tmp_path / "data", train=part, test=part)
    columns = {"input": "text", "output": "label"}
    # The instruction and the line break count.
    task = load(tmp_path, columns=columns, instruction="Say:", max_characters=10)
    assert [row.input for row in task.test] == ["Say:\nshort", "Say:\ntiny"]
    assert (
        "has no rows that can be used"
        in refusal(tmp_path, columns=columns, max_characters=3).message
    )


# --- refusals -------------------------------------------------------------------------------------

TEXT = {"input": "premise", "output": "label"}


@pytest.fixture(scope="module")
def cats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set that nothing is wrong with."""
    folder = tmp_path_factory.mktemp("cats")
    write_data(folder / "data", train=pairs(6), test=pairs(3, start=100))
    return folder


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        ({"columns": {"input": "text"}}, "has no column 'text'", "premise, hypothesis, label"),
        ({"columns": {**TEXT, "output": "y"}}, "./data, split train has no column 'y'", "premise"),
        ({"columns": {**TEXT, "choices": "c"}}, "has no column 'c'", "premise"),
        ({"columns": {**TEXT, "choices": "hypothesis"}}, "not options", "a list"),
        ({"columns": {"inputs": "x"}}, "columns.inputs: Extra inputs are not", "docs/tasks.md"),
        ({"columns": {"input": 3}}, "columns.input: name a column, a list of", "docs/tasks.md"),
        ({"columns": {"input": []}}, "columns.input: name a column, a list of", "docs/tasks.md"),
        ({"columns": ["premise"]}, "columns: ", "docs/tasks.md"),
        ({"splits": {"train": "training"}}, "./data has no split 'training'", "train, test"),
        ({"splits": {"train": "train+dev"}}, "./data has no split 'dev'", "train, test"),
        ({"splits": {"train": "train[a:b]"}}, "'train[a:b]' is no slice", "train[:1000]"),
        ({"splits": {"train": "train[:200%]"}}, "'train[:200%]' is no slice", "train[:1000]"),
        ({"splits": {}}, "splits names no part of ./data", "train, test"),
        ({"splits": {"testing": "test"}}, "splits.testing: Extra inputs are not", "docs/tasks.md"),
        ({"train": "a.jsonl"}, "names both a data set and files (train)", "leave out dataset"),
        ({"datasets": "x"}, "unknown field in", "did you mean dataset"),
        ({"dataset": "./gone"}, "dataset is './gone', and there is no folder", "owner/name"),
        ({"dataset": "a/b/c"}, "neither a name on the Hub (owner/name) nor a folder", "docs"),
        ({"dataset": 7}, "dataset: Input should be a valid string", "docs/tasks.md"),
        ({"config": "french"}, "./data (french) cannot be read as a data set: ", "train.parquet"),
        ({"revision": "main"}, "revision is of a data set on the Hub", "docs/tasks.md"),
        ({"instruction": "One of {labels}"}, "needs columns.choices: labels", "docs/tasks.md"),
        ({"labels": {0: False}}, "labels.0: Input should be a valid string", "docs/tasks.md"),
        ({"rows": {"train": 0}}, "rows.train: Input should be greater than", "docs/tasks.md"),
        ({"leave_out": ["long"]}, "leave_out", "docs/tasks.md"),
        ({"metric": "acc"}, "the metric 'acc' needs choices, and training row 1 has", "choices"),
        ({"metric": "bleu"}, "unknown metric 'bleu'", "exact_match"),
    ],
)
def test_what_cannot_be(cats: Path, fields: Any, message: str, hint: str) -> None:
    error = refusal(cats, **{"columns": TEXT, **fields})
    assert message in error.message
    assert hint in error.hint


def test_labels_beside_options(tmp_path: Path) -> None:
    write_data(tmp_path / "data", train=pairs(6))
    error = refusal(tmp_path, columns={**TEXT, "choices": "premise"}, labels={0: "nil"})
    assert "labels names the answers, and columns.choices has their texts" in error.message


def test_a_field_of_data_sets_beside_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"input": "x", "output": "y"}])
    (tmp_path / "task.yaml").write_text("train: a.jsonl\nconfig: french\n")
    assert "config is of a data set, and none is named" in refused(str(tmp_path)).message


def test_a_folder_without_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert "the folder ./data cannot be read as a data set: " in refusal(tmp_path).message


def test_parts_by_unusual_names(tmp_path: Path) -> None:
    write_data(tmp_path / "data", one=pairs(6))
    error = refusal(tmp_path, columns=TEXT)
    assert error.message == "./data has neither a train nor a test part, but one"
    assert "splits: {train: one}" in error.hint


def test_one_row_cannot_be_parted(tmp_path: Path) -> None:
    write_data(tmp_path / "data", train=pairs(1))
    assert "has 1 rows, too few to set some aside" in refusal(tmp_path, columns=TEXT).message


def test_too_many_answers_for_labels(tmp_path: Path) -> None:
    write_data(tmp_path / "data", train=pairs(201), test=pairs(2))
    columns = {"input": "hypothesis", "output": "premise", "choices": "labels"}
    assert "'premise' has 201 different values" in refusal(tmp_path, columns=columns).message


@pytest.mark.parametrize("answer", [2, "C", "-1", "2"])
def test_an_answer_that_is_no_option(tmp_path: Path, answer: Any) -> None:
    part: Part = {"q": ["?"], "options": [["red", "blue"]], "answer": [answer]}
    write_data(tmp_path / "data", train=part, test=part)
    columns = {"input": "q", "output": "answer", "choices": "options"}
    message = refusal(tmp_path, columns=columns).message
    assert f"row 1: 'output' is {str(answer)!r}, which is not among 'choices'" in message


def test_an_answer_of_several_parts(tmp_path: Path) -> None:
    part: Part = {"q": ["?"], "answer": [["a", "b"]]}
    write_data(tmp_path / "data", train=part, test=part)
    message = refusal(tmp_path, columns={"input": "q", "output": "answer"}).message
    assert "row 1: 'answer' is a list, not an answer" in message


# --- the Hub's, from the cache --------------------------------------------------------------------


HUB = {"dataset": "lab/cats", "columns": PAIR}


def test_a_data_set_of_the_hub_comes_from_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path / "data", train=pairs(12), test=pairs(3, start=100))
    put_in_cache(cache, "lab/cats", data)
    # A folder that is called the same does not stand in its way.
    write_data(tmp_path / "lab" / "cats", train=pairs(4), test=pairs(4))
    monkeypatch.chdir(tmp_path)
    for fields in (HUB, {**HUB, "revision": COMMIT}, {**HUB, "config": "default"}):
        task = load_task_fields(fields)
        assert (len(task.train), len(task.test), task.revision) == (12, 3, COMMIT)
        assert (task.name, str(task.path)) == ("cats", "lab/cats")
    local = load_task_fields({**HUB, "dataset": "./lab/cats"})
    assert (len(local.train), local.revision) == (4, None)


def test_another_revision_is_not_taken_for_the_one_that_is_asked_for(
    tmp_path: Path, cache: Path
) -> None:
    put_in_cache(cache, "lab/cats", write_data(tmp_path / "data", train=pairs(12)))
    other = COMMIT[::-1]
    error = refused({**HUB, "revision": other})
    assert error.message == f"the cache holds lab/cats at {COMMIT}, not at {other}"


def test_a_data_set_that_is_not_here_is_said_in_one_line() -> None:
    error = refused(HUB)
    assert error.message == "the data set lab/cats is not in this machine's cache"
    assert "without --offline" in error.hint


def test_nothing_is_fetched_where_the_cache_has_to_do(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network is allowed here, and anything that would use it fails this test."""
    import datasets
    from huggingface_hub import HfApi

    def never(*_: object, **__: object) -> None:
        pytest.fail("the network was used")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "hf_hub_download", never)
    monkeypatch.setattr(HfApi, "dataset_info", never)
    with pytest.raises(InputError, match="is not in this machine's cache"):
        load_task_fields(HUB, cached_only=True)
    put_in_cache(cache, "lab/cats", write_data(tmp_path / "data", train=pairs(12)))
    assert len(load_task_fields(HUB, cached_only=True).train) == 10
    assert datasets.config.HF_HUB_OFFLINE is False


def test_the_page_on_tasks_shows_a_task() -> None:
    page = Path(recycle_cli.__file__).parents[2] / "docs" / "tasks.md"
    section = page.read_text(encoding="utf-8").partition("## Data sets of the Hub")[2]
    fields = yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])
    assert fields.keys() | {"name"} == HubTask.model_fields.keys() | {"name", "metric"}
    own = {name: value for name, value in fields.items() if name in HubTask.model_fields}
    assert HubTask.of(own, "the page").splits == Splits(
        train="train[:80%]", valid="validation", test="train[80%:]"
    )
