"""Routed adapters on a loaded base model: for each token, a softmax over the adapters."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from recycle_cli.engine.adapted import Forward, replaced, with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.lora.routed import RoutedAdapter, RoutedModule
from recycle_cli.lora.update import ModelUpdate

Heard = Callable[[Tensor], object]


def route(x: Tensor, prototypes: Tensor, top_k: int, temperature: float) -> Tensor:
    """The share of each adapter, in float32.

    Args:
        x: inputs (..., in).
        prototypes: (adapters, in).
        top_k: how many get a share; 0, or as many as there are, for all.
        temperature: above 0.

    Returns:
        (..., adapters), which sums to 1.
    """
    scores = functional.linear(x.float(), prototypes).abs()
    if 0 < top_k < len(prototypes):
        kept = scores.topk(top_k, dim=-1).indices
        mask = torch.full_like(scores, -torch.inf).scatter(-1, kept, 0.0)
        scores = scores + mask
    # Softmax would take the largest off too, but after a low temperature has made it infinite.
    return ((scores - scores.amax(-1, keepdim=True).detach()) / temperature).softmax(-1)


def routed_product(
    module: RoutedModule, top_k: int, temperature: float, hear: Heard | None = None
) -> Forward:
    """The forward pass of a module with routed adapters on it: y = W x + B (p[owner] * (A x)), one
    product for all of them. The factors' dtype is that of the product.

    Args:
        module: on the model's device.
        top_k: as in `route`.
        temperature: as in `route`.
        hear: is given the shares (tokens, adapters) of every pass.
    """

    def forward(linear: nn.Linear, x: Tensor) -> Tensor:
        output = functional.linear(x, linear.weight, linear.bias)
        shares = route(x, module.prototypes, top_k, temperature)
        if hear is not None:
            hear(shares.flatten(0, -2))
        inner = functional.linear(x.to(module.A.dtype), module.A)
        inner = inner * shares[..., module.owner].to(inner.dtype)
        return (output + functional.linear(inner, module.B)).to(output.dtype)

    return forward


@contextlib.contextmanager
def put_on(base: BaseModel, adapter: ModelUpdate | RoutedAdapter | None) -> Iterator[None]:
    """The base model with an adapter of either kind on it, as long as the context lasts.

    A routed adapter is computed in the dtype of the model, as it is when it is made. No other tool
    has to agree, and a rounding that differs could send a token elsewhere.

    Raises:
        AdapterProblem: it does not fit the base model.
    """
    if not isinstance(adapter, RoutedAdapter):
        with with_adapter(base, adapter):
            yield
        return
    forwards = {
        path: routed_product(
            module.to(base.compute.device, base.dtype), adapter.top_k, adapter.temperature
        )
        for path, module in adapter.modules.items()
    }
    with replaced(base, forwards, {path: m.shape for path, m in adapter.modules.items()}):
        yield
