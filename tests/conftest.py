"""A real model small enough to train in a blink, and the environment that tests run in."""

import os
from collections.abc import Iterator
from pathlib import Path

# OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RECYCLE_DTYPE"] = "float32"
os.environ["RECYCLE_DEVICE"] = "cpu"
os.environ["COLUMNS"] = "200"

import hypothesis
import pytest
from support import pico

from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.settings import Settings

# Property tests are not timed: a busy machine is no defect.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or written to the real home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECYCLE_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def pico_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with a chat template, as a transformers folder."""
    return pico.write_model(tmp_path_factory.mktemp("pico") / "pico-llama")


@pytest.fixture(scope="session")
def pico_base(pico_folder: Path) -> BaseModel:
    """The same, loaded. Whoever puts an adapter on takes it off again."""
    settings = Settings(pico_folder.parent / "home", offline=True, dtype="float32", device="cpu")
    return load_base_model(str(pico_folder), settings)
