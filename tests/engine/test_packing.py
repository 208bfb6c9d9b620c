"""Rows packed into a rectangle: each in one place, and each token sees what it goes on from."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.plain import CLOSED_ROWS

from recycle_cli.engine import packing
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.encoding import encode_examples
from recycle_cli.engine.packing import Branching, pack, takes_packed
from recycle_cli.errors import InputError
from recycle_cli.settings import Settings

TOKENS = st.lists(st.integers(3, 60), max_size=9).map(tuple)
ROWS = st.lists(
    st.builds(
        Branching,
        st.lists(st.integers(3, 60), min_size=1, max_size=40).map(tuple),
        st.lists(TOKENS, max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=12,
)


def paths(row: Branching, start: int) -> list[tuple[list[int], list[int]]]:
    """The places and tokens of the trunk with each branch, as they would be run alone."""
    trunk = list(range(start, start + len(row.trunk)))
    found = [(trunk, list(row.trunk))]
    for begin, branch in zip(row.branch_starts(), row.branches, strict=True):
        places = range(start + begin, start + begin + len(branch))
        found.append(([*trunk, *places], [*row.trunk, *branch]))
    return found


@given(ROWS, st.integers(0, 5))
def test_a_token_sees_the_beginning_and_what_it_goes_on_from(
    pico_base: BaseModel, rows: list[Branching], shared: int
) -> None:
    packed = pack(pico_base, rows, shared)
    lines, length = packed.tokens.shape
    seen = packed.mask[:, 0] == 0
    assert seen.shape == (lines, length, shared + length)
    assert seen[:, :, :shared].all()
    taken: set[int] = set()
    for row, start in zip(rows, packed.starts, strict=True):
        own = set(range(start, start + row.length))
        assert not own & taken
        taken |= own
        line = start // length
        for places, tokens in paths(row, start):
            assert packed.tokens.flatten()[places].tolist() == tokens
            positions = packed.positions.flatten()[places].tolist()
            assert positions == list(range(shared, shared + len(tokens)))
            last = places[-1] - line * length
            expected = [place - line * length for place in places]
            assert seen[line, last, shared:].nonzero().flatten().tolist() == expected
    # Padding sees something too: a softmax over nothing is no number.
    assert seen.any(dim=-1).all()


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_every_row_is_in_one_line_and_lines_are_not_longer_than_they_have_to_be(
    lengths: list[int],
) -> None:
    lines = packing._lines(lengths)
    assert sorted(index for line in lines for index in line) == list(range(len(lengths)))
    longest = max(sum(lengths[index] for index in line) for line in lines)
    assert longest <= 3 * max(packing.LINE, *lengths)


def test_rows_of_a_task_leave_next_to_nothing_to_pad() -> None:
    lengths = [27, 20, 22, 25, 28, 20, 23, 24, 18, 21, 21, 29, 20, 20, 22, 20, 19, 19, 26, 27]
    lines = packing._lines(lengths)
    longest = max(sum(lengths[index] for index in line) for line in lines)
    assert len(lines) * longest <= 1.05 * sum(lengths)


def test_a_row_that_is_too_long_is_refused(pico_base: BaseModel) -> None:
    limit = pico_base.model.config.max_position_embeddings
    pack(pico_base, [Branching((5,) * (limit - 3), ((6,), (7, 7)))], 1)
    with pytest.raises(InputError, match=f"a row has {limit + 1} tokens"):
        pack(pico_base, [Branching((5,) * (limit - 3), ((6,), (7, 7, 7)))], 1)


def test_it_is_on_the_device_and_in_the_dtype_of_the_model(pico_base: BaseModel) -> None:
    examples = encode_examples(pico_base, CLOSED_ROWS)
    packed = pack(pico_base, [Branching(example.prompt) for example in examples], 0)
    assert packed.mask.dtype == pico_base.dtype
    assert packed.tokens.dtype == torch.int64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_llama_takes_packed_rows(pico_folder: Path, tmp_path: Path, dtype: str) -> None:
    base = load_base_model(str(pico_folder), Settings(tmp_path, True, dtype, "cpu"))
    assert takes_packed(base)
