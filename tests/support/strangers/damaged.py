"""Strangers whose weights file keeps them out: bad tensors, bad headers, bad layouts."""

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import save

from support.strangers.draft import WEIGHTS, Draft, Tensors
from support.strangers.kinds import Change, Kind, adapts, bends, has, kind

# --- tensors --------------------------------------------------------------------------------


def _first(tensors: Tensors, factor: str) -> str:
    """The first key of an A or of a B."""
    return min(key for key in tensors if f".lora_{factor}." in key)


def _with(key: str, shape: tuple[int, ...] = (4, 4)) -> Change:
    """Adds a tensor of this name."""
    return bends(lambda tensors: tensors | {key: torch.ones(shape)})


def _without(factor: str) -> Change:
    """Leaves one factor out."""

    def bend(tensors: Tensors) -> Tensors:
        gone = _first(tensors, factor)
        return {key: tensor for key, tensor in tensors.items() if key != gone}

    return bends(bend)


def _replaced(factor: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """Changes one factor."""

    def bend(tensors: Tensors) -> Tensors:
        key = _first(tensors, factor)
        return tensors | {key: how(tensors[key])}

    return bends(bend)


def _scaled(factor: str, by: float) -> Change:
    """Multiplies every A or every B."""

    def bend(tensors: Tensors) -> Tensors:
        return {
            key: tensor * by if f".lora_{factor}." in key else tensor
            for key, tensor in tensors.items()
        }

    return bends(bend)


def _spoilt(value: float) -> Change:
    """Puts a value into one place of one factor."""

    def how(tensor: torch.Tensor) -> torch.Tensor:
        spoilt = tensor.clone()
        spoilt[-1, -1] = value
        return spoilt

    return _replaced("B", how)


def _renamed(old: str, new: str) -> Change:
    """Renames the keys."""
    return bends(lambda tensors: {key.replace(old, new): t for key, t in tensors.items()})


def _cast(dtype: torch.dtype) -> Change:
    """Casts every factor."""
    return bends(lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
EMBEDDING = "base_model.model.model.embed_tokens"

TENSORS = (
    kind(
        "a weight of the base",
        "foreign_key",
        _with("base_model.model.model.layers.0.mlp.up_proj.weight", (64, 32)),
    ),
    kind("a saved head", "foreign_key", _with("base_model.model.lm_head.weight")),
    kind("an adapted head", "base_layer", _with("base_model.model.lm_head.base_layer.weight")),
    kind("a trained bias", "foreign_key", _with("base_model.model.model.norm.bias", (32,))),
    kind("a magnitude", "foreign_key", _with(f"{Q0}.lora_magnitude_vector", (32,))),
    kind("a bias of a factor", "foreign_key", _with(f"{Q0}.lora_B.bias", (32,))),
    kind("an embedding's factors", "foreign_key", _with(f"{EMBEDDING}.lora_embedding_A")),
    kind("a key that is a path", "foreign_key", _with("../../etc/passwd")),
    kind("a key with control characters", "foreign_key", _with("\x1b[2J\x07")),
    kind("a key without end", "foreign_key", _with("a" * 100_000)),
    kind("keys with an adapter's name", "foreign_key", _renamed(".weight", ".default.weight")),
    kind("keys without a prefix", "foreign_key", _renamed("base_model.model.", "")),
    kind("keys of another trainer", "foreign_key", _renamed(".lora_A.weight", ".lora_a")),
    kind("B missing", "pair_incomplete", _without("B")),
    kind("A missing", "pair_incomplete", _without("A")),
    kind("no tensors", "no_tensors", bends(lambda tensors: {})),
    kind("A flat", "shape_mismatch", _replaced("A", lambda a: a.flatten())),
    kind("A of three dimensions", "shape_mismatch", _replaced("A", lambda a: a[None])),
    kind("A turned", "shape_mismatch", _replaced("A", lambda a: a.T.contiguous())),
    kind("A and B of unlike ranks", "shape_mismatch", _replaced("B", lambda b: b[:, :1].clone())),
    kind(
        "a module that is not linear",
        "no_such_module",
        adapts("q_proj"),
        _renamed("self_attn.q_proj", "input_layernorm"),
    ),
    kind(
        "a module that is a block",
        "no_such_module",
        adapts("up_proj"),
        _renamed("mlp.up_proj", "mlp"),
    ),
    kind("not a number", "non_finite", _spoilt(float("nan"))),
    kind("infinite", "non_finite", _spoilt(float("-inf"))),
    kind("not a number in half", "non_finite", _cast(torch.bfloat16), _spoilt(float("nan"))),
    kind("untrained", "no_effect", _scaled("B", 0.0)),
    kind("nothing in A", "no_effect", _scaled("A", 0.0)),
    kind("far too hot", "norm_out_of_range", _scaled("B", 1e6)),
    kind("hot beyond float32's squares", "norm_out_of_range", _scaled("B", 1e37)),
    kind("double precision", "dtype", _cast(torch.float64)),
    kind("eight-bit floats", "dtype", _cast(torch.float8_e4m3fn)),
    kind("eight-bit integers", "dtype", _cast(torch.int8)),
)


# --- headers and layouts --------------------------------------------------------------------

A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
Entry = dict[str, Any]


def _entry(start: int, end: int, shape: Any = (4, 32), dtype: Any = "F32") -> Entry:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def _file(header: Mapping[str, Any] | str | bytes, data: int, claim: int | None = None) -> Change:
    """A weights file with this header, so many bytes behind it, and any claim of its length."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    raw = header if isinstance(header, bytes) else header.encode()
    length = len(raw) if claim is None else claim
    return has(WEIGHTS, struct.pack("<Q", length) + raw + bytes(data))


def _resized(by: int) -> Change:
    """Good weights, with bytes missing from the end or put behind it."""

    def change(draft: Draft) -> None:
        content = save(draft.tensors(), draft.metadata)
        draft.files[WEIGHTS] = content + bytes(by) if by > 0 else content[:by]

    return change


GOOD = {A: _entry(0, 512), B: _entry(512, 1024, (32, 4))}
WITHIN_GOOD = json.dumps(GOOD)[1:]

LAYOUTS = (
    kind("an empty file", "truncated", has(WEIGHTS, b"")),
    kind("seven bytes", "truncated", has(WEIGHTS, bytes(7))),
    kind("a header cut short", "truncated", _file("{", 0, claim=1000)),
    kind("data cut short", "truncated", _resized(-100)),
    kind("a header of no bytes", "bad_header", _file("", 64)),
    kind("a header of a terabyte", "header_too_large", _file("{}", 0, claim=1 << 40)),
    kind("a header of 2 to the 64", "header_too_large", _file("{}", 0, claim=2**64 - 1)),
    kind("a header of two megabytes", "header_too_large", _file("{}", 0, claim=2_000_001)),
    kind(
        "tensors beyond number",
        "header_too_large",
        _file({str(n): _entry(4 * n, 4 * n + 4, (1,)) for n in range(20_001)}, 80_004),
    ),
    kind("a header of another kind", "bad_header", _file(b"\x80\x04K\x01.", 64)),
    kind("a header that is a list", "bad_header", _file("[1, 2, 3]", 0)),
    kind("a header that is a number", "bad_header", _file("12345678", 0)),
    kind("a header nested deeply", "bad_header", _file('{"a":' * 5000 + "1" + "}" * 5000, 0)),
    kind("a header that is not UTF-8", "bad_header", _file(b'{"\xff\xfe": 1}', 0)),
    kind("a header after spaces", "bad_header", _file("   " + json.dumps(GOOD), 1024)),
    kind("a key twice", "bad_header", _file(f'{{"{A}": {{}}, {WITHIN_GOOD}', 1024)),
    kind("metadata of numbers", "bad_header", _file({"__metadata__": {"a": 1}, **GOOD}, 1024)),
    kind("metadata a list", "bad_header", _file({"__metadata__": [], **GOOD}, 1024)),
    kind("a tensor that is null", "bad_header", _file({A: None}, 0)),
    kind("a tensor without a shape", "bad_header", _file({A: {"dtype": "F32"}}, 0)),
    kind("a dtype unheard of", "dtype", _file({A: _entry(0, 512, dtype="Q3")}, 512)),
    kind("a dtype that is a list", "dtype", _file({A: _entry(0, 512, dtype=["F32"])}, 512)),
    kind("a negative shape", "bad_header", _file({A: _entry(0, 512, (-4, -32))}, 512)),
    kind("a shape of 10 to the 30", "bad_header", _file({A: _entry(0, 512, (10**30, 32))}, 512)),
    kind("a shape of nothing", "bad_header", _file({A: _entry(0, 0, (0, 32))}, 0)),
    kind("a shape of fractions", "bad_header", _file({A: _entry(0, 512, (4.0, 32))}, 512)),
    kind("a shape of many dimensions", "bad_header", _file({A: _entry(0, 4, (1,) * 99)}, 4)),
    kind("a shape unlike its span", "bad_header", _file({A: _entry(0, 512, (5, 32))}, 512)),
    kind("offsets below zero", "bad_header", _file({A: _entry(-512, 0)}, 512)),
    kind("offsets backwards", "bad_header", _file({A: _entry(512, 0)}, 512)),
    kind("offsets of 10 to the 30", "bad_header", _file({A: _entry(10**30, 10**30 + 512)}, 0)),
    kind(
        "tensors that overlap",
        "bad_header",
        _file({A: _entry(0, 512), B: _entry(256, 768, (32, 4))}, 768),
    ),
    kind(
        "tensors that share bytes",
        "bad_header",
        _file({A: _entry(0, 512), B: _entry(0, 512, (32, 4))}, 512),
    ),
    kind(
        "a gap between tensors",
        "bad_header",
        _file({A: _entry(0, 512), B: _entry(1024, 1536, (32, 4))}, 1536),
    ),
    kind("a gap before the first", "bad_header", _file({A: _entry(512, 1024)}, 1024)),
    kind("bytes behind the last", "bad_header", _resized(100)),
)

DAMAGED: tuple[Kind, ...] = (*TENSORS, *LAYOUTS)
