import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from recycle_cli.lora.config import AdapterProblem
from recycle_cli.store.safetensors_header import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    header_length,
    parse_header,
    read_header,
)

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


def encode(fields: object) -> bytes:
    return json.dumps(fields).encode()


def outcome(header: bytes, data_size: int) -> str:
    """`read`, or the code of the problem; what else is raised goes through."""
    try:
        tensors = parse_header(header, data_size)
    except AdapterProblem as problem:
        return problem.code
    assert sum(info.end - info.start for info in tensors.values()) == data_size
    return "read"


def code_of(header: bytes, data_size: int = 24) -> str:
    with pytest.raises(AdapterProblem) as caught:
        parse_header(header, data_size)
    return caught.value.code


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda key: key != "__metadata__"),
        st.tuples(
            st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 5), min_size=1, max_size=3)
        ),
        max_size=6,
    ),
)
def test_what_the_library_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, spec: dict[str, tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("header") / "file.safetensors"
    tensors = {key: torch.zeros(shape, dtype=DTYPES[name]) for key, (name, shape) in spec.items()}
    save_file(tensors, path, metadata={"format": "pt"})

    header = read_header(path)

    assert {key: (info.dtype, list(info.shape)) for key, info in header.items()} == spec
    assert sum(info.end - info.start for info in header.values()) == sum(
        tensor.nbytes for tensor in tensors.values()
    )


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 100))
def test_random_bytes_raise_nothing_but_adapter_problem(data: bytes, size: int) -> None:
    possible = {"read", "bad_header", "header_too_large", "dtype", "truncated"}
    for header in (data, b"{" + data, b'{"a":' + data + b"}"):
        assert outcome(header, size) in possible


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]), json_values)
def test_mutated_fields_raise_nothing_but_adapter_problem(field: str, value: object) -> None:
    mutated = encode({"a": GOOD["a"] | {field: value}})
    assert outcome(mutated, 24) in {"read", "bad_header", "dtype", "truncated"}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_flipped_byte_never_reads_as_another_layout(data: st.DataObject) -> None:
    whole = save({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, metadata={"format": "pt"})
    length = header_length(whole)
    position = data.draw(st.integers(8, 8 + length - 1))
    mutated = bytearray(whole)
    mutated[position] = data.draw(st.integers(0, 255))
    outcome(bytes(mutated[8 : 8 + length]), len(whole) - 8 - length)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (b"[]", "bad_header"),
        (b" {}", "bad_header"),
        (b"{" + b'"a":[' * 5000, "bad_header"),
        (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad_header"),
        (b'{"a":' + b"9" * 5000 + b"}", "bad_header"),
        (b'{"a": %b, "a": %b}' % (encode(GOOD["a"]), encode(GOOD["a"])), "bad_header"),
        (b'{"__metadata__": {"a": 1}}', "bad_header"),
        (b'{"__metadata__": []}', "bad_header"),
        (b"\xff\xfe{}", "bad_header"),
        (b'{"\xff": 1}', "bad_header"),
        (encode({"a": GOOD["a"] | {"shape": [True, 6]}}), "bad_header"),
        (encode({"a": GOOD["a"] | {"shape": [0, 3], "data_offsets": [0, 0]}}), "bad_header"),
        (encode({"a": GOOD["a"] | {"shape": [-2, -3]}}), "bad_header"),
        (encode({"a": GOOD["a"] | {"shape": [1 << 21, 1]}}), "bad_header"),
        (encode({"a": GOOD["a"] | {"shape": [1] * 9}}), "bad_header"),
        (encode({"a": GOOD["a"] | {"data_offsets": [4, 28]}}), "bad_header"),
        (encode({"a": GOOD["a"] | {"data_offsets": [24, 0]}}), "bad_header"),
        (encode({"a": GOOD["a"] | {"data_offsets": [0, 23]}}), "bad_header"),
        (encode({"a": GOOD["a"], "b": GOOD["a"]}), "bad_header"),
        (encode({"a": GOOD["a"] | {"dtype": "F64", "data_offsets": [0, 48]}}), "dtype"),
        (encode({"a": GOOD["a"] | {"dtype": ["F32"]}}), "dtype"),
        (encode({str(n): None for n in range(MAX_TENSORS + 1)}), "header_too_large"),
    ],
)
def test_bad_headers_are_refused_by_name(header: bytes, code: str) -> None:
    assert code_of(header) == code


def test_the_tensors_must_fill_the_file() -> None:
    assert set(parse_header(encode(GOOD), 24)) == {"a"}
    assert code_of(encode(GOOD), 23) == "truncated"
    assert code_of(encode(GOOD), 25) == "bad_header"
    assert code_of(encode({}), 1) == "bad_header"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "truncated"),
        (b"\x05\x00", "truncated"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (struct.pack("<Q", 1) + b"{", "bad_header"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "header_too_large"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "header_too_large"),
    ],
)
def test_bad_lengths_are_refused_by_name(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(AdapterProblem) as caught:
        read_header(path)
    assert caught.value.code == code
