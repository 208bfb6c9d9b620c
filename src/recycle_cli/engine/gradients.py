"""The gradients of the loss with respect to the weights of linear modules, in one pass."""

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, shared_length
from recycle_cli.engine.forward import answer_loss, by_length, collate
from recycle_cli.progress import Progress, Silent

BATCH = 8


def weight_gradients(
    base: BaseModel,
    examples: Sequence[Example],
    modules: Collection[str],
    progress: Progress | None = None,
    batch_size: int = BATCH,
) -> dict[str, Tensor]:
    """dL/dW of the mean loss over all answer tokens, for each of some linear modules.

    One forward and backward pass over the examples. The weights stay frozen: what a module was
    given and the gradient of what it gave are multiplied as they come, in the model's dtype, and
    added up in float32.

    Args:
        base: the model.
        examples: at least one.
        modules: their paths.
        progress: told of every batch.
        batch_size: examples a pass.

    Returns:
        Module path -> (out, in) float32, on the model's device.
    """
    progress = progress or Silent()
    lengths = [len(example.prompt) + len(example.answer) for example in examples]
    tokens = sum(len(example.answer) for example in examples)
    shared = shared_length([example.prompt for example in examples])
    gradients = {
        path: torch.zeros(base.shapes[path], device=base.compute.device) for path in modules
    }
    with _gathering(base, gradients):
        for group in by_length(lengths, batch_size):
            batch = collate(base, [examples[index] for index in group], shared)
            (answer_loss(base, batch) * (batch.targets.numel() / tokens)).backward()
            progress.advance()
    return gradients


@contextlib.contextmanager
def _gathering(base: BaseModel, gradients: Mapping[str, Tensor]) -> Iterator[None]:
    """Hooks that add to the gradients in every backward pass."""
    embeddings = base.model.get_input_embeddings()
    handles = [embeddings.register_forward_hook(_begin_graph)]
    for path, gradient in gradients.items():
        module = base.model.get_submodule(path)
        handles.append(module.register_forward_hook(functools.partial(_gather, gradient)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _begin_graph(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    # No weight asks for gradients, so without this there would be no backward pass.
    return output.detach().requires_grad_()


def _gather(
    gradient: Tensor, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    x = inputs[0].detach().flatten(end_dim=-2)

    def add(upstream: Tensor) -> None:
        gradient.add_(upstream.flatten(end_dim=-2).T @ x)

    output.register_hook(add)
