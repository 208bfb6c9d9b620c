"""The paper's studies: whole, alike but for the model and its pool, and planned without weights or
data; their tasks read data sets that look as those of the Hub do."""

import csv
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.data_sets import Part, put_in_cache, use_cache, write_data

import recycle_cli
from recycle_cli.errors import InputError
from recycle_cli.evaluation.tasks import Task, load_task
from recycle_cli.progress import Silent
from recycle_cli.records import StudyPlanDocument
from recycle_cli.settings import Settings
from recycle_cli.workflows.study import StudyRequest
from recycle_cli.workflows.study_arms import arms_of
from recycle_cli.workflows.study_config import StudyConfig, read_config
from recycle_cli.workflows.study_estimate import estimate

STUDIES = Path(recycle_cli.__file__).parents[2] / "examples" / "studies"
TASKS = STUDIES / "paper-tasks"
NAMES = ("paper-llama", "paper-qwen")
IDS = {"paper-llama": 960, "paper-qwen": 1956}
PUBLISHED = 62


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_cache(monkeypatch, tmp_path / "cache")


def config_of(name: str) -> StudyConfig:
    return read_config(STUDIES / f"{name}.yaml")


def data_folder() -> Path:
    data = os.environ.get("RECYCLE_DATA")
    if not data or not (Path(data) / "paper").is_dir():
        pytest.skip("RECYCLE_DATA is not set: it names the folder that holds paper/")
    return Path(data) / "paper"


def task_fields(name: str) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load((TASKS / name / "task.yaml").read_text())
    return fields


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_needs_neither_weights_nor_data(name: str, tmp_path: Path) -> None:
    config, out = config_of(name), tmp_path / "study"
    settings = Settings(tmp_path / "home", offline=True, dtype="float32", device="cpu")
    plan = estimate(StudyRequest(config, out), settings, Silent())
    arms = arms_of(config)
    assert isinstance(plan, StudyPlanDocument)
    assert len(plan.tasks) == 45
    assert plan.tasks == [Path(str(task)).name for task in config.tasks]
    assert len(plan.missing_tasks) == PUBLISHED - 45
    assert plan.seeds == [123, 0, 22, 42, 1248]
    assert plan.cells == 45 * len(arms) * 5
    assert (plan.adapters, plan.reused, plan.elapsed_s) == (None, None, None)
    tasks, pool, base = plan.notes
    assert tasks == (
        "the tasks are not all at hand: 45 of 45 are missing (banking77, ade_corpus_v2, overruling "
        "and 42 more): the data set legacy-datasets/banking77 is not in this machine's cache"
    )
    assert pool.startswith("the pool is not at hand: ")
    assert base.startswith("the base model is not at hand: ")
    assert not out.exists()


def test_the_grid_has_every_k_and_control_of_the_paper() -> None:
    arms = {arm.name: arm for arm in arms_of(config_of("paper-llama"))}
    for method in ("recycle", "average", "ties", "arrow"):
        found = [arm for arm in arms.values() if arm.method == method and arm.role == "recycled"]
        assert {arm.k for arm in found} >= {5, 10, 20, 30}, method
        assert {arm.with_target for arm in found} == {False, True}
    roles = {arm.role for arm in arms.values()}
    assert roles == {"base", "target", "recycled", "control", "rescaled", "single"}
    for arm in arms.values():
        if arm.role == "recycled" and arm.choice and not arm.choice.merges:
            assert arm.control in arms, arm.name


def test_the_two_differ_in_the_model_and_its_pool_alone() -> None:
    llama, qwen = (config_of(name).model_dump() for name in NAMES)
    different = {field for field in llama if llama[field] != qwen[field]}
    assert different == {"name", "base_model", "pool"}
    assert llama["base_model"] == "meta-llama/Llama-3.1-8B-Instruct"
    assert qwen["base_model"] == "Qwen/Qwen3-4B-Instruct-2507"


