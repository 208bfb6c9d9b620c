"""Zero-cost proxies of HeteroLoRA (arXiv 2406.14956): how much a LoRA in each module would matter,
from the gradients of the loss before it is trained.

- `grad-norm`: |dL/dA|_F + |dL/dB|_F.
- `snip`: sum |A (.) dL/dA| + sum |B (.) dL/dB|.
- `synflow`: the same where every number of the model and of the factors is replaced by its size,
  and every token's embedding by ones.
- `constant`: one number for all, so that chance decides; the control.

Where B is zero, as at the start of a LoRA, snip and synflow are zero in every module: B itself is
one factor of their terms, and of the gradient of A. Scoring leaves no trace: weights, gradients and
random states are as before.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from recycle_cli.engine.attention import attention_with_gradients
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.forward import Batch, answer_loss
from recycle_cli.engine.training import finite
from recycle_cli.errors import InputError

BATCHES = 32
"""How many batches of the training rows are looked at, at most."""

Pair = tuple[nn.Parameter, nn.Parameter]
Score = Callable[[BaseModel, Mapping[str, Pair], Sequence[Batch]], dict[str, float]]
"""Takes the model with its LoRAs on, their factors A (rank, in) and B (out, rank) by module path,
and batches of rows, one a pass; gives a number from 0 for each module."""


def grad_norm(
    base: BaseModel, pairs: Mapping[str, Pair], batches: Sequence[Batch]
) -> dict[str, float]:
    """See `Score`."""
    gradients = _gradients(base, pairs, batches)
    return {path: float(a.norm() + b.norm()) for path, (a, b) in gradients.items()}


def snip(base: BaseModel, pairs: Mapping[str, Pair], batches: Sequence[Batch]) -> dict[str, float]:
    """See `Score`.

    Raises:
        InputError: all B are zero.
    """
    _check_started(pairs, "snip")
    return _saliency(pairs, _gradients(base, pairs, batches))


def synflow(
    base: BaseModel, pairs: Mapping[str, Pair], batches: Sequence[Batch]
) -> dict[str, float]:
    """See `Score`.

    Raises:
        InputError: all B are zero.
    """
    _check_started(pairs, "synflow")
    with _of_ones(base), _sizes(base.model.parameters()):
        return _saliency(pairs, _gradients(base, pairs, batches))


def constant(
    base: BaseModel, pairs: Mapping[str, Pair], batches: Sequence[Batch]
) -> dict[str, float]:
    """See `Score`."""
    return dict.fromkeys(pairs, 1.0)


PROXIES: Mapping[str, Score] = {
    "grad-norm": grad_norm,
    "snip": snip,
    "synflow": synflow,
    "constant": constant,
}


def _gradients(
    base: BaseModel, pairs: Mapping[str, Pair], batches: Sequence[Batch]
) -> dict[str, tuple[Tensor, Tensor]]:
    """dL/dA and dL/dB of the mean loss over the answer tokens, by module path."""
    factors = [factor for pair in pairs.values() for factor in pair]
    tokens = sum(batch.targets.numel() for batch in batches)
    totals = [torch.zeros_like(factor) for factor in factors]
    for batch in batches:
        with attention_with_gradients(base, batch.attention.shape[1]):
            loss = answer_loss(base, batch) * (batch.targets.numel() / tokens)
            finite(loss.item(), "training")
            # Given back, where a backward pass would leave them with the factors.
            found = torch.autograd.grad(loss, factors, allow_unused=True)
        for total, gradient in zip(totals, found, strict=True):
            if gradient is not None:
                total += gradient
    return dict(zip(pairs, zip(totals[::2], totals[1::2], strict=True), strict=True))


def _saliency(
    pairs: Mapping[str, Pair], gradients: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, float]:
    return {
        path: sum(
            float((factor.detach() * gradient).abs().sum())
            for factor, gradient in zip(pair, gradients[path], strict=True)
        )
        for path, pair in pairs.items()
    }


def _check_started(pairs: Mapping[str, Pair], name: str) -> None:
    if not any(bool(b.any()) for _, b in pairs.values()):
        raise InputError(
            f"--proxy {name} weighs factors by their own size, and B is zero in every module at "
            "the start of a LoRA, so that all scores would be 0",
            "train a little before the scores are taken: --proxy-steps 20; or use --proxy "
            "grad-norm",
        )


@contextlib.contextmanager
def _of_ones(base: BaseModel) -> Iterator[None]:
    """The base model with ones in the place of its embeddings."""
    embeddings: nn.Module = base.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _module, _inputs, y: torch.ones_like(y))
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
@torch.no_grad()
def _sizes(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters at their sizes, as long as the context lasts; their signs come back to the bit."""
    signs = [(parameter, parameter.signbit()) for parameter in parameters]
    try:
        for parameter, _ in signs:
            parameter.abs_()
        yield
    finally:
        for parameter, negative in signs:
            parameter.copy_(torch.where(negative, -parameter, parameter))
