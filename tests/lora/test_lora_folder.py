import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import pico
from support.adapters import write_peft_adapter
from support.folders import added_by_peft
from support.low_rank import Matrix, dense, dense_all, random_piece

from recycle_cli.errors import InputError
from recycle_cli.lora.config import AdapterConfig, AdapterProblem
from recycle_cli.lora.folder import (
    check_pair,
    open_adapter,
    pair_keys,
    read_adapter,
    read_config,
    weights_sha256,
    write_adapter,
)
from recycle_cli.lora.update import LowRankUpdate

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
WIDE, TALL = (pico.HIDDEN, pico.INTERMEDIATE), (pico.INTERMEDIATE, pico.HIDDEN)
LINEAR = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
LINEAR |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def modules(names: set[str]) -> set[str]:
    return {f"model.layers.{layer}.{name}" for layer in range(pico.LAYERS) for name in names}


ATTENTION_QV = modules({"self_attn.q_proj", "self_attn.v_proj"})


def assert_same(found: Mapping[str, Matrix], expected: Mapping[str, Matrix]) -> None:
    assert found.keys() == expected.keys()
    for module, matrix in expected.items():
        np.testing.assert_allclose(found[module], matrix, rtol=0, atol=1e-13, err_msg=module)


PATTERNS: dict[str, Any] = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 7, "q_proj": 2},
    "alpha_pattern": {"v_proj": 3, "layers.1.self_attn.v_proj": 50, Q0: 1},
}


@pytest.mark.parametrize(
    ("config", "adapted"),
    [
        ({"lora_alpha": 6}, ATTENTION_QV),
        ({"lora_alpha": 6, "use_rslora": True}, ATTENTION_QV),
        ({"rank_pattern": PATTERNS["rank_pattern"]}, ATTENTION_QV),
        ({"alpha_pattern": PATTERNS["alpha_pattern"]}, ATTENTION_QV),
        ({**PATTERNS, "use_rslora": True}, ATTENTION_QV),
        ({"target_modules": "all-linear", "r": 3}, modules(LINEAR)),
        ({"target_modules": r".*\.1\.mlp\.down_proj", "init_lora_weights": "gaussian"}, {DOWN1}),
    ],
)
def test_the_update_is_what_peft_adds_to_the_weights(
    tmp_path: Path, pico_folder: Path, config: dict[str, Any], adapted: set[str]
) -> None:
    folder = write_peft_adapter(tmp_path / "one", pico_folder, seed=5, **config)
    update = read_adapter(folder).update
    assert set(update) == adapted
    assert_same(dense_all(update), added_by_peft(pico_folder, folder))


