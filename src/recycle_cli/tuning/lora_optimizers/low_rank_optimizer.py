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

    Layers that took part in no pass stay as they are, momentum included. `zero_grad` comes before
    the passes of each step: the gradients of A are made use of, since B^T S^T X is one, and those
    of B are not computed, since they are of no use.

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
        self._share = 1.0
        every = [factor for pair in self.factors.values() for factor in pair]
        super().__init__(every, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def clip(self, _parameters: Iterable[nn.Parameter], highest: float) -> None:
        """Scales the gradients by all weights down to a norm."""
        squares = [c * c * squared_norm(x, s) for x, s, c in self._taken().values()]
        norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
        self._share = highest / norm if norm > highest else 1.0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients; those of B are not computed again until the step is over."""
        super().zero_grad(set_to_none)
        self._take_gradients_of_b(False)

    def _take_gradients_of_b(self, on: bool) -> None:
        for _, b in self.factors.values():
            b.requires_grad_(on)

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
            x, s, c = rows.pop(path)
            self._move(path, Rows(x, s, c * self._share), group["lr"], group["weight_decay"])
        self._share = 1.0
        self._take_gradients_of_b(True)

    def _move(self, path: str, rows: Rows, lr: float, weight_decay: float) -> None:
        x, s, c = rows
        rule, (a, b) = self.rule, self.factors[path]
        state = self._state_of(path)
        metric = self._metric(state, rows) if rule.kfac else None
        new = c * (1 - rule.momentum if rule.averaged else 1.0)
        step = -lr / self.recorder.layers[path].scaling[ADAPTER]
        proximal = max(lr * rule.proximal, LEAST_PROXIMAL)
        terms = [Term(1 - lr * weight_decay, a, b), Term(step * new, x, s.T, a.grad)]
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

    def _metric(self, state: dict[str, Tensor], rows: Rows) -> Metric:
        """L and R, with these rows in the running means."""
        kfac, (x, s, c) = self.rule.kfac, rows
        assert kfac is not None
        # The loss is a mean over the answer tokens of a step, which makes S the smaller the more
        # rows there are.
        now = {
            "input_square": x.square().mean(dim=0),
            "gradient_square": len(x) * c * c * s.square().sum(dim=0),
        }
        for name, value in now.items():
            state[name].lerp_(value, 1 - kfac.decay)
        width, out = ((state[n] + kfac.damping) ** kfac.power for n in now)
        return Metric(out, width)
