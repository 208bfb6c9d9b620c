"""Pipes, signals and closed streams, with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open
from support.command import POOL, RECYCLE, Recycle, Shell

# One adapter a dimension: nevergrad runs scipy's algorithm for this in a thread.
LONG_SEARCH = [
    "--method",
    "lorahub",
    "--granularity",
    "module",
    "--steps",
    "200",
    "--out",
    "endless",
]
ENDLESS = ["--method", "lora", "--steps", "1000000", "--rank", "2", "--out", "endless"]


def test_documents_flow_from_select_through_tune_to_eval(
    recycle: Recycle, shell: Shell, pool: Path, pico_folder: Path, task: Path, tmp_path: Path
) -> None:
    recycle("crawl", pool, "--base-model", pico_folder)
    done = shell(
        f"recycle select --task {task} -k 2 --base-model {pico_folder} --json"
        " | recycle tune - --steps 2 --out mixed --json"
        " | recycle eval - --json"
    )
    assert done.exit_code == 0, done.stderr
    base, mixed = done.documents
    assert (base["adapter"], mixed["adapter"]["id"]) == ("base", "mixed")
    assert mixed["adapter"]["path"] == str(tmp_path / "mixed")
    assert mixed["task"]["path"] == str(task)
    assert mixed["base_model"] == str(pico_folder)


def test_a_failure_before_the_pipe_does_not_pass_for_success(shell: Shell) -> None:
    done = shell("recycle select --task nowhere --json | recycle merge - --out merged --json")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "error: standard input is empty" in done.stderr


def test_a_reader_that_leaves_early_is_no_traceback(
    shell: Shell, pool: Path, pico_folder: Path
) -> None:
    done = shell(f"recycle crawl {pool} --base-model {pico_folder} --json | head -c 1 > /dev/null")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_said(shell: Shell, pool: Path, pico_folder: Path) -> None:
    done = shell(f"recycle crawl {pool} --base-model {pico_folder} --json > /dev/full")
    assert done.exit_code == 1
    assert "Traceback" not in done.stderr
    assert "error: [Errno 28]" in done.stderr
    assert "Exception ignored" not in done.stderr


def test_closed_stdout_is_no_traceback(shell: Shell, pool: Path, pico_folder: Path) -> None:
    done = shell(f"recycle crawl {pool} --base-model {pico_folder} --json >&-")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_training_and_leaves_nothing_half_written(
    pico_folder: Path, task: Path, pool: Path, tmp_path: Path, stop: signal.Signals, search: bool
) -> None:
    asked = [str(pool / name) for name in POOL] + LONG_SEARCH if search else ENDLESS
    words = [*RECYCLE, "tune", "--task", str(task), "--base-model", str(pico_folder), *asked]
    environment = {**os.environ, "RECYCLE_HOME": str(tmp_path / "home")}
    with subprocess.Popen(
        words,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # Jobs in the background inherit an ignored SIGINT, which Python then leaves ignored.
        preexec_fn=lambda: signal.signal(stop, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(("training a target LoRA", "mixing 4 adapters"))
        time.sleep(0.5)
        process.send_signal(stop)
        try:
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 128 + stop, said
    assert "Traceback" not in said
    # What is kept to go on with is whole, or not there.
    left = [path for path in tmp_path.iterdir() if "endless" in path.name]
    assert {path.name for path in left} <= {".endless.unfinished"}
    if left:
        assert "--resume" in said
        (state,) = (file for file in left[0].rglob("*") if file.is_file())
        with safe_open(state, framework="pt") as file:
            assert json.loads(file.metadata()["run"])["step"] % 10 == 0


def test_progress_stays_off_stdout_and_quiet_is_quiet(
    recycle: Recycle, pico_folder: Path, task: Path
) -> None:
    words = ("tune", "--task", task, "--base-model", pico_folder, "--steps", "1", "--json")
    assert "training" in recycle(*words, "--out", "a").stderr
    assert recycle("--quiet", *words, "--out", "b").stderr == ""
    assert "float32: as RECYCLE_DTYPE says" in recycle("-v", *words, "--out", "c").stderr


def test_version() -> None:
    done = subprocess.run([*RECYCLE, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("recycle 0.")
    assert sys.version_info >= (3, 11)