MIXED = {
    "model.layers.0.self_attn.k_proj": random_piece(1, 3, (16, 32), scale=0.3),
    "model.layers.0.self_attn.q_proj": random_piece(2, 5, (32, 32), scale=-1.7),
    "model.layers.1.mlp.down_proj": random_piece(3, 3, WIDE, scale=40.0),
    "model.layers.1.mlp.gate_proj": random_piece(4, 1, TALL, scale=1.0),
    "model.layers.1.self_attn.q_proj": random_piece(5, 40, (32, 32), scale=1e-3),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_what_is_written_is_read_back_to_rounding(tmp_path: Path, dtype: torch.dtype) -> None:
    write_adapter(tmp_path, MIXED, "org/base", dtype)
    adapter = read_adapter(tmp_path)
    assert adapter.config.base_model == "org/base"
    assert {m: p.rank for m, p in adapter.update.items()} == {m: p.rank for m, p in MIXED.items()}
    # Each of two factors is rounded once to `dtype`, and their scaled product before in float32.
    error = 2 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps
    for module, piece in MIXED.items():
        size = abs(piece.scale) * (piece.B.abs().double() @ piece.A.abs().double()).numpy()
        assert (np.abs(dense(adapter.update[module]) - dense(piece)) <= error * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_loads_what_is_written_as_the_same_update(
    tmp_path: Path, pico_folder: Path, dtype: torch.dtype
) -> None:
    write_adapter(tmp_path, MIXED, str(pico_folder), dtype)
    assert_same(added_by_peft(pico_folder, tmp_path), dense_all(read_adapter(tmp_path).update))


def test_a_scale_that_is_a_power_of_two_is_written_without_any_rounding(tmp_path: Path) -> None:
    pieces = {"m.a": random_piece(0, 2, (4, 3), 0.25), "m.b": random_piece(1, 3, (3, 5), -8.0)}
    write_adapter(tmp_path, pieces, "org/base")
    found = read_adapter(tmp_path).update
    assert all(torch.equal(found[m].dense(), piece.dense()) for m, piece in pieces.items())


def test_float64_factors_are_written_as_float32(tmp_path: Path) -> None:
    piece = random_piece(0, 2, (4, 3), 3.0).to(torch.float64)
    write_adapter(tmp_path, {"m.a": LowRankUpdate(piece.A, piece.B / 3.0, 3.0)}, "org/base")
    found = read_adapter(tmp_path).update["m.a"]
    assert (found.A.dtype, found.B.dtype, found.scale) == (torch.float32, torch.float32, 1.0)
    np.testing.assert_allclose(dense(found), dense(piece) / 3.0, rtol=1e-5)


def written(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(module: str, rank: int = 2) -> dict[str, torch.Tensor]:
    piece, prefix = random_piece(0, rank, (4, 3)), f"base_model.model.{module}"
    return {f"{prefix}.lora_A.weight": piece.A, f"{prefix}.lora_B.weight": piece.B}


def test_modules_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    # Within a weights file the wider dtypes come first.
    half = {key: tensor.half() for key, tensor in factors("m.a").items()}
    tensors = factors("m.b") | half | factors("m.c")
    assert list(read_adapter(written(tmp_path / "one", {}, tensors)).update) == [
        "m.a",
        "m.b",
        "m.c",
    ]


BENT_FOLDERS: list[tuple[str, dict[str, Any], dict[str, torch.Tensor], str]] = [
    ("not_lora", {"peft_type": "LOHA"}, factors("m.a"), "'LOHA'"),
    ("dora", {"use_dora": True}, factors("m.a"), "use_dora is True"),
    ("rank_mismatch", {}, factors("m.a", 3), "m.a has rank 3, but adapter_config.json says 2"),
    ("rank_mismatch", {"rank_pattern": {"a": 5}}, factors("m.a"), "rank 2, but"),
    ("foreign_key", {}, factors("m.a") | {"m.weight": torch.zeros(1)}, "'m.weight'"),
    ("no_tensors", {}, {}, "no tensors"),
]


@pytest.mark.parametrize(("code", "config", "tensors", "seen"), BENT_FOLDERS)
def test_folders_that_are_no_plain_low_rank_update(
    tmp_path: Path,
    code: str,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    seen: str,
) -> None:
    with pytest.raises(AdapterProblem) as caught:
        read_adapter(written(tmp_path / "one", config, tensors))
    assert (caught.value.code, seen in caught.value.message) == (code, True), caught.value.message


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_is_not_there_is_named_with_its_folder(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "one", {}, factors("m.a"))
    (folder / name).rename(folder / "adapter_model.bin")
    with pytest.raises(InputError) as caught:
        read_adapter(folder)
    assert caught.value.message == f"{folder} has no {name}"


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\x08" + bytes(7) + b"{}{}{}{}"])
def test_weights_that_cannot_be_read_are_named(tmp_path: Path, content: bytes) -> None:
    folder = written(tmp_path / "one", {}, factors("m.a"))
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_adapter(folder)
    assert str(folder / "adapter_model.safetensors") in caught.value.message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"r": 1' + b"0" * 5000]
)
def test_a_configuration_that_is_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterProblem) as caught:
        read_config(tmp_path)
    assert caught.value.code == "bad_config"
    assert str(tmp_path / "adapter_config.json") in caught.value.message


def key(module: str, factor: str) -> str:
    return f"base_model.model.{module}.lora_{factor}.weight"


def test_keys_are_paired_by_module() -> None:
    keys = [key("m.b", "B"), key("m.a", "A"), key("m.b", "A"), key("m.a", "B")]
    paired = {m: (key(m, "A"), key(m, "B")) for m in ("m.a", "m.b")}
    assert pair_keys(keys) == paired


@pytest.mark.parametrize(
    ("code", "keys", "seen"),
    [
        ("no_tensors", [], "no tensors"),
        ("pair_incomplete", [key("m.a", "A")], "m.a has lora_A"),
        ("pair_incomplete", [key("m.a", "B"), key("m.b", "A"), key("m.b", "B")], "m.a has lora_B"),
        *(
            ("foreign_key", [key("m.a", "A"), key("m.a", "B"), foreign], repr(foreign))
            for foreign in (
                "base_model.model.m.a.lora_magnitude_vector.weight",
                "base_model.model.m.embed.lora_embedding_A",
                "base_model.model.m.a.lora_A.default.weight",
                "base_model.model.m.a.lora_B.bias",
                "base_model.model.m a.lora_A.weight",
                "base_model.model.m.b.lora_A.weight.absmax",
                "base_model.model.m.b.lora_A.weight\n",
                "m.a.lora_A.weight",
            )
        ),
    ],
)
def test_keys_that_make_no_pairs(code: str, keys: list[str], seen: str) -> None:
    with pytest.raises(AdapterProblem) as caught:
        pair_keys(keys)
    assert (caught.value.code, seen in caught.value.message) == (code, True), caught.value.message


@pytest.mark.parametrize(
    ("code", "shape_a", "shape_b", "seen"),
    [
        ("shape_mismatch", (2, 8), (8, 3), "m.a has factors of shapes (2, 8) and (8, 3)"),
        ("shape_mismatch", (2,), (8, 2), "(2,) and (8, 2)"),
        ("shape_mismatch", (2, 8, 1, 1), (8, 2, 1, 1), "(2, 8, 1, 1)"),
        ("rank_mismatch", (3, 8), (8, 3), "m.a has rank 3, but adapter_config.json says 2"),
        ("rank_mismatch", (8, 2), (2, 8), "m.a has rank 8, but"),
        (None, (2, 8), (5, 2), ""),
    ],
)
def test_factors_have_to_fit(
    code: str | None, shape_a: tuple[int, ...], shape_b: tuple[int, ...], seen: str
) -> None:
    config = AdapterConfig(rank=9, alpha=1.0, rank_pattern={"a": 2})
    if code is None:
        check_pair("m.a", shape_a, shape_b, config)
        return
    with pytest.raises(AdapterProblem) as caught:
        check_pair("m.a", shape_a, shape_b, config)
    assert (caught.value.code, seen in caught.value.message) == (code, True), caught.value.message


@pytest.mark.parametrize("size", [0, 5, 1 << 20, (1 << 20) + 7])
def test_the_identity_is_the_sha256_of_the_weights_file(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    assert weights_sha256(tmp_path) == hashlib.sha256(content).hexdigest()


def test_the_same_update_is_written_with_the_same_identity(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write_adapter(tmp_path / "one", MIXED, "org/base")
    write_adapter(tmp_path / "two", dict(reversed(MIXED.items())), "org/base")
    assert weights_sha256(tmp_path / "one") == weights_sha256(tmp_path / "two")


def test_one_module_is_read_as_all_of_them_are(tmp_path: Path, pico_folder: Path) -> None:
    folder = write_peft_adapter(tmp_path / "one", pico_folder, 3, **PATTERNS, use_rslora=True)
    whole = read_adapter(folder)
    with open_adapter(folder) as file:
        assert file.config == whole.config
        assert dict(file.shapes) == {m: piece.shape for m, piece in whole.update.items()}
        assert list(file.shapes) == sorted(whole.update)
        for module in reversed(file.shapes):
            piece = file.read(module)
            assert torch.equal(piece.A, whole.update[module].A)
            assert torch.equal(piece.B, whole.update[module].B)
            assert piece.scale == whole.update[module].scale
    kept = whole.update[Q0].A.clone()
    for path in folder.iterdir():
        path.unlink()
    assert torch.equal(whole.update[Q0].A, kept), "what was read does not need the file"


def test_what_is_not_in_the_file_cannot_be_read(tmp_path: Path) -> None:
    folder = written(tmp_path / "one", {}, factors("m.a"))
    with open_adapter(folder) as file, pytest.raises(KeyError):
        file.read("m.b")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def write_sparse(folder: Path, rank: int, side: int) -> None:
    """An adapter whose factors are holes in the file, so that it costs no disk."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "rank_pattern": {"m.b": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    fields: dict[str, Any] = {}
    end = 0
    for module, inner, outer in (("m.a", rank, side), ("m.b", 2, 3)):
        for factor, shape in (("A", [inner, outer]), ("B", [outer, inner])):
            start, end = end, end + 4 * inner * outer
            name = f"base_model.model.{module}.lora_{factor}.weight"
            fields[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(fields).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_opening_reads_shapes_and_no_tensors(tmp_path: Path) -> None:
    write_sparse(tmp_path / "one", rank=1024, side=1 << 17)
    assert (tmp_path / "one/adapter_model.safetensors").stat().st_size > 1 << 30
    before = resident_bytes()
    with open_adapter(tmp_path / "one") as file:
        assert dict(file.shapes) == {"m.a": (1 << 17, 1 << 17), "m.b": (3, 3)}
        assert file.read("m.b").rank == 2
        assert resident_bytes() - before < 64 << 20


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_refused_when_it_is_opened(
    tmp_path: Path, pico_folder: Path, share: float
) -> None:
    folder = write_peft_adapter(tmp_path / "one", pico_folder)
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError) as caught, open_adapter(folder):
        pass
    assert f"{weights} cannot be read" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("content", [bytes(100), b"\xff" * 100, b"PK" + bytes(98), b"{}" * 50])
def test_garbage_is_refused_when_it_is_opened(tmp_path: Path, content: bytes) -> None:
    folder = written(tmp_path / "one", {}, factors("m.a"))
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(InputError) as caught, open_adapter(folder):
        pass
    assert "adapter_model.safetensors" in caught.value.message


@pytest.mark.parametrize(("code", "config", "tensors", "seen"), BENT_FOLDERS)
def test_what_is_no_low_rank_update_is_refused_before_anything_is_read(
    tmp_path: Path,
    code: str,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    seen: str,
) -> None:
    folder = written(tmp_path / "one", config, tensors)
    with pytest.raises(AdapterProblem) as caught, open_adapter(folder):
        pass
    assert (caught.value.code, seen in caught.value.message) == (code, True), caught.value.message
