"""Rows of different lengths side by side in one rectangle, with next to no padding.

A line of the rectangle holds several rows, one after the other, and a row may branch: a question
with the answers to choose from is run once, not once an answer. The attention mask lets a token see
the tokens that all rows begin with, and of its own row what it goes on from; positions count anew
in every row. So each token gets what it would get in a pass of its own, up to the order of
floating-point sums.

Not every model heeds such a mask and such positions: some reckon with how far apart tokens stand in
the line. Whether one does is tried out once; where it does not, each row has a line of its own.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.prefix import repeated, run_prefix

LINE = 64
"""Tokens that a line holds at least, about. Attention looks at every pair of tokens in a line, so
longer ones cost more there; shorter ones leave more to pad."""
_TRUNK, _PADDING = -1, -1
_takes_packed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class Branching:
    """A row: tokens, and ways to go on from them that do not see each other.

    Args:
        trunk: at least one token.
        branches: any number of them, which may be empty.
    """

    trunk: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...] = ()

    @property
    def length(self) -> int:
        """All its tokens."""
        return len(self.trunk) + sum(map(len, self.branches))

    @property
    def depth(self) -> int:
        """The tokens of its longest branch, trunk included."""
        return len(self.trunk) + max(map(len, self.branches), default=0)

    def branch_starts(self) -> list[int]:
        """Where each branch begins, counted from the first token of the trunk."""
        return list(accumulate(map(len, self.branches), initial=len(self.trunk)))[:-1]


@dataclass(frozen=True)
class Packed:
    """Rows in a rectangle, without the tokens that all of them begin with.

    Args:
        tokens: (lines, length) int64.
        positions: (lines, length) int64, counted from the shared beginning on.
        mask: (lines, 1, length, shared + length) in the model's dtype, added to the scores of
            attention: 0 where a token is seen, and the least number where it is not. Of a model
            that takes none of these: (lines, shared + length) int64, 0 for padding.
        starts: where each row begins in the flattened rectangle, in the order of the rows; its
            trunk stands there, and its branches behind it.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    starts: list[int]


def pack(base: BaseModel, rows: Sequence[Branching], shared: int) -> Packed:
    """Puts rows into as many lines of about the same length as they fill; or each into one of its
    own, where the model does not take packed ones.

    Args:
        base: the model to run them.
        rows: at least one, without their shared beginning; with no more than one branch each where
            the model does not take packed ones.
        shared: how many tokens that has.

    Raises:
        InputError: a row is longer than the model can see at once.
    """
    base.check_length(shared + max(row.depth for row in rows))
    if takes_packed(base):
        return _laid_out(base, rows, shared, _lines([row.length for row in rows]))
    assert all(len(row.branches) <= 1 for row in rows)
    alone = _laid_out(base, rows, shared, [[index] for index in range(len(rows))])
    lengths = torch.tensor([shared + row.length for row in rows])
    seen = torch.arange(shared + alone.tokens.shape[1]) < lengths[:, None]
    return replace(alone, mask=seen.long().to(base.compute.device))


def _laid_out(
    base: BaseModel, rows: Sequence[Branching], shared: int, lines: Sequence[Sequence[int]]
) -> Packed:
    lengths = [row.length for row in rows]
    length = _longest(lengths, lines)
    filled = torch.empty(4, len(lines), length, dtype=torch.int64)
    filled[:] = torch.tensor([base.tokenizer.pad_token_id, 0, _PADDING, _TRUNK])[:, None, None]
    starts = [0] * len(rows)
    for number, line in enumerate(lines):
        at = 0
        for index in line:
            fields = _fields(rows[index], index, shared)
            filled[:, number, at : at + lengths[index]] = torch.tensor(fields)
            starts[index] = number * length + at
            at += lengths[index]
    tokens, positions, owner, branch = filled.to(base.compute.device)
    return Packed(tokens, positions, _mask(owner, branch, shared, base.dtype), starts)


