"""Forward passes that compute no more than is looked at."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, shared_length
from recycle_cli.engine.prefix import repeated, run_prefix

# Lengths are rounded up to a multiple of this. CPU kernels are compiled for each shape they meet,
# which takes longer than the few padded tokens cost.
LENGTH_STEP = 8


@dataclass(frozen=True)
class Batch:
    """Examples side by side, padded on the right, their shared beginning apart.

    Args:
        prefix: (shared,) int64, what all rows begin with.
        tokens: (rows, length) int64, the rest of prompt and answer.
        attention: (rows, shared + length) int64, 1 for a token and 0 for padding.
        predicts: (rows, length) bool, true where the next token belongs to an answer.
        targets: (answer tokens,) int64, the answer tokens in the order of `predicts`.
    """

    prefix: Tensor
    tokens: Tensor
    attention: Tensor
    predicts: Tensor
    targets: Tensor


def collate(base: BaseModel, examples: Sequence[Example], shared: int | None = None) -> Batch:
    """Pads examples to the longest of them.

    Args:
        base: the model they are encoded for.
        examples: at least one.
        shared: how many tokens all prompts begin with, where that is known; otherwise it is found.

    Raises:
        InputError: a row is longer than the model can see at once.
    """
    if shared is None:
        shared = shared_length([example.prompt for example in examples])
    rows = [(example.prompt + example.answer)[shared:] for example in examples]
    length = -(-max(map(len, rows)) // LENGTH_STEP) * LENGTH_STEP
    base.check_length(shared + length)
    tokens = torch.full((len(rows), length), base.tokenizer.pad_token_id, dtype=torch.int64)
    attention = torch.zeros(len(rows), shared + length, dtype=torch.int64)
    predicts = torch.zeros_like(tokens, dtype=torch.bool)
    for index, (row, example) in enumerate(zip(rows, examples, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row)
        attention[index, : shared + len(row)] = 1
        predicts[index, len(example.prompt) - shared - 1 : len(row) - 1] = True
    prefix = torch.tensor(examples[0].prompt[:shared], dtype=torch.int64)
    targets = torch.tensor([token for example in examples for token in example.answer])
    parts = (prefix, tokens, attention, predicts, targets)
    return Batch(*(part.to(base.compute.device) for part in parts))


def answer_logits(base: BaseModel, batch: Batch, prefix: Any = None) -> Tensor:
    """Logits (answer tokens, vocabulary) at the positions that predict an answer token.

    The hidden states are gathered before the head is applied. Slicing the logits instead would
    make a frozen head copy its weight once a row, which triples the cost of a pass.

    Args:
        base: the model.
        batch: the rows.
        prefix: keys and values of their shared beginning, where those are at hand.
    """
    cache = repeated(prefix or run_prefix(base, batch.prefix), batch.tokens.shape[0])
    hidden = base.model.base_model(
        batch.tokens,
        attention_mask=batch.attention,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return base.head(hidden[batch.predicts])


def answer_loss(base: BaseModel, batch: Batch, prefix: Any = None) -> Tensor:
    """Mean cross-entropy over the answer tokens of a batch, in nats, computed in float32."""
    return functional.cross_entropy(answer_logits(base, batch, prefix).float(), batch.targets)


@torch.no_grad()
def mean_loss(
    base: BaseModel,
    batches: Sequence[Batch],
    begin: Callable[[object], object] = lambda _rows: None,
) -> float:
    """Mean cross-entropy over all answer tokens of several batches, in nats.

    What batches begin with is run once where it is the same in all of them.

    Args:
        base: the model.
        batches: at least one.
        begin: told before each pass which rows it is over.
    """
    first = batches[0].prefix
    same = all(torch.equal(batch.prefix, first) for batch in batches)
    begin("prefix")
    prefix = run_prefix(base, first) if same else None
    total, tokens = 0.0, 0
    for number, batch in enumerate(batches):
        begin(number)
        count = batch.targets.numel()
        total += float(answer_loss(base, batch, prefix)) * count
        tokens += count
    return total / tokens


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in groups of at most `size`, like lengths together, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]
