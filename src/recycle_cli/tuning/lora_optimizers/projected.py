"""OPLoRA, LoRSum and PSI-LoRA as options: see `low_rank_optimizer`."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from recycle_cli.engine.training import Hooks
from recycle_cli.tuning.lora_form import Former, LoraForm, Setup
from recycle_cli.tuning.lora_optimizers.low_rank_optimizer import Kfac, LowRankOptimizer, Rule
from recycle_cli.tuning.lora_optimizers.recording import Recorder
from recycle_cli.tuning.peft_layers import peft_layers

Made = contextlib.AbstractContextManager[LoraForm]


def oplora(
    setup: Setup, *, within: Former, inner_steps: int, proximal: float, momentum: float
) -> Made:
    """With the sum of gradients as its momentum, as in SGD."""
    return _moved_by(Rule(inner_steps, proximal, momentum, averaged=False), setup, within)


def lorsum(
    setup: Setup, *, within: Former, inner_steps: int, proximal: float, momentum: float
) -> Made:
    """With the running mean of gradients as its momentum, as in Adam: PSI-LoRA without a metric."""
    return _moved_by(Rule(inner_steps, proximal, momentum, averaged=True), setup, within)


def psi_lora(
    setup: Setup,
    *,
    within: Former,
    inner_steps: int,
    proximal: float,
    momentum: float,
    metric_decay: float,
    metric_power: float,
    metric_damping: float,
) -> Made:
    """The same in a diagonal fractional K-FAC metric."""
    kfac = Kfac(metric_decay, metric_power, metric_damping)
    return _moved_by(Rule(inner_steps, proximal, momentum, True, kfac), setup, within)


@contextlib.contextmanager
def _moved_by(rule: Rule, setup: Setup, within: Former) -> Iterator[LoraForm]:
    plan = setup.plan
    with within(setup) as form:
        layers = peft_layers(setup.base)
        recorder = Recorder(layers)
        optimizer = LowRankOptimizer(
            recorder, lr=plan.lr, weight_decay=plan.weight_decay, rule=rule, seed=plan.seed
        )
        hooks = Hooks(
            set_training=lambda _on: recorder.clear(),
            optimizer=lambda _parameters, _plan: optimizer,
            clip=optimizer.clip,
        )
        longest = max(len(one.prompt) + len(one.answer) for one in setup.examples)
        numbers = sum(layer.in_features + layer.out_features for layer in layers.values())
        with recorder.recording():
            kept = form.kept_a_row + 4 * longest * numbers
            yield replace(form.then(hooks), kept_a_row=kept)
