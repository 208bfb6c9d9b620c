import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recycle_cli.store.details import ModuleFacts, pack_modules, unpack_modules

FLOAT32 = st.floats(width=32, allow_nan=False)
FACTS = st.builds(
    ModuleFacts,
    st.integers(0, 2**31 - 1),
    st.floats(0, allow_nan=False),
    st.lists(FLOAT32, min_size=8, max_size=8),
)


@given(st.dictionaries(st.text(min_size=1), FACTS, max_size=5))
def test_what_is_packed_is_unpacked(modules: dict[str, ModuleFacts]) -> None:
    packed = pack_modules(modules)
    assert unpack_modules(packed.paths, packed.ranks, packed.norms, packed.projections) == modules


def test_the_bytes_are_little_endian_in_the_order_of_the_paths() -> None:
    packed = pack_modules({"b": ModuleFacts(2, 0.5, [3.0]), "a": ModuleFacts(1, 0.25, [-1.0])})
    assert packed.paths == '["a", "b"]'
    assert packed.ranks == struct.pack("<2i", 1, 2)
    assert packed.norms == struct.pack("<2d", 0.25, 0.5)
    assert packed.projections == struct.pack("<2f", -1.0, 3.0)


def test_projections_of_several_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="several lengths"):
        pack_modules({"a": ModuleFacts(1, 1.0, [1.0]), "b": ModuleFacts(1, 1.0, [])})
