import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recycle_cli.errors import InputError
from recycle_cli.lora.routed import (
    ROUTED_CONFIG_FILE,
    ROUTED_WEIGHTS_FILE,
    RoutedAdapter,
    RoutedModule,
    is_routed,
    read_routed,
    write_routed,
)


def random_module() -> RoutedModule:
    return RoutedModule(
        A=torch.randn(5, 7),
        B=torch.randn(4, 5),
        owner=torch.tensor([0, 0, 1, 1, 1]),
        prototypes=torch.randn(2, 7),
    )


ADAPTER = RoutedAdapter(
    {"model.layers.0.q_proj": random_module(), "lm_head": random_module()}, 1, 0.5
)
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_routed(tmp_path, ADAPTER, "base", ["one", "two"])
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    adapter, base = read_routed(folder)
    assert is_routed(folder)
    assert not (folder / "adapter_config.json").exists()
    assert (base, adapter.top_k, adapter.temperature) == ("base", 1, 0.5)
    assert set(adapter.modules) == set(ADAPTER.modules)
    for path, module in adapter.modules.items():
        assert module.shape == (4, 7)
        for part in ("A", "B", "owner", "prototypes"):
            assert torch.equal(getattr(module, part), getattr(ADAPTER.modules[path], part))


def test_factors_may_be_narrow_prototypes_are_not(tmp_path: Path) -> None:
    write_routed(tmp_path, ADAPTER, "base", [], torch.bfloat16)
    tensors = load_file(tmp_path / ROUTED_WEIGHTS_FILE)
    assert tensors["lm_head.lora_A"].dtype == torch.bfloat16
    assert tensors["lm_head.prototypes"].dtype == torch.float32


BENT_CONFIGS: list[tuple[Any, str]] = [
    ({"format": 2}, "format 2"),
    ({"format": None}, "format None"),
    ({"top_k": -1}, "top_k -1"),
    ({"top_k": True}, "top_k True"),
    ({"top_k": 1.5}, "top_k 1.5"),
    ({"temperature": 0}, "temperature 0"),
    ({"temperature": "hot"}, "'hot'"),
    ({"base_model": 3}, "base model 3"),
]


@pytest.mark.parametrize(("change", "said"), BENT_CONFIGS)
def test_bent_configurations_are_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    path = folder / ROUTED_CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=said):
        read_routed(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000])
def test_configurations_that_are_none_are_refused(folder: Path, text: str) -> None:
    (folder / ROUTED_CONFIG_FILE).write_text(text)
    with pytest.raises(InputError, match=r"routed_config\.json"):
        read_routed(folder)


def shift_owner(tensors: Tensors) -> None:
    tensors["lm_head.owner"] += 1


def flatten_owner(tensors: Tensors) -> None:
    tensors["lm_head.owner"] = tensors["lm_head.owner"].float()


BENT_TENSORS: list[tuple[Callable[[Tensors], object], str]] = [
    (lambda t: t.pop("lm_head.owner"), "lacks tensors of lm_head"),
    (lambda t: t.update({"lm_head.lora_A": torch.randn(4, 7)}), "do not fit"),
    (lambda t: t.update({"lm_head.lora_B": torch.randn(4, 6)}), "do not fit"),
    (lambda t: t.update({"lm_head.lora_B": torch.randn(4)}), "do not fit"),
    (lambda t: t.update({"lm_head.prototypes": torch.randn(2, 6)}), "do not fit"),
    (shift_owner, "do not fit"),
    (flatten_owner, "do not fit"),
    (lambda t: t["lm_head.lora_A"][0].fill_(torch.nan), "NaN"),
    (lambda t: t["lm_head.prototypes"][0].fill_(torch.inf), "NaN or infinity"),
    (lambda t: t.clear(), "no tensors"),
]


@pytest.mark.parametrize(("bend", "said"), BENT_TENSORS)
def test_bent_weights_are_refused(
    folder: Path, bend: Callable[[Tensors], object], said: str
) -> None:
    path = folder / ROUTED_WEIGHTS_FILE
    tensors = load_file(path)
    bend(tensors)
    save_file(tensors, path)
    with pytest.raises(InputError, match=said):
        read_routed(folder)


def test_a_truncated_or_missing_file_is_refused(folder: Path) -> None:
    path = folder / ROUTED_WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        read_routed(folder)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_routed(folder)
