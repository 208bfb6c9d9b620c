"""The real command, on a pool of PEFT adapters of the pico model and a small task."""

import os
import subprocess
from pathlib import Path

import pytest
from support.adapters import write_peft_adapter
from support.command import POOL, RECYCLE, Done, Recycle, Shell
from support.tasks import write_task
from support.tune import Tune
from typer.testing import CliRunner

from recycle_cli.cli.app import app


@pytest.fixture
def recycle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recycle:
    """Runs the command in this process, in a folder and with a home of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RECYCLE_HOME", str(tmp_path / "home"))

    def run(*args: object, stdin: str | None = None, succeeds: bool = True) -> Done:
        result = CliRunner().invoke(app, [str(arg) for arg in args], input=stdin)
        if succeeds:
            assert result.exit_code == 0, result.stderr or result.exception
        return Done(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def crawled(recycle: Recycle, pool: Path, pico_folder: Path) -> Recycle:
    """The command, with the pool in its index."""
    recycle("crawl", pool, "--base-model", pico_folder)
    return recycle


@pytest.fixture
def tune(recycle: Recycle, task: Path, pico_folder: Path) -> Tune:
    """`recycle tune` on the small task and the pico model."""
    return Tune(recycle, task, pico_folder)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Runs a line of bash, with `recycle` on the path, in the test's own folder and home."""
    place = tmp_path / "bin"
    place.mkdir()
    command = place / "recycle"
    command.write_text(f'#!/bin/sh\nexec {" ".join(RECYCLE)} "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{place}:{os.environ['PATH']}",
        "RECYCLE_HOME": str(tmp_path / "home"),
    }

    def run(line: str) -> Done:
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def pool(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four usable adapters and one that no LoRA can stand for."""
    folder = tmp_path_factory.mktemp("pool")
    for seed, (name, config) in enumerate(POOL.items()):
        write_peft_adapter(folder / name, pico_folder, seed, **config)
    write_peft_adapter(folder / "lab/dora", pico_folder, 9, use_dora=True)
    return folder


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed task of 40 training and 40 test rows."""
    return write_task(tmp_path_factory.mktemp("tasks") / "colours")
