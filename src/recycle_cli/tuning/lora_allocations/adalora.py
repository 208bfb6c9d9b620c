"""AdaLoRA (arXiv 2303.10512), by PEFT: the ranks of the modules are found while they are trained.

dW = s B diag(E) A, with a penalty that keeps the rows of A and the columns of B near orthonormal.
All modules start at one and a half times the rank. From a tenth of the steps on, the triplets that
matter least over all modules are cut, until at seven tenths the mean rank is the one asked for; the
rest trains what is left. A triplet matters by the size of its numbers times their gradients,
smoothed, times how much that varies.

The best validation loss may come before the ranks are down to the ones asked for: the result then
has more.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft import AdaLoraConfig
from torch import Tensor

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.training import Hooks
from recycle_cli.errors import InputError
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.tuning.lora_form import Former, LoraForm, Setup, of_peft
from recycle_cli.tuning.peft_layers import ADAPTER, peft_layers
from recycle_cli.tuning.target_lora import LoraRecipe, check_target_modules, config_fields, wrapped

STARTING = 1.5
WARMUP, FINAL = 0.1, 0.3
EVERY = 10
"""Steps between two cuts; a hundredth of the steps where that is less."""


@contextlib.contextmanager
def adalora(setup: Setup, within: Former) -> Iterator[LoraForm]:
    """AdaLoRA in the place of a LoRA of fixed ranks: see `lora_form`.

    Raises:
        InputError: as `adalora_config`.
    """
    check_target_modules(setup.base, setup.recipe)
    config = adalora_config(setup.recipe, setup.plan.steps)
    with wrapped(setup.base, config, setup.plan.seed) as peft_model:
        ranks = RankAllocation(setup.base, peft_model)
        form = replace(of_peft(setup.base, peft_model), update=ranks.update)
        yield form.then(ranks.hooks(), ranks.figures)


def adalora_config(recipe: LoraRecipe, steps: int) -> AdaLoraConfig:
    """PEFT's configuration.

    Args:
        recipe: its rank is the mean rank in the end.
        steps: of the training.

    Raises:
        InputError: the recipe asks for what AdaLoRA cannot do, or there are no steps.
    """
    if recipe.rank_pattern or recipe.alpha_pattern or recipe.use_rslora:
        raise InputError(
            "AdaLoRA finds the ranks itself, and scales all modules alike",
            "leave out --rank-pattern, --alpha-pattern and --rslora",
        )
    if steps < 1:
        raise InputError("AdaLoRA finds the ranks in its steps, and there are none", "use --steps")
    fields = config_fields(recipe)
    del fields["rank_pattern"], fields["alpha_pattern"]
    return AdaLoraConfig(
        init_r=max(recipe.rank + 1, math.ceil(STARTING * recipe.rank)),
        target_r=recipe.rank,
        tinit=math.floor(WARMUP * steps),
        tfinal=math.floor(FINAL * steps),
        deltaT=max(1, min(EVERY, steps // 100)),
        total_step=steps,
        **fields,
    )


class RankAllocation:
    """PEFT's allocator, called step by step.

    Its smoothed sizes live in new tensors after every step; they are copied to tensors that stay,
    from which a resumed run goes on.
    """

    def __init__(self, base: BaseModel, peft_model: Any) -> None:
        self.layers = peft_layers(base)
        self.model = peft_model.base_model
        self.config = peft_model.peft_config[ADAPTER]
        named = self.model.model.named_parameters()
        factors = {
            name: p.detach() for name, p in named if f".{ADAPTER}" in name and "lora_" in name
        }
        self.sizes = {name: torch.zeros_like(p) for name, p in factors.items()}
        self.spreads = {name: torch.zeros_like(p) for name, p in factors.items()}
        self.masks = {n: torch.ones_like(p) for n, p in factors.items() if ".lora_E." in n}
        self.steps_done = torch.zeros((), dtype=torch.int64)

    def after_step(self) -> None:
        """Counts, smooths, and cuts where it is time to."""
        self.steps_done += 1
        allocator = self.model.rankallocator
        allocator.ipt = dict(self.sizes)
        allocator.exp_avg_ipt, allocator.exp_avg_unc = dict(self.sizes), dict(self.spreads)
        self.config.rank_pattern = {
            name: mask.bool().flatten().tolist() for name, mask in self.masks.items()
        }
        self.model.update_and_allocate(int(self.steps_done))
        _copy(allocator.exp_avg_ipt, self.sizes)
        _copy(allocator.exp_avg_unc, self.spreads)
        for name, kept in self.config.rank_pattern.items():
            self.masks[name].copy_(torch.tensor(kept)[:, None])

    def penalty(self) -> Tensor:
        """How far the factors are from orthonormal: the mean over all of |P P^T - I|_F, times
        PEFT's weight."""
        norms = []
        for layer in self.layers.values():
            a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            one = torch.eye(len(a), device=a.device)
            norms += [(a @ a.T - one).norm(), (b.T @ b - one).norm()]
        weight: float = self.config.orth_reg_weight
        return weight * torch.stack(norms).mean()

    def hooks(self) -> Hooks:
        """What the training loop calls."""
        tensors = {"sizes": self.sizes, "spreads": self.spreads, "masks": self.masks}
        buffers = {
            f"{kind}.{n}": t for kind, of_kind in tensors.items() for n, t in of_kind.items()
        }
        return Hooks(
            penalty=self.penalty,
            after_step=self.after_step,
            buffers={**buffers, "adalora.steps_done": self.steps_done},
        )

    def update(self) -> ModelUpdate:
        """The LoRA as it stands: the triplets whose middle number is not zero. A module without any
        has none; where no module has, a zero one stands for it."""
        found = {path: _piece(layer) for path, layer in self.layers.items()}
        there = {path: piece for path, piece in found.items() if piece.rank}
        if there:
            return there
        path, piece = next(iter(found.items()))
        return {path: piece.padded(1)}

    def figures(self) -> dict[str, float]:
        """The mean rank."""
        ranks = [float(layer.lora_E[ADAPTER].count_nonzero()) for layer in self.layers.values()]
        return {"mean_rank": sum(ranks) / len(ranks)}


@torch.no_grad()
def _piece(layer: Any) -> LowRankUpdate:
    a, e, b = (getattr(layer, f"lora_{name}")[ADAPTER].detach().cpu() for name in "AEB")
    kept = e[:, 0] != 0
    scale = layer.scaling[ADAPTER] / (float(layer.ranknum[ADAPTER]) + 1e-5)
    return LowRankUpdate(a[kept], b[:, kept] * e[kept, 0], scale)


def _copy(source: dict[str, Tensor], to: dict[str, Tensor]) -> None:
    for name, tensor in source.items():
        to[name].copy_(tensor)
