"""Optimizers that follow full training projected on rank r: OPLoRA (arXiv 2509.19977), LoRSum and
PSI-LoRA (arXiv 2602.16456).

The product Z = B A of a LoRA is moved to the rank-r matrix nearest to Z - (rate / s) M, with M the
momentum of the gradient G = S^T X by the module's weight and s the LoRA's scale, so that the weight
itself moves by rate times M. Neither Z, G nor M is formed: `low_rank_sum` works on their factors,
and the momentum is a LoRA of its own, the nearest to the sum of the one before and G.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recycle_cli.lora.draws import generator_for
from recycle_cli.tuning.lora_optimizers.gradient_norm import squared_norm
from recycle_cli.tuning.lora_optimizers.low_rank_sum import Metric, Term, low_rank_sum
from recycle_cli.tuning.lora_optimizers.recording import Recorder, Rows
from recycle_cli.tuning.peft_layers import ADAPTER, factor_pair

LEAST_PROXIMAL = 1e-5


@dataclass(frozen=True)
class Kfac:
    """Diagonal fractional K-FAC: R = (D_in + damping)^power, L = (D_out + damping)^power, with the
    running means D_in of X^2 and D_out of (rows S)^2 over rows, both 1 at first.

    Args:
        decay: of the running means, in [0, 1).
        power: in [0, 1]; 1 is plain diagonal K-FAC, 0 none.
        damping: above 0.
    """

    decay: float
    power: float
    damping: float


@dataclass(frozen=True)
class Rule:
    """How a step is made.

    Args:
        inner_steps: of `low_rank_sum`.
        proximal: how strongly factors are held where they are, times the rate.
        momentum: in [0, 1), of the gradient.
        averaged: whether the momentum is a running mean of gradients, or their sum, which goes
            1 / (1 - momentum) times as far.
        kfac: the metric; None for none.
    """

    inner_steps: int
    proximal: float
    momentum: float
    averaged: bool
    kfac: Kfac | None = None


class LowRankOptimizer(torch.optim.Optimizer):
    """Moves the factors of PEFT's LoRA layers by what a recorder has of their last passes.

    Layers that took part in no pass stay as they are, momentum included.

    Args:
        recorder: of the layers.
        lr: how far a weight moves, in units of its gradient.
        weight_decay: of the product, times the rate.
        rule: how a step is made.
        seed: of the momentum's first factors.
    """

    def __init__(
        self, recorder: Recorder, *, lr: float, weight_decay: float, rule: Rule, seed: int
    ) -> None:
        self.recorder, self.rule, self.seed = recorder, rule, seed
        self.factors = {path: factor_pair(layer) for path, layer in recorder.layers.items()}
        self._rows: dict[str, Rows] = {}
        every = [factor for pair in self.factors.values() for factor in pair]
        super().__init__(every, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def clip(self, _parameters: Iterable[nn.Parameter], highest: float) -> None:
        """Scales the gradients by all weights down to a norm."""
        rows = self._taken()
        if rows:
            norm = torch.stack([squared_norm(x, s) for x, s in rows.values()]).sum().sqrt()
            if norm > highest:
                self._rows = {path: (x, s * (highest / norm)) for path, (x, s) in rows.items()}

    def _taken(self) -> dict[str, Rows]:
        """What was recorded since the last step."""
        for path in self.factors:
            rows = self.recorder.take(path)
            if rows is not None:
                self._rows[path] = rows
        return self._rows

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Moves the factors; a closure is not called."""
        (group,) = self.param_groups
        rows = self._taken()
        for path in list(rows):
            self._move(path, rows.pop(path), group["lr"], group["weight_decay"])

    def _move(self, path: str, rows: Rows, lr: float, weight_decay: float) -> None:
        x, s = rows
        rule, (a, b) = self.rule, self.factors[path]
        state = self._state_of(path)
        metric = self._metric(state, x, s) if rule.kfac else None
        new = 1 - rule.momentum if rule.averaged else 1.0
        step = -lr / self.recorder.layers[path].scaling[ADAPTER]
        proximal = max(lr * rule.proximal, LEAST_PROXIMAL)
        terms = [Term(1 - lr * weight_decay, a, b), Term(step * new, x, s.T)]
        gradients = [Term(new, x, s.T)]
        if rule.momentum:
            before = (state["momentum_a"], state["momentum_b"])
            terms.append(Term(step * rule.momentum, *before))
            gradients = [Term(rule.momentum, *before), *gradients]
            after = low_rank_sum(gradients, proximal, rule.inner_steps)
            # Row by row, as they come back from disk: products of other layouts round otherwise.
            state["momentum_a"], state["momentum_b"] = (factor.contiguous() for factor in after)
        moved = low_rank_sum(terms, proximal, rule.inner_steps, metric)
        for factor, value in zip((a, b), moved, strict=True):
            factor.copy_(value)

    def _state_of(self, path: str) -> dict[str, Tensor]:
        a, b = self.factors[path]
        state: dict[str, Tensor] = self.state[a]
        if not state and self.rule.momentum:
            drawn = torch.randn(a.shape, generator=generator_for("momentum", self.seed, path))
            state["momentum_a"], state["momentum_b"] = drawn.to(a), torch.zeros_like(b)
        if self.rule.kfac and "input_square" not in state:
            state["input_square"], state["gradient_square"] = (
                a.new_ones(a.shape[1]),
                b.new_ones(len(b)),
            )
        return state

    def _metric(self, state: dict[str, Tensor], x: Tensor, s: Tensor) -> Metric:
        """L and R, with these rows in the running means."""
        kfac, rows = self.rule.kfac, len(x)
        assert kfac is not None
        # The loss is a mean, so that S carries 1 / rows.
        now = {
            "input_square": x.square().mean(dim=0),
            "gradient_square": rows * s.square().sum(dim=0),
        }
        for name, value in now.items():
            state[name].lerp_(value, 1 - kfac.decay)
        width, out = ((state[n] + kfac.damping) ** kfac.power for n in now)
        return Metric(out, width)
