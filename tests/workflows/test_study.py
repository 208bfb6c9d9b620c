"""A study: its runs are done once, in any order, by anybody, and come out the same."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.adapters import write_peft_adapter
from support.tasks import write_task

from recycle_cli.engine.base_model import linear_shapes
from recycle_cli.errors import InputError, RecycleError
from recycle_cli.evaluation import verdict
from recycle_cli.evaluation.tasks import load_task
from recycle_cli.evaluation.verdict import decide
from recycle_cli.progress import Silent
from recycle_cli.records import StudyResults
from recycle_cli.settings import Settings
from recycle_cli.tuning.lora_catalog import OPTIONS
from recycle_cli.workflows import study_runs
from recycle_cli.workflows.crawl import crawl
from recycle_cli.workflows.crawl_request import CrawlRequest
from recycle_cli.workflows.study import StudyRequest, check_study, report, study
from recycle_cli.workflows.study_arms import arms_of
from recycle_cli.workflows.study_config import StudyConfig, TargetChoice, config_of
from recycle_cli.workflows.study_runs import Cell, Common, Ranking, TargetTraining
from recycle_cli.workflows.study_store import RunStore

MEASURED = {"elapsed_s", "scored_s", "passes", "peak_memory_bytes", "path", "adapter", "command"}
Fields = dict[str, Any]


@pytest.fixture(scope="module")
def settings(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A home whose index holds five adapters of the pico model."""
    place = tmp_path_factory.mktemp("study")
    settings = Settings(place / "home", True, "float32", "cpu")
    for seed in range(5):
        write_peft_adapter(place / f"pool/org/a{seed}", pico_folder, seed)
    shapes = linear_shapes(str(pico_folder), settings)
    list(crawl(CrawlRequest(place / "pool", str(pico_folder)), settings, shapes))
    return settings


