"""A strict reader of safetensors headers, for files that strangers wrote.

A file is an 8-byte little-endian length, that many bytes of JSON, and the tensors' bytes. The
header alone settles the shapes of an adapter, so it is checked before any tensor is read.
Everything is bounded: nothing is allocated on the header's word.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recycle_cli.lora.config import AdapterProblem

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 2_000_000
MAX_TENSORS = 20_000
MAX_DIMENSION = 1 << 20
MAX_DIMENSIONS = 8
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of one tensor.

    Args:
        dtype: "F32", "F16" or "BF16".
        shape: each dimension in [1, 2^20].
        start: its first byte, counted from the end of the header.
        end: one past its last byte; end - start is the size of the shape in the dtype.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, in the order of their bytes. Reads the header only.

    Raises:
        AdapterProblem: `truncated`, `header_too_large`, `bad_header` or `dtype`.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        length = header_length(file.read(LENGTH_BYTES))
        header = file.read(length)
    if len(header) < length:
        raise AdapterProblem(
            "truncated", f"the header should be {length} bytes, the file ends after {len(header)}"
        )
    return parse_header(header, size - LENGTH_BYTES - length)


def header_length(prefix: bytes) -> int:
    """The length of the header, in [2, 2 000 000] bytes, from the file's first eight bytes.

    Raises:
        AdapterProblem: `truncated`, `header_too_large` or `bad_header`.
    """
    if len(prefix) < LENGTH_BYTES:
        raise AdapterProblem("truncated", f"the weights file holds only {len(prefix)} bytes")
    (length,) = struct.unpack("<Q", prefix[:LENGTH_BYTES])
    if length > MAX_HEADER_BYTES:
        raise AdapterProblem(
            "header_too_large", f"the header claims {length} bytes, more than {MAX_HEADER_BYTES}"
        )
    if length < len("{}"):
        raise AdapterProblem("bad_header", f"the header claims {length} bytes")
    return int(length)


def parse_header(header: bytes, data_size: int) -> dict[str, TensorInfo]:
    """The tensors that a header describes, in the order of their bytes.

    Args:
        header: the JSON, without the length before it.
        data_size: the number of bytes that follow the header; the tensors must fill them without
            gaps and without overlaps.

    Raises:
        AdapterProblem: `truncated`, `header_too_large`, `bad_header` or `dtype`.
    """
    fields = _parse_json(header)
    _check_metadata(fields.pop(METADATA, {}))
    if len(fields) > MAX_TENSORS:
        raise AdapterProblem(
            "header_too_large", f"the header lists {len(fields)} tensors, more than {MAX_TENSORS}"
        )
    tensors = {key: _tensor(key, value) for key, value in fields.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].start))
    _check_layout(ordered, data_size)
    return ordered


def _parse_json(header: bytes) -> dict[str, Any]:
    # The format asks for "{" as the first byte; json.loads alone would let spaces pass.
    if not header.startswith(b"{"):
        raise AdapterProblem("bad_header", "the header is no JSON object")
    try:
        fields = json.loads(header.decode("utf-8"), object_pairs_hook=_object_without_repeats)
    except (ValueError, RecursionError) as error:
        raise AdapterProblem("bad_header", f"the header is no valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterProblem("bad_header", "the header is no JSON object")
    return fields


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A repeated key would mean one tensor to this reader and another to the next one."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return fields


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterProblem("bad_header", f"{METADATA} is no object of strings")


def _tensor(key: str, value: Any) -> TensorInfo:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise AdapterProblem("bad_header", f"tensor {key[:100]!r} lacks dtype, shape or offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        shown = repr(dtype[:20]) if isinstance(dtype, str) else "no text"
        raise AdapterProblem(
            "dtype", f"tensor {key[:100]!r} has dtype {shown}, not one of {', '.join(ITEM_BYTES)}"
        )
    if not _is_list_of_ints(shape, 1, MAX_DIMENSION) or len(shape) > MAX_DIMENSIONS:
        raise AdapterProblem("bad_header", f"tensor {key[:100]!r} has an impossible shape")
    if not _is_list_of_ints(offsets, 0, 1 << 62) or len(offsets) != 2:
        raise AdapterProblem("bad_header", f"tensor {key[:100]!r} has impossible offsets")
    start, end = offsets
    if end - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise AdapterProblem(
            "bad_header", f"tensor {key[:100]!r} spans {end - start} bytes, its shape does not"
        )
    return TensorInfo(dtype, tuple(shape), start, end)


def _is_list_of_ints(value: Any, low: int, high: int) -> bool:
    # type() rather than isinstance(): true and false are ints in Python.
    return isinstance(value, list) and all(type(n) is int and low <= n <= high for n in value)


def _check_layout(ordered: dict[str, TensorInfo], data_size: int) -> None:
    position = 0
    for key, tensor in ordered.items():
        if tensor.start != position:
            raise AdapterProblem(
                "bad_header",
                f"tensor {key[:100]!r} starts at byte {tensor.start}, not at {position}",
            )
        position = tensor.end
    if data_size < position:
        raise AdapterProblem(
            "truncated", f"the tensors take {position} bytes, the file holds {max(data_size, 0)}"
        )
    if data_size > position:
        raise AdapterProblem(
            "bad_header", f"{data_size - position} bytes follow the last tensor's end"
        )