@torch.no_grad()
def takes_packed(base: BaseModel) -> bool:
    """Whether the model computes for a row in a line with others what it computes for it alone.

    Raises:
        InputError: it keeps more of a text than keys and values.
    """
    if base.model not in _takes_packed:
        _takes_packed[base.model] = _try_out(base)
    return _takes_packed[base.model]


def _try_out(base: BaseModel) -> bool:
    """Compares a short row far from its beginning, after a long one, with the same row alone."""
    # Ordinary tokens: what special ones stand for may hang on the last digit.
    first = int(base.model.get_input_embeddings().num_embeddings) // 2
    shared, own = [first + at for at in (1, 2, 3, 4)], [first + at for at in (5, 3, 6, 2)]
    rows = [Branching((first,) * LINE), Branching(tuple(own[:2]), ((first,), tuple(own[2:])))]
    device = base.compute.device
    cache = run_prefix(base, torch.tensor(shared, device=device))
    alone = base.model.base_model(torch.tensor([shared + own], device=device), use_cache=False)
    expected = alone.last_hidden_state[0, -2:].float()
    packed = _laid_out(base, rows, len(shared), [[0, 1]])
    try:
        found = run_packed(base, packed, cache)[-2:].float()
    except (ValueError, RuntimeError, TypeError, IndexError):  # it wants another form of mask
        return False
    accepted = 0.01 if base.dtype in (torch.float32, torch.float64) else 0.1
    return bool((found - expected).norm() <= accepted * expected.norm())


def _lines(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of rows, line by line: of lines up to twice as long as they have to be, those that
    leave the least to pad, and of such the shortest."""
    fewest = sum(lengths) / max(LINE, *lengths)
    counts = range(math.ceil(fewest / 2), min(len(lengths), math.ceil(fewest)) + 1)
    options = [_fill(lengths, count) for count in reversed(counts)]
    return min(options, key=lambda lines: len(lines) * _longest(lengths, lines))


def _fill(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Rows in so many lines of about the same length: the longest row first, each into the line
    that is shortest then."""
    lines: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length, number = filled[0]
        lines[number].append(index)
        heapq.heapreplace(filled, (length + lengths[index], number))
    return lines


def _longest(lengths: Sequence[int], lines: Sequence[Sequence[int]]) -> int:
    return max(sum(lengths[index] for index in line) for line in lines)


def _fields(row: Branching, index: int, shared: int) -> list[list[int]]:
    """Its tokens, and for each of them the position, the row and the branch it belongs to."""
    tokens, branch = list(row.trunk), [_TRUNK] * len(row.trunk)
    positions = list(range(shared, shared + len(row.trunk)))
    for number, ids in enumerate(row.branches):
        tokens += ids
        branch += [number] * len(ids)
        positions += range(shared + len(row.trunk), shared + len(row.trunk) + len(ids))
    return [tokens, positions, [index] * len(tokens), branch]


def _mask(owner: Tensor, branch: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """Args: owner and branch (lines, length), of each token. Padding is a row like any other."""
    same_row = owner[:, :, None] == owner[:, None, :]
    on_the_way = (branch[:, None, :] == _TRUNK) | (branch[:, :, None] == branch[:, None, :])
    seen = functional.pad((same_row & on_the_way).tril(), (shared, 0), value=True)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def run_packed(base: BaseModel, packed: Packed, prefix_cache: Any) -> Tensor:
    """The last hidden states, (lines * length, width).

    Args:
        base: the model, with its adapter on.
        packed: the rows.
        prefix_cache: keys and values of the shared beginning, as `run_prefix` gives them.
    """
    cache = repeated(prefix_cache, packed.tokens.shape[0])
    # Lines of one row count up by themselves, and models that need them may know no other way.
    positions = {"position_ids": packed.positions} if packed.mask.dim() == 4 else {}
    hidden: Tensor = base.model.base_model(
        packed.tokens,
        attention_mask=packed.mask,
        past_key_values=cache,
        use_cache=cache is not None,
        **positions,
    ).last_hidden_state
    return hidden.flatten(end_dim=1)
