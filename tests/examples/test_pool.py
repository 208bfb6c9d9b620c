"""The committed pool is what its README says, and keeps away from the held-out tasks."""

import json
import re
from pathlib import Path

from recycle_cli.lora.folder import read_adapter
from recycle_cli.workflows.demo import HELD_OUT, examples_folder

POOL = examples_folder() / "pool"
FOLDERS = sorted(path.parent for path in POOL.glob("*/*/adapter_config.json"))


def tasks_of_the_pool() -> set[str]:
    cards = [(folder / "README.md").read_text(encoding="utf-8") for folder in FOLDERS]
    return {found[1] for card in cards if (found := re.search(r"tuned on \d+ rows of (\w+)", card))}


def test_the_pool_is_small_and_mixed() -> None:
    adapters = [read_adapter(folder) for folder in FOLDERS]
    assert len(adapters) >= 12
    assert sum(path.stat().st_size for path in POOL.rglob("*") if path.is_file()) < 12_000_000
    assert sum(adapter.config.use_rslora for adapter in adapters) == 1
    ranks = [{piece.rank for piece in adapter.update.values()} for adapter in adapters]
    assert sum(len(of_one) > 1 for of_one in ranks) == 1, "one has a rank pattern"
    assert len(set.union(*ranks)) >= 4
    assert len({frozenset(adapter.config.target_modules) for adapter in adapters}) >= 4


def test_no_adapter_has_seen_a_held_out_task() -> None:
    trained = tasks_of_the_pool()
    everything = json.loads((POOL.parent / "tasks/tasks.json").read_text(encoding="utf-8"))
    assert len(trained) == len(FOLDERS)
    assert trained.isdisjoint(HELD_OUT)
    assert trained.union(HELD_OUT) == set(everything)


def test_the_readme_lists_every_adapter_and_every_held_out_task() -> None:
    readme = (POOL / "README.md").read_text(encoding="utf-8")
    for name in [*(str(folder.relative_to(POOL)) for folder in FOLDERS), *HELD_OUT]:
        assert f"`{name}`" in readme


def test_the_adapters_tell_nothing_of_the_machine_they_were_trained_on() -> None:
    for folder in FOLDERS:
        for path in folder.iterdir():
            assert str(Path.home()).encode() not in path.read_bytes()
        assert {path.name for path in folder.iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }
