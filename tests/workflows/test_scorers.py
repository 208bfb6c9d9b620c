"""Who scores: whoever does, the answers are the same, and one bad adapter fails alone."""

import os
import threading
import time
from pathlib import Path

import psutil
import pytest
from support.adapters import write_peft_adapter
from support.tasks import write_task

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.errors import RecycleError
from recycle_cli.evaluation.tasks import load_task
from recycle_cli.settings import Settings
from recycle_cli.store.answers import Answer
from recycle_cli.workflows.adapters import resolve_names
from recycle_cli.workflows.scorers import (
    Assignment,
    Job,
    ManyProcesses,
    OneProcess,
    RayCluster,
    Scorer,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(tmp_path_factory.mktemp("home"), True, "float32", "cpu")


@pytest.fixture(scope="module")
def jobs(pico_folder: Path, home: Settings, tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """Six good adapters and one whose weights are for a model of another shape."""
    folder = tmp_path_factory.mktemp("pool")
    names = [str(write_peft_adapter(folder / f"{seed}", pico_folder, seed)) for seed in range(7)]
    bad = folder / "6/adapter_config.json"
    bad.write_text(bad.read_text().replace('"use_dora": false', '"use_dora": true'))
    rows = load_task(str(write_task(folder / "task"))).train[:12]
    return [Job(source, rows) for source in resolve_names(names, home)]


@pytest.fixture(scope="module")
def assignment(pico_folder: Path, home: Settings) -> Assignment:
    return Assignment(str(pico_folder), "acc", home, threads=1)


def scored(scorer: Scorer, jobs: list[Job]) -> dict[str, list[Answer] | str]:
    return {job.source.ref.id: outcome for job, outcome in scorer.score(jobs)}


def assert_same(
    found: dict[str, list[Answer] | str], expected: dict[str, list[Answer] | str]
) -> None:
    assert found.keys() == expected.keys()
    for name, outcome in expected.items():
        if isinstance(outcome, str):
            assert found[name] == outcome
            continue
        assert [a.correct for a in found[name]] == [a.correct for a in outcome]  # type: ignore[union-attr]
        for one, other in zip(found[name], outcome, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-5)  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def expected(
    pico_base: BaseModel, pico_folder: Path, jobs: list[Job]
) -> dict[str, list[Answer] | str]:
    found = scored(OneProcess(pico_base, str(pico_folder), "acc"), jobs)
    assert "DoRA" in str(found.pop("6"))
    return {**found, "6": scored(OneProcess(pico_base, str(pico_folder), "acc"), jobs[6:])["6"]}


def test_several_processes(
    assignment: Assignment, jobs: list[Job], expected: dict[str, list[Answer] | str]
) -> None:
    assert_same(scored(ManyProcesses(assignment, 2), jobs), expected)


def test_an_adapter_that_takes_its_workers_down_fails_alone(
    assignment: Assignment, jobs: list[Job], expected: dict[str, list[Answer] | str]
) -> None:
    """Whoever reads its configuration, which here is a pipe, is killed."""
    victim = jobs[0].source.ref
    pipe, kept = Path(victim.path) / "adapter_config.json", Path(victim.path) / "kept"
    pipe.rename(kept)
    os.mkfifo(pipe)
    ending = threading.Event()
    killer = threading.Thread(target=kill_readers, args=(pipe, ending))
    killer.start()
    try:
        found = scored(ManyProcesses(assignment, 2), jobs)
    finally:
        ending.set()
        killer.join()
        kept.rename(pipe)
    assert found.pop(victim.id) == "the worker that scored it died"
    assert_same(found, {name: one for name, one in expected.items() if name != victim.id})


def kill_readers(pipe: Path, ending: threading.Event) -> None:
    """Lets a process open a pipe to read, and kills it then."""
    while not ending.wait(0.02):
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads
            continue
        readers: list[psutil.Process] = []
        while not readers:  # the reader's own call returns a little later
            readers = [one for one in psutil.Process().children(recursive=True) if holds(one, pipe)]
        for reader in readers:
            reader.kill()
            reader.wait()
        os.close(writer)


def holds(process: psutil.Process, file: Path) -> bool:
    links = Path(f"/proc/{process.pid}/fd").iterdir()
    return any(os.path.realpath(link) == str(file) for link in links)


def test_a_ray_cluster_that_loses_a_worker(
    assignment: Assignment, jobs: list[Job], expected: dict[str, list[Answer] | str]
) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    killed = threading.Event()

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not killed.is_set():
            for process in psutil.Process().children(recursive=True):
                try:
                    if "ray::Worker" in " ".join(process.cmdline()):
                        process.kill()
                        killed.set()
                        return
                except psutil.Error:
                    continue
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    found = scored(RayCluster(assignment, "local"), jobs)
    thread.join()
    assert killed.is_set()
    assert_same(found, expected)


def test_a_cluster_that_is_not_there_is_said(assignment: Assignment, jobs: list[Job]) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.raises(RecycleError, match="cannot be reached"):
        scored(RayCluster(assignment, "127.0.0.1:1"), jobs)
