"""SD-LoRA (arXiv 2501.13198): the directions of earlier adapters, how much of each as trained
magnitudes, and a new direction beside.

y = (W + sum_k a_k N_k + a_t B_t A_t) x, with N_k = B_k A_k / |B_k A_k|_F in each module. The
magnitudes a are one number an adapter, shared by all modules, and start at one; A_t and B_t are
trained. The result is one LoRA of rank sum r_k, exactly.
"""

import math

import torch
from torch import Tensor

from recycle_cli.lora.norm import inner_product, squared_norm
from recycle_cli.lora.update import Lazy, LowRankUpdate, ModelUpdate
from recycle_cli.parameters import Value
from recycle_cli.tuning.layout import ADAPTER
from recycle_cli.tuning.mixture import Mixture, MixtureRecipe, new_lora
from recycle_cli.tuning.tuned import Ingredients

RECIPE = MixtureRecipe(activation="linear", init="one", granularity=ADAPTER, factors="new")
# The new direction's rank, from so many earlier ones on: the paper's r_1, r_mu and r_nu.
RANKS = ((8, 6), (4, 8), (0, 10))


def reduced_rank(earlier: int) -> int:
    """The rank of a new direction beside `earlier` others (SD-LoRA-RR)."""
    return next(rank for start, rank in RANKS if earlier >= start)


class SDLora(Mixture):
    """Magnitudes of unit directions and a new direction, the last of the adapters.

    Args:
        ingredients: the earlier adapters.
        new_rank: of the new direction.
        reduce_rank: let `reduced_rank` choose it instead.
        distill: the paper's tau (SD-LoRA-KD); 0 keeps the new direction whatever it holds.
    """

    def __init__(
        self, ingredients: Ingredients, *, new_rank: int, reduce_rank: bool, distill: float
    ) -> None:
        given = ingredients
        rank = reduced_rank(len(given.updates)) if reduce_rank else new_rank
        updates = [_unit(update) for update in given.updates]
        updates.append(new_lora(given, rank, _kaiming))
        super().__init__(updates, RECIPE, given.device, None, given.seed, given.dtype)
        self.distill = distill
        self.new_rank = rank

    def chosen(self) -> dict[str, Value]:
        """See `Tuned`."""
        return {"new_rank": self.new_rank}

    def finish(self) -> dict[str, float]:
        """Absorbs the new direction into the others' magnitudes where they can express it.

        Returns:
            `unexpressed`, the squared share of the new direction outside the span of the others,
            and `absorbed`, 1 where it was absorbed; nothing where that was not asked for.
        """
        if self.distill == 0:
            return {}
        weights, unexpressed = self._express()
        absorbed = unexpressed <= self.distill
        if absorbed:
            magnitudes = self.coefficients[0].data
            magnitudes[:-1] += magnitudes[-1] * weights.to(magnitudes)
            magnitudes[-1] = 0
        return {"unexpressed": unexpressed, "absorbed": float(absorbed)}

    def _express(self) -> tuple[Tensor, float]:
        """The combination of the earlier directions nearest to the new one, over all modules: its
        weights, and the share of the squared norm that is left. From r x r products alone."""
        earlier = self.adapters - 1
        gram = torch.zeros(earlier, earlier, dtype=torch.float64)
        against = torch.zeros(earlier, dtype=torch.float64)
        whole = 0.0
        for piece in self._all_components().values():
            parts = {
                int(k): LowRankUpdate(piece.A[piece.owner == k], piece.B[:, piece.owner == k], 1.0)
                for k in piece.owner.unique()
            }
            new = parts.pop(earlier)
            whole += squared_norm(new)
            for k, one in parts.items():
                against[k] += inner_product(one, new)
                for other, two in parts.items():
                    gram[k, other] += inner_product(one, two)
        if whole == 0:
            return torch.zeros(earlier), 0.0
        weights = torch.linalg.lstsq(gram, against[:, None], driver="gelsd").solution[:, 0]
        expressed = float(2 * weights @ against - weights @ gram @ weights)
        return weights, max(0.0, 1 - expressed / whole)


def _unit(update: ModelUpdate) -> ModelUpdate:
    """The update with every module at Frobenius norm 1; zeros stay."""

    def make(module: str) -> LowRankUpdate:
        piece = update[module]
        norm = math.sqrt(squared_norm(piece))
        return LowRankUpdate(piece.A, piece.B, piece.scale / norm if norm > 0 else 0.0)

    return Lazy(update.keys(), make)


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """What PEFT draws A from: uniform within 1 / sqrt(in)."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])
