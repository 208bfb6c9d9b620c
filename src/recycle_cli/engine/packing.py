"""Rows of different lengths side by side in one rectangle, with next to no padding.

A line of the rectangle holds several rows, one after the other, and a row may branch: a question
with the answers to choose from is run once, not once an answer. The attention mask lets a token see
the tokens that all rows begin with, and of its own row what it goes on from; positions count anew
in every row. So each token gets what it would get in a pass of its own, up to the order of
floating-point sums.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.prefix import repeated

LINE = 64
"""Tokens that a line holds at least, about. Attention looks at every pair of tokens in a line, so
longer ones cost more there; shorter ones leave more to pad."""
_TRUNK, _PADDING = -1, -1


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
            attention: 0 where a token is seen, and the least number where it is not.
        starts: where each row begins in the flattened rectangle, in the order of the rows; its
            trunk stands there, and its branches behind it.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    starts: list[int]


def pack(base: BaseModel, rows: Sequence[Branching], shared: int) -> Packed:
    """Puts rows into as many lines of about the same length as they fill.

    Args:
        base: the model to run them.
        rows: at least one, without their shared beginning.
        shared: how many tokens that has.

    Raises:
        InputError: a row is longer than the model can see at once.
    """
    base.check_length(shared + max(row.depth for row in rows))
    lengths = [row.length for row in rows]
    lines = _lines(lengths)
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
    hidden: Tensor = base.model.base_model(
        packed.tokens,
        attention_mask=packed.mask,
        position_ids=packed.positions,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return hidden.flatten(end_dim=1)
