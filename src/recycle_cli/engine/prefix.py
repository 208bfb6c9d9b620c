"""The tokens that all prompts begin with, run once for all of them.

Rows of a task share the chat template's opening and usually an instruction: often two thirds of
their tokens. Attention is causal, so the keys and values of a shared beginning are the same in
every row; they are computed for one row and repeated, with gradients where those are on. That is
exact, up to the order of floating-point sums. (Dropout, where it is on, draws one mask for the
shared part instead of one a row.)
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.errors import InputError


def run_prefix(base: BaseModel, prefix: Tensor) -> Any:
    """Keys and values of a shared beginning, for one row; None where it is empty.

    Args:
        base: the model, with its adapter on.
        prefix: (length,) int64.

    Raises:
        InputError: the model keeps more of a text than keys and values.
    """
    if prefix.numel() == 0:
        return None
    out = base.model.base_model(prefix[None], use_cache=True)
    cache = getattr(out, "past_key_values", None)
    if cache is None or not all(map(_is_attention, cache.layers)):
        raise InputError(
            f"the base model {base.id!r} has layers that are no attention, such as recurrent ones",
            "use a model that keeps nothing of a text but keys and values",
        )
    return cache


def _is_attention(layer: Any) -> bool:
    """Whether keys and values are all that is kept in a layer of a cache."""
    return hasattr(layer, "keys") and not hasattr(layer, "conv_states")


def repeated(prefix_cache: Any, rows: int) -> Any:
    """A new cache that holds the prefix for each of `rows` rows; None stays None."""
    if prefix_cache is None:
        return None
    return _cache(
        [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in _pairs(prefix_cache)]
    )


@contextlib.contextmanager
def gradients_collected(prefix_cache: Any) -> Iterator[Any]:
    """A cache to use in several passes, whose gradients go back through the prefix in the end.

    So the prefix is run once, forward and backward, however many passes there are.

    Args:
        prefix_cache: as `run_prefix` gives it, with its graph; None stays None.
    """
    if prefix_cache is None:
        yield None
        return
    pairs = _pairs(prefix_cache)
    leaves = [(_leaf(k), _leaf(v)) for k, v in pairs]
    yield _cache(leaves)
    ends = [
        (made, leaf.grad)
        for pair, of_pair in zip(pairs, leaves, strict=True)
        for made, leaf in zip(pair, of_pair, strict=True)
        if made.requires_grad
    ]
    if ends:
        torch.autograd.backward([made for made, _ in ends], [gradient for _, gradient in ends])


def _leaf(made: Tensor) -> Tensor:
    return made.detach().requires_grad_(made.requires_grad)


def _pairs(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _cache(pairs: list[tuple[Tensor, Tensor]]) -> Any:
    from transformers import DynamicCache

    return DynamicCache(pairs)


def pad_left(
    base: BaseModel, rows: Sequence[Sequence[int]], prefix_length: int
) -> tuple[Tensor, Tensor]:
    """Token rows that end together, without their shared beginning.

    Returns:
        tokens (rows, length) and attention (rows, prefix_length + length), which is 0 only for
        the padding between a row's beginning and its own tokens.

    Raises:
        InputError: a row is longer than the model can see at once.
    """
    own = [row[prefix_length:] for row in rows]
    length = max(map(len, own))
    base.check_length(prefix_length + length)
    tokens = torch.full((len(own), length), base.tokenizer.pad_token_id, dtype=torch.int64)
    attention = torch.ones(len(own), prefix_length + length, dtype=torch.int64)
    for index, row in enumerate(own):
        tokens[index, length - len(row) :] = torch.tensor(row)
        attention[index, prefix_length : prefix_length + length - len(row)] = 0
    return tokens.to(base.compute.device), attention.to(base.compute.device)