@pytest.fixture(scope="module")
def fields(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Fields:
    place = tmp_path_factory.mktemp("tasks")
    return {
        "base_model": str(pico_folder),
        "tasks": [str(write_task(place / "first")), str(write_task(place / "second", train=30))],
        "rows": 30,
        "test_rows": 30,
        "seeds": [0, 1],
        "target": {"rank": 2, "alpha": 4, "steps": 4, "lr": 0.01},
        "pace": {"steps": 4},
        "grid": [{"methods": ["recycle", "average"], "k": [2, 4]}],
    }


def run(
    fields: Fields, settings: Settings, out: Path, other: Fields | None = None, **how: Any
) -> StudyResults:
    config = config_of({**fields, **(other or {})}, "test")
    request = StudyRequest(config, out, threads=1, **how)
    return study(request, check_study(request, settings), settings, Silent())


@pytest.fixture(scope="module")
def done(fields: Fields, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing disturbed."""
    out = tmp_path_factory.mktemp("done") / "study"
    run(fields, settings, out)
    return out


def results(folder: Path) -> Any:
    """What a study found, without what differs from run to run."""
    return stable(json.loads((folder / "results.json").read_text()))


def stable(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: stable(one) for name, one in value.items() if name not in MEASURED}
        kept.pop("cells", None)  # of the whole study: how many were done now
        return kept
    return [stable(one) for one in value] if isinstance(value, list) else value


def runs_of(folder: Path) -> dict[str, float]:
    return {file.parent.name: file.stat().st_mtime for file in folder.glob("runs/*/run.json")}


def test_every_cell_has_a_row(done: Path, fields: Fields) -> None:
    document = json.loads((done / "recycle.json").read_text())
    arms = [arm.name for arm in arms_of(config_of(fields, "test"))]
    assert {"base", "target", "rescaled-target", "single", "recycle k=2"} <= set(arms)
    assert {"random recycle+target k=4", "average+target k=2"} <= set(arms)
    assert "random average k=2" not in arms  # there is nothing random about a plain average's twin
    expected = {
        (arm, task, seed) for arm in arms for task in ("first", "second") for seed in (0, 1)
    }
    found = [(row["method"], row["task"], row["seed"]) for row in document["table"]]
    assert set(found) == expected
    assert len(found) == len(expected)
    cells = document["cells"]
    assert cells["failed"] == 0
    # With the second seed the base model is as with the first, and so is what stands alone if the
    # ranking puts the same adapter first.
    assert cells["reused"] >= 2
    assert cells["done"] + cells["reused"] == len(expected)


def test_rows_are_those_of_the_commands_themselves(done: Path, settings: Settings) -> None:
    """A cell's adapter, made again by the command that its record names, is the same."""
    from recycle_cli.lora.folder import weights_sha256

    document = json.loads((done / "recycle.json").read_text())
    row = next(row for row in document["table"] if row["method"] == "target")
    assert row["valid_loss"] is not None
    made = json.loads(Path(row["path"], "recycle.json").read_text())
    words = [*made["command"][1:-1], str(done.parent / "again")]
    environment = {
        **os.environ,
        "RECYCLE_HOME": str(settings.home),
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(
        [sys.executable, "-m", "recycle_cli", *words],
        env=environment,
        check=True,
        capture_output=True,
        cwd=Path.cwd(),
    )
    assert weights_sha256(done.parent / "again") == made["sha256"]


def test_the_target_is_trained_as_asked(fields: Fields, settings: Settings, tmp_path: Path) -> None:
    other = {
        "tasks": fields["tasks"][:1],
        "seeds": [0],
        "target": {"rank": 2, "steps": 4, "optimizer": "oplora", "momentum": 0.5},
        "grid": [{"methods": ["average"], "k": [2], "with_target": [False], "controls": []}],
    }
    run(fields, settings, tmp_path / "study", other)
    document = json.loads((tmp_path / "study/recycle.json").read_text())
    row = next(row for row in document["table"] if row["method"] == "target")
    made = json.loads(Path(row["path"], "recycle.json").read_text())
    assert made["settings"]["optimizer"] == "oplora"
    assert made["settings"]["momentum"] == 0.5
    assert "oplora" in made["command"]


def test_a_second_run_does_nothing_again(
    done: Path, fields: Fields, settings: Settings, tmp_path: Path
) -> None:
    out = shutil.copytree(done, tmp_path / "study")
    before = runs_of(out)
    found = run(fields, settings, out)
    assert runs_of(out) == before
    assert found.study.cells.done == 0
    assert results(out) == results(done)


def test_more_of_a_study_runs_only_what_is_new(
    done: Path, fields: Fields, settings: Settings, tmp_path: Path
) -> None:
    out = shutil.copytree(done, tmp_path / "study")
    grid = [
        *fields["grid"],
        {"methods": ["ties"], "k": [2], "with_target": [False], "controls": []},
    ]
    found = run(fields, settings, out, {"grid": grid})
    assert found.study.cells.done == 4  # two tasks, two seeds
    assert len(runs_of(out)) == len(runs_of(done)) + 4


def test_another_loss_runs_again_only_what_goes_by_it(
    done: Path,
    fields: Fields,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All that trains; not the base model, the merges, nor the ranking by right answers. A target
    LoRA that comes out as it was does not have what only takes it run again."""
    out = shutil.copytree(done, tmp_path / "study")
    monkeypatch.setattr(study_runs, "LOSS_VERSION", study_runs.LOSS_VERSION + 1)
    run(fields, settings, out)
    before = runs_of(done)
    again = {key: json.loads((out / f"runs/{key}/run.json").read_text()) for key in runs_of(out)}
    kinds = [
        (one["kind"], one["inputs"].get("method"))
        for key, one in again.items()
        if key not in before
    ]
    config = config_of(fields, "test")
    trained = [arm for arm in arms_of(config) if arm.role == "rescaled" or "recycle" in arm.name]
    assert kinds.count(("target", None)) == 4  # two tasks, two seeds
    assert kinds.count(("cell", "recycle")) + kinds.count(("cell", "rescale")) == 4 * len(trained)
    assert len(kinds) == 4 + 4 * len(trained)


def test_runs_of_another_study_are_taken(
    done: Path, fields: Fields, settings: Settings, tmp_path: Path
) -> None:
    found = run(fields, settings, tmp_path / "study", reuse=(done,))
    assert found.study.cells.done == 0
    assert not runs_of(tmp_path / "study")


def test_two_processes_find_what_one_finds(
    done: Path, fields: Fields, settings: Settings, tmp_path: Path
) -> None:
    run(fields, settings, tmp_path / "study", jobs=2)
    assert results(tmp_path / "study") == results(done)
    assert runs_of(tmp_path / "study").keys() == runs_of(done).keys()


def test_a_killed_study_goes_on(
    done: Path, fields: Fields, settings: Settings, tmp_path: Path
) -> None:
    """SIGKILL at two moments; each time the next run takes what was finished."""
    import yaml

    out, config = tmp_path / "study", tmp_path / "study.yaml"
    config.write_text(yaml.safe_dump(fields))
    words = ["--offline", "study", "--config", str(config), "--out", str(out), "--threads", "1"]
    environment = {**os.environ, "RECYCLE_HOME": str(settings.home)}
    finished = 0
    for wanted in (2, 20):
        with subprocess.Popen(
            [sys.executable, "-m", "recycle_cli", *words],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        ) as process:
            until = time.monotonic() + 120
            while len(runs_of(out)) < wanted and time.monotonic() < until:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        assert len(runs_of(out)) >= max(wanted, finished)
        assert not (out / "report.html").exists()
        finished = len(runs_of(out))
    before = runs_of(out)
    run(fields, settings, out)
    after = runs_of(out)
    assert {key: after[key] for key in before} == before
    assert results(out) == results(done)


def test_two_hundred_cells_take_less_than_three_minutes(
    fields: Fields, settings: Settings, tmp_path: Path
) -> None:
    """Its report and its statistics too: what a study adds to its runs is small."""
    wide = {
        "seeds": list(range(10)),
        "target": {**fields["target"], "steps": 2},
        "pace": {"steps": 2},
        "grid": [{"methods": ["recycle", "average"], "k": [2]}],
    }
    clock = time.perf_counter()
    found = run(fields, settings, tmp_path / "study", wide).study
    elapsed = time.perf_counter() - clock
    assert (len(found.table), found.cells.failed) == (200, 0)
    assert elapsed < 180


def test_a_ray_cluster_that_loses_a_worker_finds_the_same(
    fields: Fields, settings: Settings, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    small = {"tasks": fields["tasks"][:1], "grid": [{"methods": ["recycle"], "k": [2]}]}
    run(fields, settings, tmp_path / "serial", small)
    out, killed = tmp_path / "study", threading.Event()

    def kill_one() -> None:
        """An actor, once there is something to lose."""
        until = time.monotonic() + 120
        while time.monotonic() < until and not killed.is_set():
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    at_work = len(runs_of(out)) >= 2 and "ray::_Actor" in process.cmdline()[0]
                    if at_work and not killed.is_set():
                        process.kill()
                        killed.set()
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    run(fields, settings, out, small, ray="local")
    thread.join()
    assert killed.is_set()
    assert results(out) == results(tmp_path / "serial")


def test_a_cell_that_fails_is_recorded_and_the_rest_goes_on(
    fields: Fields, settings: Settings, tmp_path: Path
) -> None:
    """A rate that no training survives."""
    grid = [
        {
            "methods": ["average", {"method": "adamerging", "lr": 1e30, "max_grad_norm": 1e30}],
            "k": [2],
            "with_target": [False],
            "controls": [],
        }
    ]
    found = run(fields, settings, tmp_path / "study", {"grid": grid, "seeds": [0]}).study
    failed = {(failure.method, failure.task) for failure in found.failures}
    name = next(arm.name for arm in found.arms if arm.method == "adamerging")
    assert failed == {(name, "first"), (name, "second")}
    assert all("loss" in f.error for f in found.failures), found.failures
    assert found.cells.failed == 2
    assert {row.method for row in found.table} == {"base", "target", "average"}


def failing(
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    *tasks: str,
    error: Exception = RuntimeError("out of memory"),  # noqa: B008  # raised, never changed
) -> None:
    """Lets the runs of an arm fail on some tasks."""
    perform = Cell.perform

    def perform_or_fail(run: Cell, *given: Any) -> Any:
        if run.arm.name == method and run.task.name in tasks:
            raise error
        return perform(run, *given)

    monkeypatch.setattr(Cell, "perform", perform_or_fail)


def test_a_task_that_an_arm_failed_on_is_left_out_of_the_verdict(
    fields: Fields, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Means over other tasks are not compared, and the report says so."""
    failing(monkeypatch, "random recycle", "second")
    grid = [{"methods": ["recycle"], "k": [2]}]
    found = run(fields, settings, tmp_path / "study", {"grid": grid, "seeds": [0]}).study
    assert found.verdict.figures["tasks"] == 1
    left_out = "Left out, since not every arm could be scored there: second."
    assert left_out in found.verdict.notes
    assert {mean.tasks for mean in found.means} == {1}
    assert left_out.replace("_", r"\_") in (tmp_path / "study/report.md").read_text()


def test_the_single_adapter_that_is_named_is_the_one_that_was_scored(
    fields: Fields, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another selection is ranked first, and seeds may put different adapters first."""
    named: dict[str, str] = {}

    def decide_and_tell(*given: Any, relevance: dict[str, str], **other: Any) -> Any:
        named.update(relevance)
        return decide(*given, relevance=relevance, **other)

    monkeypatch.setattr(verdict, "decide", decide_and_tell)
    plain = {"methods": ["average"], "k": [2], "with_target": [False]}
    grid = [
        {**plain, "selection": ["random"], "controls": []},
        {**plain, "selection": ["rank", "l2"], "controls": ["single"]},
    ]
    small = {"tasks": fields["tasks"][:1], "grid": grid}
    found = run(fields, settings, tmp_path / "study", small).study
    firsts = {(s.method, s.seed): s.adapters[0].id for s in found.selections}
    assert firsts["rank", 0] == firsts["rank", 1] != firsts["random", 0]
    assert named == {"first": firsts["rank", 0]}


def test_an_arm_that_failed_on_all_tasks_is_named(
    fields: Fields, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "random recycle", "first", "second")
    grid = [{"methods": ["recycle"], "k": [2]}]
    found = run(fields, settings, tmp_path / "study", {"grid": grid, "seeds": [0]}).study
    assert found.verdict.figures["tasks"] == 2
    assert (
        "Not compared, since not all of it could be scored: random recycle." in found.verdict.notes
    )


def test_what_hangs_on_a_failed_target_fails_with_its_reason(
    fields: Fields, settings: Settings, tmp_path: Path
) -> None:
    target = {**fields["target"], "lr": 1e30, "max_grad_norm": 1e30}
    found = run(fields, settings, tmp_path / "study", {"target": target, "seeds": [0]}).study
    without = {row.method for row in found.table}
    assert "target" not in without
    assert {"base", "recycle k=2", "average k=4"} <= without
    assert all(f.error.startswith("target LoRA of ") for f in found.failures)
    assert found.verdict.kind == "incomplete"


def test_a_study_of_which_nothing_can_be_done_is_an_error(
    fields: Fields, settings: Settings, tmp_path: Path
) -> None:
    request = StudyRequest(config_of(fields, "test"), tmp_path / "study")
    material = check_study(request, settings)
    broken = replace(settings, device="cpu", dtype="float16x")
    with pytest.raises(RecycleError):
        study(request, material, broken, Silent())


def adapters_in(folder: Path) -> set[str]:
    return {file.parent.parent.name for file in folder.glob("runs/*/adapter/recycle.json")}


@pytest.mark.parametrize("keep", ["all", "target", "none"])
def test_what_is_kept(
    keep: str, done: Path, fields: Fields, settings: Settings, tmp_path: Path
) -> None:
    found = run(fields, settings, tmp_path / "study", {"keep": keep, "seeds": [0]}).study
    kept = adapters_in(tmp_path / "study")
    targets = 2
    made = sum(arm.role not in ("base", "target", "single") for arm in found.arms) * 2
    assert len(kept) == {"all": targets + made, "target": targets, "none": 0}[keep]


ONE_TASK: Fields = {"seeds": [0], "grid": [{"methods": ["recycle"], "k": [2]}]}


def test_a_target_that_was_not_kept_is_trained_again_where_it_is_needed(
    fields: Fields, settings: Settings, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    bare = {**ONE_TASK, "tasks": fields["tasks"][:1], "keep": "none"}
    first = run(fields, settings, out, bare)
    before = runs_of(out)
    again = run(fields, settings, out, bare)
    assert runs_of(out) == before  # nothing needs it
    assert again.study.adapter is first.study.adapter is None
    more = {**bare, "grid": [*bare["grid"], {"methods": ["average"], "k": [2], "controls": []}]}
    found = run(fields, settings, out, more).study
    assert (found.cells.failed, found.cells.done) == (0, 2)
    elsewhere = run(fields, settings, tmp_path / "other", {**more, "keep": "best"}, reuse=(out,))
    assert (elsewhere.study.cells.failed, elsewhere.study.cells.done) == (0, 0)
    assert len(adapters_in(tmp_path / "other")) == 1


def test_adapters_that_are_to_be_kept_are_made_again(
    fields: Fields, settings: Settings, tmp_path: Path
) -> None:
    out, small = tmp_path / "study", {**ONE_TASK, "tasks": fields["tasks"][:1]}
    first = results_of_cells(run(fields, settings, out, {**small, "keep": "none"}))
    found = run(fields, settings, out, {**small, "keep": "all"})
    assert results_of_cells(found) == first
    made = {row.method for row in found.study.table if row.path}
    assert made == {arm.name for arm in found.study.arms} - {"base", "single"}
    for row in found.study.table:
        assert row.path is None or any(Path(row.path).glob("*.safetensors"))


def results_of_cells(found: StudyResults) -> Any:
    return [(row.method, row.metrics, row.valid_loss) for row in found.study.table]


def test_a_defect_fails_its_run_alone(
    fields: Fields, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong in one of hundreds of runs; a full disk ends the study."""
    out, small = tmp_path / "study", {**ONE_TASK, "tasks": fields["tasks"][:1]}
    failing(monkeypatch, "recycle", "first", error=KeyError("defect"))
    found = run(fields, settings, out, small).study
    assert [(f.method, f.error) for f in found.failures] == [("recycle", "KeyError('defect')")]
    (noted,) = out.glob("runs/*/failed.json")
    assert "Traceback" in json.loads(noted.read_text())["traceback"]
    failing(monkeypatch, "recycle", "first", error=OSError(errno.ENOSPC, "no space"))
    with pytest.raises(OSError, match="no space"):
        run(fields, settings, out, small)


def test_the_best_of_each_task_is_kept(done: Path) -> None:
    document = json.loads((done / "recycle.json").read_text())
    assert Path(document["adapter"]).is_dir()
    losses = {
        (row["method"], row["task"]): row["valid_loss"]
        for row in document["table"]
        if row["seed"] == 0 and row["valid_loss"] is not None
    }
    rivals = {
        place: loss
        for place, loss in losses.items()
        if "random" not in place[0] and place[0] != "rescaled-target" and place[1] == "first"
    }
    made = json.loads(Path(document["adapter"], "recycle.json").read_text())
    assert made["best"]["valid_loss"] == min(rivals.values())


def test_the_report_is_written_again_without_running(done: Path, tmp_path: Path) -> None:
    out = shutil.copytree(done, tmp_path / "study")
    shutil.rmtree(out / "runs")
    before = {file.name: file.read_bytes() for file in out.glob("re*.*") if file.suffix != ".json"}
    assert {"report.html", "report.md", "results.csv"} <= set(before)
    for name in before:
        (out / name).unlink()
    report(out)
    assert {name: (out / name).read_bytes() for name in before} == before


def test_coefficients_are_told_by_module(done: Path) -> None:
    found = json.loads((done / "results.json").read_text())["coefficients"]
    assert {one["method"] for one in found} >= {"recycle k=2", "recycle+target k=4"}
    for one in found:
        assert len(one["values"]) == len(one["groups"])
        assert {len(row) for row in one["values"]} == {len(one["adapters"])}
        assert all(number >= 0 for row in one["values"] for number in row)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seeds": [0, 0]}, "seeds names 0 twice"),
        ({"stpes": 3}, "stpes"),
        ({"grid": [{"methods": ["recycel"]}]}, "recycle"),
        ({"grid": [{"methods": ["rescale"]}]}, "takes no adapters"),
        ({"grid": [{"methods": [{"method": "ties", "steps": 3}]}]}, "does not train"),
        ({"grid": [{"methods": [{"method": "ties", "density": 7}]}]}, "density"),
        ({"grid": [{"methods": ["recycle"], "selection": ["evaluaton"]}]}, "evaluation"),
        ({"grid": [{"methods": ["recycle"], "k": [0]}]}, "greater than or equal to 1"),
        ({"pace": {"stepz": 3}}, "steps"),
        ({"pace": {"lr": "fast"}}, "lr is 'fast'"),
        ({"pace": {"lr_schedule": "cosin"}}, "cosine"),
        ({"target": {"lr_schedule": "cosin"}}, "cosine"),
        ({"grid": [{"methods": [{"method": "recycle", "steps": -1}]}]}, "steps is -1"),
        ({"grid": [{"methods": [{"method": "recycle", "lrr": 1}]}]}, "did you mean lr"),
        ({"grid": [{"methods": [{"method": "ties", "densty": 0.2}]}]}, "did you mean density"),
        ({"target": {"rnk": 4}}, "did you mean rank"),
        ({"target": {"optimizer": "oplroa"}}, "did you mean oplora"),
        ({"target": {"optimizer": "oplora", "architecture": "dora"}}, "cannot be combined"),
        ({"margin": 0}, "margin is 0: "),
        ({"keep": "bset"}, "keep is 'bset': "),
    ],
)
def test_refused_by_name(fields: Fields, other: Fields, said: str) -> None:
    with pytest.raises(InputError) as caught:
        config_of({**fields, **other}, "test")
    assert said in f"{caught.value.message} {caught.value.hint}"


def test_numbers_that_yaml_takes_for_text_are_numbers(fields: Fields) -> None:
    grid = [{"methods": [{"method": "recycle", "lr": "1e-3"}]}]
    config = config_of({**fields, "pace": {"lr": "5e-2", "steps": 3}, "grid": grid}, "test")
    assert config.pace == {"lr": 0.05, "steps": 3}
    assert config.grid[0].methods[0].pace == {"lr": 0.001}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"study": {}}', "cannot be read"),
        ('{"schema": "recycle.results/9"}', "this version reads"),
        ('{"schema": "recycle.results/1"}', "bad field"),
    ],
)
def test_damaged_results_are_no_report(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match=said):
        report(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_refused_before_anything_runs(fields: Fields, settings: Settings, tmp_path: Path) -> None:
    def refused(other: Fields, out: Path = tmp_path / "study", **how: Any) -> str:
        config = config_of({**fields, **other}, "test")
        with pytest.raises(RecycleError) as caught:
            check_study(StudyRequest(config, out, **how), settings)
        return f"{caught.value.message} {caught.value.hint}"

    assert "k is 9" in refused({"grid": [{"methods": ["recycle"], "k": [9]}]})
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    assert "no study wrote" in refused({}, tmp_path / "full")
    assert "no folder of a study" in refused({}, reuse=(tmp_path / "full",))
    assert "--jobs and --ray" in refused({}, jobs=2, ray="auto")
    copies = [str(write_task(tmp_path / name)) for name in ("one", "two")]
    assert "the same rows" in refused({"tasks": copies})
    leaky = write_task(tmp_path / "leaky")
    rows = (leaky / "train.jsonl").read_text().splitlines(keepends=True)
    (leaky / "test.jsonl").write_text("".join(rows[:3]))
    assert "3 test rows" in refused({"tasks": [str(leaky)]})
    twin = shutil.copytree(leaky, tmp_path / "other/leaky")
    assert "two tasks" in refused({"tasks": [str(leaky), str(twin)], "allow_overlap": True})


def test_two_studies_do_not_share_a_folder(done: Path, fields: Fields, settings: Settings) -> None:
    request = StudyRequest(config_of(fields, "test"), done)
    with request.store().locked(), pytest.raises(InputError, match="another study"):
        run(fields, settings, done)


def test_paths_of_flags_do_not_hang_on_where_it_runs(
    fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the study.yaml that is kept can be run from anywhere."""
    from recycle_cli.cli.study import _config

    write_task(tmp_path / "here/mine")
    (tmp_path / "here/model").mkdir()
    (tmp_path / "study.yaml").write_text('{"tasks": ["other"], "grid": [{"methods": ["ties"]}]}')
    monkeypatch.chdir(tmp_path / "here")
    for file in (None, tmp_path / "study.yaml"):
        flags: Fields = {"tasks": ["mine"], "base_model": "model"}
        config = _config(file, flags, {}, None, None)
        assert config.tasks == (str(tmp_path / "here/mine"),)
        assert config.base_model == str(tmp_path / "here/model")
    assert _config(None, {"tasks": ["mine"]}, {}, None, None).base_model == "smollm2"


def names(config: StudyConfig) -> list[str]:
    return [arm.name for arm in arms_of(config)]


def arm_config(fields: Fields, *grid: Fields) -> StudyConfig:
    return config_of({**fields, "grid": list(grid)}, "test")


def unique(values: Iterable[str]) -> bool:
    found = list(values)
    return len(set(found)) == len(found)


def test_arms_that_two_blocks_ask_for_are_one(fields: Fields) -> None:
    plain: Fields = {"methods": ["recycle"], "controls": []}
    both = arm_config(fields, plain, {"methods": ["recycle"], "controls": ["random"]})
    assert unique(names(both))
    (arm,) = [arm for arm in arms_of(both) if arm.name == "recycle"]
    assert arm.control == "random recycle"


def test_settings_tell_arms_apart(fields: Fields) -> None:
    methods = [
        "recycle",
        {"method": "recycle", "granularity": "layer"},
        {"method": "recycle", "lr": 0.1},
    ]
    config = arm_config(fields, {"methods": methods, "selection": ["random", "rank"], "k": [2, 3]})
    assert unique(names(config))
    assert len(names(config)) == 2 + 3 * 2 * 2 * 2 * 2 + 2 + 1


def test_a_ranking_by_gradient_goes_by_the_loss(fields: Fields, tmp_path: Path) -> None:
    common = Common(RunStore(tmp_path), "base", "digest", 30, None, 8, None)
    task = load_task(fields["tasks"][0])
    seen = {m: Ranking(common, task, 0, m, (), "train").sees_loss for m in ("gradient", "halving")}
    assert seen == {"gradient": True, "halving": False}


def test_a_default_rate_of_an_option_is_in_the_key(
    fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = Common(RunStore(tmp_path), "base", "digest", 30, None, 8, None)
    task = load_task(fields["tasks"][0])

    def keys() -> list[str]:
        choices = [TargetChoice(), TargetChoice.model_validate({"schedule": "copra"})]
        return [TargetTraining(common, task, 0, choice).key for choice in choices]

    before = keys()
    slower = replace(OPTIONS["copra"], lr_times=1.5)
    monkeypatch.setitem(OPTIONS, "copra", slower)  # type: ignore[misc]  # a table that is read only
    after = keys()
    assert before[0] == after[0]
    assert before[1] != after[1]