@pytest.mark.parametrize("name", NAMES)
def test_the_pool_is_the_published_list(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from recycle_cli.workflows.crawl_request import read_ids

    monkeypatch.setenv("RECYCLE_DATA", str(data_folder().parent))
    place = config_of(name).pool.ids_from
    assert place is not None
    assert len(set(read_ids(Path(place)))) == IDS[name]


def test_the_tasks_are_those_of_the_paper() -> None:
    with (data_folder() / "tasks.csv").open(encoding="utf-8") as file:
        published = [row for row in csv.DictReader(file) if row["among_the_62"] == "1"]
    config = config_of("paper-llama")
    on_the_hub = {row["task"]: row for row in published if not row["dataset"].startswith("(")}
    assert [Path(str(task)).name for task in config.tasks] == list(on_the_hub)
    assert list(config.missing_tasks) == [
        row["task"] for row in published if row["task"] not in on_the_hub
    ]
    for name, row in on_the_hub.items():
        fields = task_fields(name)
        assert fields["dataset"] == row["dataset"]
        # The release leaves out which of MMLU's configurations it is; all subjects are in one.
        assert fields.get("config", "") == (row["config"] or {"mmlu_combined": "all"}.get(name, ""))
        assert fields.get("splits") == (json.loads(row["splits"]) if row["splits"] else None)
        assert fields["columns"]["output"] == row["output_column"]
        assert fields["metric"] == row["metric"]
        assert fields["columns"]["input"] == input_columns(row["input_columns"])


def input_columns(text: str) -> str | dict[str, str]:
    """As the release names them; a column of options is named by itself."""
    if not text.startswith("{"):
        return text
    named = json.loads(text)
    return {key: one if isinstance(one, str) else one["key_name"] for key, one in named.items()}


@pytest.mark.parametrize("folder", sorted(TASKS.iterdir()), ids=lambda folder: folder.name)
def test_every_task_is_one_but_for_its_data(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_task(str(folder), cached_only=True)
    fields = task_fields(folder.name)
    named = fields["dataset"] + (f" ({fields['config']})" if "config" in fields else "")
    assert caught.value.message == f"the data set {named} is not in this machine's cache"
    instruction = fields["instruction"]
    assert re.fullmatch(r"[A-Z].{15,150}[.}]", instruction), instruction
    assert ("{labels}" in instruction) <= (fields["columns"].get("choices") == "labels")


# --- on data that look as the Hub's do ------------------------------------------------------------


def from_cache(
    cache: Path, folder: Path, name: str, names: tuple[str, ...] | None = None, **parts: Part
) -> Task:
    """A task of the paper with these rows in the place of the Hub's.

    Args:
        cache: where they are put.
        folder: where they are written first.
        name: of the task.
        names: what the numbers of its answers mean.
        parts: the rows.
    """
    fields = task_fields(name)
    data = write_data(folder / "data", names, fields["columns"]["output"], **parts)
    put_in_cache(cache, fields["dataset"], data, fields.get("config", "default"))
    return load_task(str(TASKS / name), cached_only=True)


QUESTIONS: Part = {"question": [f"What is {number}?" for number in range(20)]}


def test_nothing_is_said_of_the_cache(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    part: Part = {**QUESTIONS, "answer": ["#### 3"] * 20}
    from_cache(cache, tmp_path, "gsm8k", train=part, test={"question": ["?"], "answer": ["#### 1"]})
    capfd.readouterr()
    load_task(str(TASKS / "gsm8k"))
    assert capfd.readouterr() == ("", "")


def test_entailment(cache: Path, tmp_path: Path) -> None:
    part: Part = {
        "premise": [f"{number} cats sat" for number in range(20)],
        "hypothesis": [f"{number} cats" for number in range(20)],
        "label": [0, 1] * 10,
    }
    hidden: Part = {**part, "label": [-1] * 20}
    task = from_cache(
        cache,
        tmp_path,
        "super_glue_rte",
        names=("entailment", "not_entailment"),
        train=part,
        validation={**part, "premise": [f"{number} dogs sat" for number in range(20)]},
        test=hidden,
    )
    # Its own test part has no labels, and the paper takes a tenth of the training part.
    assert (len(task.train), len(task.valid), len(task.test)) == (18, 20, 2)
    assert task.train[0].choices == ("entailment", "not_entailment")
    assert task.train[0].input.startswith("Does the hypothesis follow from the premise? Answer")
    assert "one of: entailment; not_entailment.\nPREMISE - " in task.train[0].input
    assert task.metric == "exact_match"


def test_options_with_labels_of_their_own(cache: Path, tmp_path: Path) -> None:
    choices = {"label": list("ABC"), "text": ["one", "two", "three"]}
    part: Part = {**QUESTIONS, "choices": [choices] * 20, "answerKey": list("AB") * 10}
    other: Part = {key: values[:1] for key, values in part.items()}
    task = from_cache(cache, tmp_path, "commonsense_qa", train=part, validation=other)
    row = task.train[0]
    assert "[SEP] \nCHOICES - A: one\nB: two\nC: three" in row.input
    assert {row.output for row in task.train} <= {"A", "B"}


def test_options_that_are_counted(cache: Path, tmp_path: Path) -> None:
    part: Part = {
        "category": ["law"] * 20,
        **QUESTIONS,
        "options": [["w", "x", "y", "z"]] * 20,
        "answer_index": [3, 0] * 10,
    }
    task = from_cache(cache, tmp_path, "mmlu_pro", test=part)
    assert {row.output for row in task.train} == {"D", "A"}
    assert "SUBJECT - law [SEP] \nQUESTION - " in task.train[0].input
    assert "CHOICES - A: w\nB: x\nC: y\nD: z" in task.train[0].input
    assert (len(task.train), len(task.test)) == (18, 2)


def test_options_in_columns_of_their_own(cache: Path, tmp_path: Path) -> None:
    options: Part = {f"op{mark}": [mark.upper()] * 20 for mark in "abcd"}
    part: Part = {**QUESTIONS, **options, "cop": [2, 1] * 10}
    task = from_cache(cache, tmp_path, "medmcqa", names=tuple("abcd"), train=part, validation=part)
    assert task.train[0].input.endswith("[SEP] \n0 - A [SEP] \n1 - B [SEP] \n2 - C [SEP] \n3 - D")
    assert {row.output for row in task.train} == {"1", "2"}


def test_a_chain_of_thought(cache: Path, tmp_path: Path) -> None:
    from recycle_cli.evaluation.metrics import exact_match

    part: Part = {**QUESTIONS, "answer": ["It is 3.\n#### 3"] * 20}
    other: Part = {"question": ["How many?"], "answer": ["2 and 2 are 4.\n#### 4"]}
    task = from_cache(cache, tmp_path, "gsm8k", train=part, test=other)
    assert task.test[0].output == "2 and 2 are 4.\n#### 4"
    assert exact_match("They are 4 #### 4.", task.test[0].output)
