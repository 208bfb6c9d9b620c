"""What the engine is compared with: whole rows one at a time, without cache, prefix or padding,
and adapters as dense matrices added to the weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from recycle_cli.engine.adapted import Gate, concatenate
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.products import attached
from recycle_cli.evaluation.tasks import Row
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from support.low_rank import random_piece

# A long instruction before some prompts, other prompts that share but the template, answers with
# and without a common beginning, two to five of them, one of a single token.
CLOSED_ROWS = [
    Row("Which colour?", "red", ("red", "green", "blue")),
    Row("Read what follows. It is a long instruction, and longer. Then: a?", "yes", ("yes", "no")),
    Row(
        "Read what follows. It is a long instruction, and longer. b",
        "item 12",
        ("item 1", "item 12"),
    ),
    Row("a", "x", ("y", "x", "a whole sentence for an answer.", "xx", "zebra")),
    Row("Read what follows.", "été", ("été", "étage", "étang")),
    Row("Name a colour; it may be any colour at all, even none.", "q", ("q", "r")),
]
OPEN_ROWS = [Row(row.input, row.output) for row in CLOSED_ROWS]
Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))
DOWN, HEAD = "model.layers.1.mlp.down_proj", "lm_head"


def logits(model: Any, tokens: Sequence[int]) -> Tensor:
    """(tokens, vocabulary), of one row in one pass."""
    whole: Tensor = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return whole.float()


def log_likelihood(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Of the answer's tokens after the prompt's, in nats; with gradients where those are on."""
    whole = [*prompt, *answer]
    scores = logits(model, whole).log_softmax(-1)
    return torch.stack([scores[at - 1, whole[at]] for at in range(len(prompt), len(whole))]).sum()


def loss(model: Any, examples: Sequence[Example]) -> Tensor:
    """Mean negative log-likelihood of all answer tokens of the examples."""
    total = torch.stack([log_likelihood(model, e.prompt, e.answer) for e in examples]).sum()
    return -total / sum(len(example.answer) for example in examples)


def random_update(base: BaseModel, ranks: Mapping[str, int], seed: int) -> ModelUpdate:
    """An update of these modules, of a size that changes every logit."""
    return {
        path: random_piece(seed + at, rank, base.shapes[path], scale=-0.7, spread=0.1)
        for at, (path, rank) in enumerate(ranks.items())
    }


def mixed_updates(base: BaseModel) -> list[ModelUpdate]:
    """Three adapters whose ranks and modules differ."""
    return [
        random_update(base, {Q0: 3, DOWN: 1, HEAD: 2}, seed=10),
        random_update(base, {Q0: 5, Q1: 4}, seed=20),
        random_update(base, {Q1: 2, DOWN: 7}, seed=30),
    ]


class DenseModel:
    """The model with matrices added to its weights, called as transformers' models are.

    Args:
        base: the model.
        deltas: (out, in) by module path; gradients flow into them.
    """

    def __init__(self, base: BaseModel, deltas: Mapping[str, Tensor]) -> None:
        self.model = base.model
        self.weights = {
            f"{path}.weight": base.model.get_submodule(path).weight + delta
            for path, delta in deltas.items()
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.weights, args, kwargs)


def weighted_sum(updates: Sequence[ModelUpdate], weights: Tensor) -> dict[str, Tensor]:
    """sum_i weights[m, i] * scale * B A, by module path m, in sorted order of the paths."""
    paths = sorted({path for update in updates for path in update})
    return {
        path: sum(
            (
                weights[row, at] * dense(update[path])
                for at, update in enumerate(updates)
                if path in update
            ),
            start=torch.zeros(()),
        )
        for row, path in enumerate(paths)
    }


def dense(piece: LowRankUpdate) -> Tensor:
    """scale * B A."""
    return piece.scale * (piece.B @ piece.A)


def gated_logits(
    base: BaseModel,
    updates: Sequence[ModelUpdate],
    gates: Mapping[str, Gate],
    tokens: Sequence[int],
) -> Tensor:
    """Of the model with the concatenated adapters on it."""
    with torch.no_grad(), attached(base, concatenate(updates), gates):
        return logits(base.model, tokens)
