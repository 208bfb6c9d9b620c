"""A `recycle tune` that was killed, gone on with."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from support.command import Recycle, assert_refused, kill_once_kept

from recycle_cli.lora.folder import weights_sha256

STATE = Path(".mixed.unfinished")
STEPS = 120
# The target LoRA first, with dropout; then a mixture that is validated, and so kept, often.
TARGET = ("--train-target", "--target-rank", "2", "--target-steps", "3", "--dropout", "0.3")
PACE = ("--steps", str(STEPS), "--eval-every", "2", "--batch-size", "2", "--patience", "1000")
Tune = Callable[..., list[str]]


@pytest.fixture(scope="module")
def line(pool: Path, task: Path, pico_folder: Path) -> list[str]:
    """The words after `recycle tune`."""
    adapters = [str(pool / "lab/plain"), str(pool / "shop/mlp")]
    common = ["--task", str(task), "--base-model", str(pico_folder), "--out", "mixed"]
    return [*adapters, *TARGET, *PACE, *common]


def steps_kept(state: Path) -> int:
    with safe_open(state / "recycle/state.safetensors", framework="pt") as file:
        return int(json.loads(file.metadata()["run"])["step"])


@pytest.fixture(scope="module")
def killed(line: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a process was killed while it trained the mixture."""
    place = tmp_path_factory.mktemp("killed")
    kill_once_kept(["tune", *line], place, place / STATE / "recycle/state.safetensors")
    assert not (place / "mixed").exists()
    assert 0 < steps_kept(place / STATE) < STEPS
    return place


@pytest.fixture
def after(recycle: Recycle, killed: Path, tmp_path: Path) -> Recycle:
    """The command, in a folder with what the killed process kept."""
    shutil.copytree(killed / STATE, tmp_path / STATE)
    return recycle


def test_it_ends_bit_for_bit_as_one_that_was_left_alone(
    after: Recycle, line: list[str], tmp_path: Path
) -> None:
    step = steps_kept(tmp_path / STATE)
    resumed = after("tune", *line, "--resume", "--json")
    assert f"going on from step {step}" in resumed.stderr
    alone = after("tune", *line, "--json", "--force").document
    for name in ("sha256", "history", "best", "settings", "adapters", "target", "command"):
        assert resumed.document[name] == alone[name], name
    assert weights_sha256(tmp_path / "mixed") == alone["sha256"]
    assert not (tmp_path / STATE).exists()
    assert alone["best"]["step"] > 0
    assert len(alone["history"]) == STEPS // 2 + 1


def test_it_is_not_passed_over(after: Recycle, line: list[str], tmp_path: Path) -> None:
    before = sorted(path.read_bytes() for path in (tmp_path / STATE).rglob("*.safetensors"))
    refused = after("tune", *line, succeeds=False)
    assert_refused(refused, 2, "a run to mixed was interrupted", "--resume", "--force")
    assert sorted(p.read_bytes() for p in (tmp_path / STATE).rglob("*.safetensors")) == before


def test_force_starts_anew(after: Recycle, line: list[str], tmp_path: Path) -> None:
    done = after("tune", *line, "--force", "--target-steps", 1, "--steps", 2)
    assert "going on" not in done.stderr
    assert not (tmp_path / STATE).exists()
    assert (tmp_path / "mixed").is_dir()


def test_with_nothing_kept_resume_starts_anew(recycle: Recycle, line: list[str]) -> None:
    few = [*line, "--target-steps", "1", "--steps", "2", "--json"]
    first = recycle("tune", *few, "--resume")
    assert "going on" not in first.stderr
    assert recycle("tune", *few, "--force").document["sha256"] == first.document["sha256"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lr 0.01", "recycle differs in lr"),
        ("--steps 121 --l1 0.1", "recycle differs in l1, steps"),
        ("--reinit norm", "recycle differs in reinit"),
        ("--granularity layer --lr-schedule linear", "recycle differs in granularity, lr_schedule"),
        ("--save-dtype bfloat16", "lora differs in save_dtype"),
        ("--target-lr 0.01 --target-rank 3", "lora differs in lr, rank"),
        ("--rows 30", "lora differs in rows"),
        ("--seed 1", "lora differs in seed"),
    ],
)
def test_another_run_is_refused_by_what_differs(
    after: Recycle, line: list[str], tmp_path: Path, words: str, said: str
) -> None:
    refused = after("tune", *line, *words.split(), "--resume", succeeds=False)
    assert_refused(refused, 2, said, "--force")
    assert (tmp_path / STATE).exists()
    assert not (tmp_path / "mixed").exists()


def test_other_adapters_are_another_run(after: Recycle, line: list[str], pool: Path) -> None:
    first, second, *rest = line
    for adapters in ([second, first], [first], [first, str(pool / "lab/rslora")]):
        refused = after("tune", *adapters, *rest, "--resume", succeeds=False)
        assert_refused(refused, 2, "differs in adapters")


def test_the_target_in_another_role_is_another_run(
    after: Recycle, line: list[str], task: Path, pico_folder: Path
) -> None:
    """The same files in the same order, the last of them as one of the pool."""
    common = ("--task", task, "--base-model", pico_folder)
    after("tune", *common, "--rank", 2, "--steps", 3, "--dropout", 0.3, "--out", "target")
    words = ("tune", *line[:2], "target", *PACE, *common, "--out", "mixed", "--resume")
    assert_refused(after(*words, succeeds=False), 2, "recycle differs in target\n")
    # In its own role it is the very same run.
    own_role = ("tune", *line[:2], "--target", "target", *words[4:])
    assert "going on from step" in after(*own_role).stderr


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_a_damaged_state_is_refused_in_words(
    after: Recycle, line: list[str], pool: Path, tmp_path: Path, damage: str
) -> None:
    file = tmp_path / STATE / "recycle/state.safetensors"
    whole = file.read_bytes()
    other = (pool / "lab/plain/adapter_model.safetensors").read_bytes()
    file.write_bytes({"cut": whole[:-100], "empty": b"", "foreign": other}[damage])
    refused = after("tune", *line, "--resume", succeeds=False)
    assert_refused(refused, 2, "state.safetensors cannot be read", "start anew: remove")
    assert not (tmp_path / "mixed").exists()


def test_a_run_that_diverges_keeps_nothing(
    recycle: Recycle, line: list[str], tmp_path: Path
) -> None:
    wild = ("--lr", "1e30", "--max-grad-norm", "1e9", "--warmup", "0", "--target-steps", "1")
    done = recycle("tune", *line, *wild, succeeds=False)
    assert done.exit_code == 1
    assert "loss became" in done.stderr
    assert not (tmp_path / STATE).exists()
