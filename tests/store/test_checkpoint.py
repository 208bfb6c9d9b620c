from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.folders import weights_of
from support.low_rank import dense, random_piece
from torch import Tensor

from recycle_cli.errors import InputError
from recycle_cli.lora.update import BLOCK_ENTRIES
from recycle_cli.store.checkpoint import open_checkpoint, write_merged

Q, DOWN = "model.layers.0.q_proj", "model.layers.0.down_proj"
SHAPES = {DOWN: (6, 10), Q: (8, 6)}
INDEX = "model.safetensors.index.json"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a checkpoint: file name -> tensors."""

    def write(files: Mapping[str, Mapping[str, Tensor]], config: str = "{}", **save: Any) -> Path:
        folder = tmp_path / "base"
        folder.mkdir()
        (folder / "config.json").write_text(config)
        for name, tensors in files.items():
            save_file(dict(tensors), folder / name, **save)
        if set(files) != {"model.safetensors"}:
            entries = [f'"{t}": "{name}"' for name, tensors in files.items() for t in tensors]
            (folder / INDEX).write_text(f'{{"weight_map": {{{", ".join(entries)}}}}}')
        return folder

    return write


def tensors(dtype: torch.dtype = torch.float32, prefix: str = "model.") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {m: torch.randn(shape, generator=generator) for m, shape in SHAPES.items()}
    named = {f"{prefix}{m.removeprefix('model.')}.weight": t for m, t in drawn.items()}
    return {name: t.to(dtype) for name, t in named.items()} | {"norm.weight": torch.ones(6)}


def merge(folder: Path, out: Path, deltas: Mapping[str, Any]) -> list[str]:
    out.mkdir()
    shapes = {module: tuple(delta.shape) for module, delta in deltas.items()}
    done: list[int] = []
    checkpoint = open_checkpoint(folder)
    names = checkpoint.locate(shapes)
    files = write_merged(checkpoint, names, out, deltas.__getitem__, lambda: done.append(1))
    assert len(done) == len(deltas)
    return files


UPDATES = {m: random_piece(at, 2, shape, -0.3) for at, (m, shape) in enumerate(SHAPES.items())}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factored", [True, False])
def test_the_sum_is_taken_in_float64_and_rounded_once(
    write: Write, tmp_path: Path, dtype: torch.dtype, factored: bool
) -> None:
    folder = write({"model.safetensors": tensors(dtype)})
    exact = {m: torch.from_numpy(dense(piece)) for m, piece in UPDATES.items()}
    merge(folder, tmp_path / "out", UPDATES if factored else exact)
    after = weights_of(tmp_path / "out")
    for module, delta in exact.items():
        weight = tensors(dtype)[f"{module}.weight"]
        found, expected = after[f"{module}.weight"], (weight.double() + delta).to(dtype)
        # In float64 itself the product may round otherwise here.
        assert torch.allclose(found, expected, rtol=0, atol=1e-14 * (dtype == torch.float64))
        assert found.dtype == dtype
    assert torch.equal(after["norm.weight"], torch.ones(6))


@pytest.mark.parametrize("columns", [1, 3, BLOCK_ENTRIES // 2 + 1, BLOCK_ENTRIES + 1])
def test_every_row_is_changed_whatever_the_size_of_the_blocks(
    write: Write, tmp_path: Path, columns: int
) -> None:
    rows = 5 if columns > 3 else BLOCK_ENTRIES // columns + 3
    weight, delta = torch.zeros(rows, columns), random_piece(0, 1, (rows, columns))
    folder = write({"model.safetensors": {"model.a.weight": weight}})
    merge(folder, tmp_path / "out", {"model.a": delta})
    expected = torch.from_numpy(dense(delta)).float()
    assert torch.equal(weights_of(tmp_path / "out")["model.a.weight"], expected)


def test_shards_stay_apart_with_their_own_metadata(write: Write, tmp_path: Path) -> None:
    named = tensors()
    files = {
        "one.safetensors": {f"{Q}.weight": named.pop(f"{Q}.weight")},
        "two.safetensors": named,
    }
    folder = write(files, metadata={"format": "pt", "made": "by hand"})
    assert merge(folder, tmp_path / "out", UPDATES) == ["config.json", *sorted([*files, INDEX])]
    for name, inside in files.items():
        with safe_open(tmp_path / "out" / name, "pt") as shard:
            assert set(shard.keys()) == set(inside)
            assert shard.metadata() == {"format": "pt", "made": "by hand"}
    assert (tmp_path / "out" / INDEX).read_text() == (folder / INDEX).read_text()


def test_a_file_without_metadata_is_marked_as_transformers_wants_it(
    write: Write, tmp_path: Path
) -> None:
    merge(write({"model.safetensors": tensors()}), tmp_path / "out", UPDATES)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as shard:
        assert shard.metadata() == {"format": "pt"}


def test_backbones_saved_without_their_prefix_are_found(write: Write, tmp_path: Path) -> None:
    merge(write({"model.safetensors": tensors(prefix="")}), tmp_path / "out", UPDATES)
    after = weights_of(tmp_path / "out")
    assert set(after) == {"layers.0.q_proj.weight", "layers.0.down_proj.weight", "norm.weight"}
    assert not torch.equal(after["layers.0.q_proj.weight"], tensors()[f"{Q}.weight"])


def test_only_what_goes_with_the_weights_is_copied(write: Write, tmp_path: Path) -> None:
    folder = write({"model.safetensors": tensors()})
    copied = ["LICENSE.txt", "NOTICE", "USE_POLICY.md", "merges.txt", "tokenizer.model"]
    for name in [*copied, "README.md", "pytorch_model.bin", "model.gguf", "modeling_own.py"]:
        (folder / name).write_text(name)
    (folder / "onnx").mkdir()
    (folder / "onnx/config.json").write_text("{}")
    (folder / "folder.json").mkdir()
    (folder / "chat_template.jinja").symlink_to(folder / "NOTICE")
    files = merge(folder, tmp_path / "out", UPDATES)
    assert files == sorted([*copied, "chat_template.jinja", "config.json", "model.safetensors"])
    assert not (tmp_path / "out/chat_template.jinja").is_symlink()


@pytest.mark.parametrize(
    ("config", "left_out", "said"),
    [
        ("{}", f"{Q}.weight", f"{Q} is not in"),
        ('{"tie_word_embeddings": false}', f"{Q}.weight", f"{Q} is not in"),
        ('{"tie_word_embeddings": true}', f"{Q}.weight", "tied to the embeddings"),
    ],
)
def test_a_module_that_is_not_there_is_named(
    write: Write, config: str, left_out: str, said: str
) -> None:
    inside = {name: tensor for name, tensor in tensors().items() if name != left_out}
    checkpoint = open_checkpoint(write({"model.safetensors": inside}, config))
    with pytest.raises(InputError) as caught:
        checkpoint.locate(SHAPES)
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(6, 8), "(6, 8)"),
        (torch.zeros(48), "(48,)"),
        (torch.zeros(8, 6, dtype=torch.int8), "I8"),
        (torch.zeros(8, 6, dtype=torch.uint8), "U8"),
        (torch.zeros(8, 6, dtype=torch.float8_e4m3fn), "F8_E4M3"),
        (torch.zeros(8, 6, dtype=torch.bool), "BOOL"),
    ],
)
def test_weights_that_no_update_can_be_added_to_are_named(
    write: Write, tmp_path: Path, tensor: Tensor, said: str
) -> None:
    folder = write({"model.safetensors": tensors() | {f"{Q}.weight": tensor}})
    with pytest.raises(InputError) as caught:
        merge(folder, tmp_path / "out", UPDATES)
    assert (Q in caught.value.message, said in caught.value.message) == (True, True)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../base/one.safetensors", "/etc/hostname", "..", "", "sub/one.safetensors", "gone"]
)
def test_no_path_in_an_index_leads_out_of_the_folder(write: Write, name: str) -> None:
    folder = write({"one.safetensors": tensors()})
    (folder / "sub").mkdir()
    (folder / "sub/one.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    (folder / INDEX).write_text(f'{{"weight_map": {{"{Q}.weight": "{name}"}}}}')
    with pytest.raises(InputError) as caught:
        open_checkpoint(folder)
    assert caught.value.message == f"{folder} has no {name}"
