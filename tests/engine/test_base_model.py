import json
from pathlib import Path

import pytest
import torch
from support.pico import make_tokenizer, write_model

from recycle_cli.engine.base_model import BaseModel, linear_shapes, load_base_model
from recycle_cli.errors import InputError
from recycle_cli.settings import Settings

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "pico")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "home", offline=True, dtype="float32", device="cpu")


def test_shapes_are_known_without_weights(
    pico_base: BaseModel, folder: Path, settings: Settings
) -> None:
    (folder / WEIGHTS).unlink()
    shapes = linear_shapes(str(folder), settings)
    weights = {
        key.removesuffix(".weight"): tuple(tensor.shape)
        for key, tensor in pico_base.model.state_dict().items()
        if tensor.dim() == 2 and "embed_tokens" not in key
    }
    assert shapes == pico_base.shapes == weights
    assert len(shapes) == 2 * 7 + 1
    # Its own folder, and nothing of a home, is all it takes.
    assert not settings.home.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_is_frozen_and_quiet(
    folder: Path, tmp_path: Path, dtype: str, capfd: pytest.CaptureFixture[str]
) -> None:
    base = load_base_model(str(folder), Settings(tmp_path, True, dtype, "cpu"))
    assert (base.id, base.compute.dtype) == (str(folder), getattr(torch, dtype))
    assert not base.model.training
    for parameter in base.model.parameters():
        assert (parameter.requires_grad, parameter.dtype) == (False, base.compute.dtype)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_a_tokenizer_without_padding_gets_one(folder: Path, settings: Settings) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    base = load_base_model(str(folder), settings)
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 2


@pytest.mark.parametrize("read", [load_base_model, linear_shapes])
@pytest.mark.parametrize("name", ["no/such-model", "no-such-folder/at/all", "x y", ""])
def test_an_unknown_model_is_refused(read, name: str, settings: Settings) -> None:
    with pytest.raises(InputError) as caught:
        read(name, settings)
    assert caught.value.message.startswith(f"the base model {name!r} cannot be loaded: ")
    assert "\n" not in caught.value.message
    assert "smollm2" in caught.value.hint


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"),
        ("config.json", json.dumps({"model_type": "no_such_type"})),
        ("config.json", json.dumps({"model_type": "vit"})),
        (WEIGHTS, None),
        (WEIGHTS, ""),
        (WEIGHTS, "x" * 5000),
    ],
)
def test_a_damaged_folder_is_refused(
    folder: Path, settings: Settings, file: str, content: str | None
) -> None:
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(InputError, match="cannot be loaded: "):
        load_base_model(str(folder), settings)
