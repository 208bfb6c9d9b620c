"""The gradients of the loss with respect to the weights of linear modules, in one pass."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from recycle_cli.engine.attention import attention_with_gradients
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, shared_length
from recycle_cli.engine.packing import Branching, pack, run_packed
from recycle_cli.engine.prefix import gradients_collected, run_prefix
from recycle_cli.progress import Progress, Silent

TOKENS_A_PASS = 768
"""About as many at most, since what a pass keeps for its way back grows with its tokens."""


def weight_gradients(
    base: BaseModel,
    examples: Sequence[Example],
    modules: Collection[str],
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """dL/dW of the mean loss over all answer tokens, for each of some linear modules.

    One forward and backward pass over the examples, which goes back as far as the first of the
    modules. The weights stay frozen: what a module was given and the gradient of what it gave are
    multiplied as they come, in the model's dtype, and added up in float32.

    Args:
        base: the model.
        examples: at least one.
        modules: their paths.
        progress: told of every batch.

    Returns:
        Module path -> (out, in) float32, on the model's device.

    Raises:
        InputError: a row is longer than the model can see at once.
    """
    progress = progress or Silent()
    tokens = sum(len(example.answer) for example in examples)
    shared = shared_length([example.prompt for example in examples])
    gradients: dict[str, Tensor] = {}
    with _gathering(base, modules, gradients), torch.enable_grad():
        beginning = torch.tensor(examples[0].prompt[:shared], dtype=torch.int64)
        made = run_prefix(base, beginning.to(base.compute.device))
        with gradients_collected(made) as prefix:
            for batch in _batches(examples, shared):
                (_summed_loss(base, batch, shared, prefix) / tokens).backward()
                progress.advance()
    return gradients


def factor_dtype(base: BaseModel) -> torch.dtype:
    """What products of a model's gradients with factors of updates are worth computing in: bfloat16
    where the gradients come from it. float16 has too small a range for them."""
    return torch.bfloat16 if base.dtype == torch.bfloat16 else torch.float32


def _batches(examples: Sequence[Example], shared: int) -> list[list[Example]]:
    """Examples in their order, in batches of about as many tokens each as the others."""
    ends = list(accumulate(_row(example, shared).length for example in examples))
    count = -(-ends[-1] // TOKENS_A_PASS)
    batches: list[list[Example]] = [[] for _ in range(count)]
    for example, end in zip(examples, ends, strict=True):
        batches[(end - 1) * count // ends[-1]].append(example)
    return [batch for batch in batches if batch]


def _row(example: Example, shared: int) -> Branching:
    """Nothing is predicted from an answer's last token, so that one is not run."""
    return Branching((example.prompt + example.answer)[shared:-1])


def _summed_loss(base: BaseModel, examples: Sequence[Example], shared: int, prefix: Any) -> Tensor:
    """Cross-entropy of all answer tokens, in nats, computed in float32."""
    rows = [_row(example, shared) for example in examples]
    packed = pack(base, rows, shared)
    with attention_with_gradients(base, shared + packed.tokens.shape[1]):
        hidden = run_packed(base, packed, prefix)
    places = [
        place
        for example, row, start in zip(examples, rows, packed.starts, strict=True)
        for place in range(start + row.length - len(example.answer), start + row.length)
    ]
    targets = torch.tensor([token for example in examples for token in example.answer])
    logits = base.head(hidden[places]).float()
    return functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")


@contextlib.contextmanager
def _gathering(
    base: BaseModel, modules: Collection[str], gradients: dict[str, Tensor]
) -> Iterator[None]:
    """Hooks that add to the modules' gradients in every backward pass."""
    handles = [
        base.model.get_submodule(path).register_forward_hook(_gatherer(path, gradients))
        for path in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gatherer(path: str, gradients: dict[str, Tensor]) -> Callable[..., Tensor]:
    def add(x: Tensor, upstream: Tensor) -> None:
        # Written out, since a transposed first factor halves the speed of a bfloat16 product.
        product = upstream.flatten(end_dim=-2).T.contiguous() @ x
        if path in gradients:
            gradients[path].add_(product)
        else:
            gradients[path] = product.float()

    def gather(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # No weight asks for gradients: the graph begins at the first of the modules in the pass.
        output = output if output.requires_grad else output.requires_grad_()
        output.register_hook(functools.partial(add, inputs[0].detach().flatten(end_dim=-2)))
        return output

    return gather
