"""A study on data sets: one named in the study itself, one by a task.yaml; run and planned."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.adapters import write_peft_adapter
from support.data_sets import COMMIT, pairs, put_in_cache, use_cache, write_data

from recycle_cli.engine.base_model import linear_shapes
from recycle_cli.errors import InputError
from recycle_cli.evaluation.tasks import load_task_fields, training_split
from recycle_cli.progress import Silent
from recycle_cli.settings import Settings
from recycle_cli.workflows.crawl import crawl
from recycle_cli.workflows.crawl_request import CrawlRequest
from recycle_cli.workflows.study import StudyRequest, check_study, study
from recycle_cli.workflows.study_config import StudyConfig, read_config
from recycle_cli.workflows.study_estimate import estimate
from recycle_cli.workflows.study_plan import load_tasks

COLUMNS = {"input": ["premise", "hypothesis"], "output": "label", "choices": "labels"}


@pytest.fixture
def config(tmp_path: Path, pico_folder: Path, monkeypatch: pytest.MonkeyPatch) -> StudyConfig:
    """A study of two tasks: lab/cats of the Hub, with validation rows, and a folder's."""
    cache = use_cache(monkeypatch, tmp_path / "cache")
    hub = write_data(
        tmp_path / "hub", train=pairs(30), validation=pairs(9, 100), test=pairs(12, 200)
    )
    put_in_cache(cache, "lab/cats", hub)
    write_data(tmp_path / "mine" / "data", train=pairs(40, 300))
    (tmp_path / "mine" / "task.yaml").write_text(
        yaml.safe_dump({"dataset": "./data", "columns": COLUMNS})
    )
    fields: dict[str, Any] = {
        "base_model": str(pico_folder),
        "tasks": [{"dataset": "lab/cats", "columns": COLUMNS}, "mine"],
        "rows": 20,
        "target": {"rank": 2, "steps": 2},
        "grid": [{"methods": ["average"], "k": [2], "controls": []}],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(fields))
    return read_config(tmp_path / "study.yaml")


@pytest.fixture
def settings(tmp_path: Path, pico_folder: Path) -> Settings:
    settings = Settings(tmp_path / "home", True, "float32", "cpu")
    for seed in range(2):
        write_peft_adapter(tmp_path / f"pool/org/a{seed}", pico_folder, seed)
    shapes = linear_shapes(str(pico_folder), settings)
    list(crawl(CrawlRequest(tmp_path / "pool", str(pico_folder)), settings, shapes))
    return settings


def test_a_study_runs_on_data_sets(config: StudyConfig, settings: Settings, tmp_path: Path) -> None:
    request = StudyRequest(config, tmp_path / "out", threads=1)
    document = study(request, check_study(request, settings), settings, Silent()).study
    assert document.cells.failed == 0
    assert {row.task for row in document.table} == {"cats", "mine"}
    assert {task.name: task.revision for task in document.tasks} == {"cats": COMMIT, "mine": None}
    tasks = {task.name: task for task in load_tasks(config)}
    train, valid = training_split(tasks["cats"], config.seeds[0], config.rows)
    # A fifth of the rows, from the validation part.
    assert (len(train), len(valid)) == (16, 4)
    assert set(valid) <= set(tasks["cats"].valid)
    assert len(tasks["mine"].test) == 4
    planned = estimate(request, settings, Silent())
    assert planned.notes == []
    assert planned.reused is not None
    assert planned.reused > 0


def test_a_plan_names_what_is_missing_and_what_is_there(
    config: StudyConfig, settings: Settings, tmp_path: Path
) -> None:
    absent = {"dataset": "lab/dogs", "columns": COLUMNS}
    more = config.model_copy(update={"tasks": (*config.tasks, absent)})
    plan = estimate(StudyRequest(more, tmp_path / "out"), settings, Silent())
    assert plan.tasks == ["cats", "mine", "dogs"]
    assert plan.notes == [
        "the tasks are not all at hand: 1 of 3 are missing (dogs): the data set lab/dogs is not in "
        "this machine's cache"
    ]


def test_validation_rows_among_the_test_rows_are_found(
    config: StudyConfig, settings: Settings, tmp_path: Path
) -> None:
    splits = {"train": "train", "valid": "test", "test": "test"}
    fields = {"dataset": "lab/cats", "columns": COLUMNS, "splits": splits}
    leaking = config.model_copy(update={"tasks": (fields,)})
    with pytest.raises(InputError, match="12 test rows of cats also stand in its training rows"):
        check_study(StudyRequest(leaking, tmp_path / "out"), settings)


def test_files_named_in_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"input": "x", "output": "y"}\n' * 5)
    task = load_task_fields({"train": "rows.jsonl"})
    assert (task.name, task.path, len(task.train)) == ("rows", tmp_path / "rows.jsonl", 5)
    with pytest.raises(InputError, match="task sums names neither train nor test"):
        load_task_fields({"name": "sums"})
