"""Arrow (arXiv 2405.11157): for each token, the adapters whose main direction it points to.

Adapter i is known in a module by a prototype v_i, the right singular vector of its largest singular
value: the input direction that its update stretches most. A token x is routed by the softmax of
|x . v_i| / temperature over the `top_k` largest; without a step of training that needs no data, and
the prototypes may be trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from recycle_cli.engine.adapted import Forward, concatenate, replaced
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.routing import Heard, routed_product
from recycle_cli.lora.decomposition import leading_triplets
from recycle_cli.lora.routed import RoutedAdapter, RoutedModule
from recycle_cli.lora.update import LowRankUpdate
from recycle_cli.tuning.mixture import parameter_name
from recycle_cli.tuning.tuned import Ingredients, Share, Tuned

# How many of the training rows tell which adapters the tokens go to.
HEARD_ROWS = 8


class Router(Tuned):
    """The prototypes of the adapters.

    Attributes:
        prototypes: (adapters that have the module, in) float32, by module.
        modules_of: the adapters and their prototypes, by module path.
    """

    def __init__(self, ingredients: Ingredients, *, top_k: int, temperature: float) -> None:
        super().__init__()
        given = ingredients
        self.top_k, self.temperature = top_k, temperature
        self.adapters = len(given.updates)
        self.prototypes = nn.ParameterDict()
        self.modules_of: dict[str, RoutedModule] = {}
        self._rows: tuple[BaseModel, Sequence[Example]] | None = None
        for path, piece in concatenate(given.updates, given.dtype).items():
            present, owner = piece.owner.unique(return_inverse=True)
            vectors = torch.stack([prototype(given.updates[int(at)][path]) for at in present])
            vectors = nn.Parameter(vectors.to(given.device))
            self.prototypes[parameter_name(path)] = vectors
            module = RoutedModule(piece.A, piece.B, owner, present, vectors)
            there = module.to(given.device, given.dtype)
            # The parameter itself, which is trained.
            self.modules_of[path] = replace(there, prototypes=vectors)

    def prepare(self, base: BaseModel, examples: Sequence[Example]) -> None:
        """Keeps the rows that `shares` is about."""
        self._rows = base, examples[:HEARD_ROWS]

    def forwards(self, base: BaseModel, tokens: float) -> Mapping[str, Forward]:
        """See `Tuned`."""
        return {path: self._forward(path) for path in self.modules_of}

    def _forward(self, path: str, hear: Heard | None = None) -> Forward:
        return routed_product(self.modules_of[path], self.top_k, self.temperature, hear)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """See `Tuned`."""
        return {path: module.shape for path, module in self.modules_of.items()}

    def result(self) -> RoutedAdapter:
        """See `Tuned`."""
        found = {
            path: replace(module, prototypes=module.prototypes.detach())
            for path, module in self.modules_of.items()
        }
        return RoutedAdapter(found, self.top_k, self.temperature)

    def shares(self) -> list[Share]:
        """How much each adapter gets of the tokens of the first rows given to `prepare`: the mean
        of its share over the modules that it has, and its largest share of a module. Zeros where
        none were given."""
        own: list[list[float]] = [[] for _ in range(self.adapters)]
        heard = self.heard(*self._rows) if self._rows else {}
        for path, shares in heard.items():
            for at, share in zip(self.modules_of[path].present.tolist(), shares, strict=True):
                own[at].append(share)
        return [Share(sum(o) / len(o), max(o)) if o else Share(0.0, 0.0) for o in own]

    @torch.no_grad()
    def heard(self, base: BaseModel, examples: Sequence[Example]) -> dict[str, list[float]]:
        """The mean share over all tokens of some rows, of each adapter that has a module, by the
        path of the module; in the head, over the tokens that an answer is read from.

        Each row is run by itself: padding would be routed too, and a beginning that rows have in
        common would count once.
        """
        parts: dict[str, list[Tensor]] = {path: [] for path in self.modules_of}
        forwards = {path: self._forward(path, parts[path].append) for path in self.modules_of}
        with replaced(base, forwards, self.shapes()):
            for example in examples:
                row = torch.tensor([[*example.prompt, *example.answer]])
                passed = base.model.base_model(row.to(base.compute.device), use_cache=False)
                base.head(passed.last_hidden_state[0, len(example.prompt) - 1 : -1])
        every = {path: torch.cat(shares) for path, shares in parts.items() if shares}
        return {path: shares.mean(0).tolist() for path, shares in every.items() if len(shares)}

    def held(self) -> list[Tensor]:
        """See `Tuned`."""
        factors = (t for m in self.modules_of.values() for t in (m.A, m.B, m.owner))
        return [*super().held(), *factors]


def prototype(update: LowRankUpdate) -> Tensor:
    """The right singular vector (in,) of the largest singular value, in float32; zeros where the
    update is zero."""
    _, values, right, _ = leading_triplets(update, 1)
    return right[0].float() if float(values[0]) > 0 else torch.zeros(update.shape[1])
