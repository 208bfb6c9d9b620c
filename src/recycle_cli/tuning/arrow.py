"""Arrow (arXiv 2405.11157): for each token, the adapters whose main direction it points to.

Adapter i is known in a module by a prototype v_i, the right singular vector of its largest singular
value: the input direction that its update stretches most. A token x is routed by the softmax of
|x . v_i| / temperature over the `top_k` largest; without a step of training that needs no data, and
the prototypes may be trained.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recycle_cli.engine.adapted import Forward, concatenate
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.routing import routed_product
from recycle_cli.lora.decomposition import leading_triplets
from recycle_cli.lora.routed import RoutedAdapter, RoutedModule
from recycle_cli.lora.update import LowRankUpdate
from recycle_cli.tuning.mixture import parameter_name
from recycle_cli.tuning.tuned import Ingredients, Share, Tuned


class Router(Tuned):
    """The prototypes of the adapters.

    Attributes:
        prototypes: (adapters that have the module, in) float32, by module.
    """

    def __init__(self, ingredients: Ingredients, *, top_k: int, temperature: float) -> None:
        super().__init__()
        given = ingredients
        self.top_k, self.temperature = top_k, temperature
        self.adapters = len(given.updates)
        self.prototypes = nn.ParameterDict()
        self._modules_of: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._present: dict[str, Tensor] = {}
        for path, piece in concatenate(given.updates).items():
            present, owner = piece.owner.unique(return_inverse=True)
            vectors = [
                _prototype(piece.A[owner == at], piece.B[:, owner == at])
                for at in range(len(present))
            ]
            self.prototypes[parameter_name(path)] = nn.Parameter(
                torch.stack(vectors).to(given.device)
            )
            factors = (piece.A.to(given.device, given.dtype), piece.B.to(given.device, given.dtype))
            self._modules_of[path] = (*factors, owner.to(given.device))
            self._present[path] = present
        self._heard: dict[str, tuple[Tensor, int]] = {}

    def forwards(self, base: BaseModel, tokens: float) -> Mapping[str, Forward]:
        """See `Tuned`."""
        return {path: self._forward(path) for path in self._modules_of}

    def _forward(self, path: str) -> Forward:
        def hear(shares: Tensor) -> None:
            total, tokens = self._heard.get(path, (torch.zeros(shares.shape[1]), 0))
            self._heard[path] = total + shares.sum(0).cpu(), tokens + len(shares)

        return routed_product(self._module(path), self.top_k, self.temperature, hear)

    def _module(self, path: str) -> RoutedModule:
        return RoutedModule(*self._modules_of[path], self.prototypes[parameter_name(path)])

    def shapes(self) -> dict[str, tuple[int, int]]:
        """See `Tuned`."""
        return {path: self._module(path).shape for path in self._modules_of}

    def result(self) -> RoutedAdapter:
        """See `Tuned`."""
        found = {}
        for path in self._modules_of:
            module = self._module(path)
            found[path] = RoutedModule(module.A, module.B, module.owner, module.prototypes.detach())
        return RoutedAdapter(found, self.top_k, self.temperature)

    def finish(self) -> dict[str, float]:
        """Forgets the shares heard so far: those of the best prototypes count from here on."""
        self._heard.clear()
        return {}

    def shares(self) -> list[Share]:
        """The share of each adapter in what tokens were routed to, in the passes without gradients
        since training ended: its mean over modules, and the largest of a module."""
        rows = torch.zeros(len(self._modules_of), self.adapters)
        for row, path in zip(rows, self._modules_of, strict=True):
            if path in self._heard:
                total, tokens = self._heard[path]
                row[self._present[path]] = total / tokens
        return [Share(float(column.mean()), float(column.max())) for column in rows.T]

    def held(self) -> list[Tensor]:
        """See `Tuned`."""
        return [*super().held(), *(t for parts in self._modules_of.values() for t in parts)]


def _prototype(a: Tensor, b: Tensor) -> Tensor:
    """The right singular vector (in,) of the largest singular value of B A; zeros for no update."""
    _, values, right, _ = leading_triplets(LowRankUpdate(a, b, 1.0), 1)
    return right[0].float() if float(values[0]) > 0 else torch.zeros(a.shape[1])
