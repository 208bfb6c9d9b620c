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
    PARTS,
    ROUTED_CONFIG_FILE,
    ROUTED_WEIGHTS_FILE,
    RoutedAdapter,
    RoutedModule,
    is_routed,
    read_routed,
    write_routed,
)
from recycle_cli.records import AdapterRef

ONE, TWO, THREE = (
    AdapterRef(id=f"lab/{name}", revision=name, sha256=name * 64, path=f"/{name}") for name in "abc"
)


def random_module() -> RoutedModule:
    """Of the first and the third adapter."""
    return RoutedModule(
        A=torch.randn(5, 7),
        B=torch.randn(4, 5),
        owner=torch.tensor([0, 0, 1, 1, 1]),
        present=torch.tensor([0, 2]),
        prototypes=torch.randn(2, 7),
    )


ADAPTER = RoutedAdapter(
    {"model.layers.0.q_proj": random_module(), "lm_head": random_module()}, 1, 0.5
)
Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_routed(tmp_path, ADAPTER, "base", [ONE, TWO, THREE])
    return tmp_path


def test_what_is_written_is_read(folder: Path) -> None:
    adapter, base = read_routed(folder)
    assert is_routed(folder)
    assert {path.name for path in folder.iterdir()} == {ROUTED_CONFIG_FILE, ROUTED_WEIGHTS_FILE}
    assert (base, adapter.top_k, adapter.temperature) == ("base", 1, 0.5)
    assert set(adapter.modules) == set(ADAPTER.modules)
    for path, module in adapter.modules.items():
        assert module.shape == (4, 7)
        for part in ("A", "B", "owner", "present", "prototypes"):
            assert torch.equal(getattr(module, part), getattr(ADAPTER.modules[path], part))


def test_the_adapters_stand_in_the_configuration(folder: Path) -> None:
    config = json.loads((folder / ROUTED_CONFIG_FILE).read_text())
    assert config["adapters"][1] == {"id": "lab/b", "revision": "b", "sha256": "b" * 64}
    assert len(config["adapters"]) == 3


def test_factors_may_be_narrow_prototypes_are_not(tmp_path: Path) -> None:
    write_routed(tmp_path, ADAPTER, "base", [ONE, TWO, THREE], torch.bfloat16)
    tensors = load_file(tmp_path / ROUTED_WEIGHTS_FILE)
    assert tensors["lm_head.lora_A"].dtype == tensors["lm_head.lora_B"].dtype == torch.bfloat16
    assert tensors["lm_head.prototypes"].dtype == torch.float32
    read = read_routed(tmp_path)[0].modules["lm_head"]
    assert torch.equal(read.A, ADAPTER.modules["lm_head"].A.bfloat16().float())


BENT_CONFIGS: list[tuple[Any, str]] = [
    ({"format": 2}, "format 2"),
    ({"format": None}, "format None"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_k": True}, "top_k is True"),
    ({"top_k": 1.5}, "top_k is 1.5"),
    ({"temperature": 0}, "temperature is 0"),
    ({"temperature": True}, "temperature is True"),
    ({"temperature": 1e-50}, "temperature is 1e-50"),
    ({"temperature": 10**400}, "temperature is 1000"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"base_model": 3}, "base_model is 3"),
    ({"adapters": None}, "adapters is None"),
    ({"adapters": []}, r"adapters is \[\]"),
    ({"adapters": ["one", "two"]}, "adapters is"),
    ({"adapters": [{"id": "one"}] * 3}, "adapters is"),
    ({"adapters": [{"id": "one", "sha256": "1"}]}, "do not fit"),
]


@pytest.mark.parametrize(("change", "said"), BENT_CONFIGS)
def test_bent_configurations_are_refused(folder: Path, change: dict[str, Any], said: str) -> None:
    path = folder / ROUTED_CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=said) as caught:
        read_routed(folder)
    assert caught.value.hint


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"[" * 100_000, b"\xff\xfe"])
def test_configurations_that_are_none_are_refused(folder: Path, text: bytes) -> None:
    (folder / ROUTED_CONFIG_FILE).write_bytes(text)
    with pytest.raises(InputError, match=r"routed_config\.json"):
        read_routed(folder)


def put(part: str, tensor: Tensor) -> Callable[[Tensors], object]:
    """Another tensor in the head."""
    return lambda tensors: tensors.update({f"lm_head.{part}": tensor})


BENT_TENSORS: list[tuple[Callable[[Tensors], object], str]] = [
    *((put("lora_A", torch.randn(shape)), "do not fit") for shape in ((4, 7), (5, 6), (5,))),
    *((put("lora_B", torch.randn(shape)), "do not fit") for shape in ((4, 6), (4,), (4, 5, 1))),
    *((put("prototypes", torch.randn(shape)), "do not fit") for shape in ((2, 6), (3, 7), (2,))),
    (put("lora_A", torch.ones(5, 7, dtype=torch.int64)), "do not fit"),
    (put("prototypes", torch.ones(2, 7, dtype=torch.int64)), "do not fit"),
    *(
        (put("owner", torch.tensor(owner)), "do not fit")
        for owner in (
            [1, 1, 2, 2, 2],  # past the prototypes
            [-1, -1, 0, 0, 1],
            [0, 0, 0, 0, 0],  # a prototype without components
            [0.0, 0.0, 1.0, 1.0, 1.0],
            [0, 0, 1, 1],
        )
    ),
    *(
        (put("present", torch.tensor(present)), "do not fit")
        for present in ([0, 3], [-1, 0], [2, 0], [1, 1], [0], [0.0, 2.0], [[0], [2]])
    ),
    *((lambda t, p=part: t.pop(f"lm_head.{p}"), f"lacks {part} of lm_head") for part in PARTS),
    (put("gate", torch.ones(1)), "'lm_head.gate'"),
    (lambda t: t.update({"owner": torch.ones(1)}), "'owner'"),
    (lambda t: t["lm_head.lora_A"][0].fill_(torch.nan), "NaN"),
    (lambda t: t["lm_head.lora_B"][0].fill_(-torch.inf), "NaN or infinity"),
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
    with pytest.raises(InputError, match=said) as caught:
        read_routed(folder)
    assert caught.value.hint


def test_a_module_without_components_is_refused(folder: Path) -> None:
    path = folder / ROUTED_WEIGHTS_FILE
    empty = {
        "lora_A": torch.zeros(0, 7),
        "lora_B": torch.zeros(4, 0),
        "owner": torch.zeros(0, dtype=torch.int64),
        "present": torch.zeros(0, dtype=torch.int64),
        "prototypes": torch.zeros(0, 7),
    }
    save_file({f"lm_head.{part}": tensor for part, tensor in empty.items()}, path)
    with pytest.raises(InputError, match="do not fit"):
        read_routed(folder)


def test_a_truncated_or_missing_file_is_refused(folder: Path) -> None:
    path = folder / ROUTED_WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="cannot be read"):
        read_routed(folder)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_routed(folder)
