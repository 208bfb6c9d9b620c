"""LoRA-RITE (arXiv 2410.20625), by pytorch-optimizer: Adam in coordinates that belong to the
product B A, so that the result does not depend on how it is split into factors.

Its own clipping, of gradients in those coordinates, takes the place of the loop's.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from pytorch_optimizer import LoRARite
from torch import nn

from recycle_cli.engine.training import Hooks, TrainingPlan
from recycle_cli.errors import InputError
from recycle_cli.tuning.lora_form import Former, LoraForm, Setup
from recycle_cli.tuning.lora_optimizers.pairs import factor_pairs


@contextlib.contextmanager
def rite(setup: Setup, *, within: Former, update_skipping: float) -> Iterator[LoraForm]:
    """A form whose pairs of factors are moved by LoRA-RITE.

    Raises:
        InputError: a rank is larger than a side of its module.
    """
    with within(setup) as form:
        pairs = factor_pairs(form.parameters)
        _check_ranks(pairs)

        def optimizer(_parameters: object, plan: TrainingPlan) -> torch.optim.Optimizer:
            # It takes factors in turn, A, B, A, B.
            made: torch.optim.Optimizer = LoRARite(
                [factor for pair in pairs.values() for factor in pair],
                lr=plan.lr,
                weight_decay=plan.weight_decay,
                clip_unmagnified_grad=plan.max_grad_norm,
                update_skipping=update_skipping,
            )
            return made

        yield form.then(Hooks(optimizer=optimizer, clip=lambda _parameters, _norm: None))


def _check_ranks(pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]]) -> None:
    sides = {name: min(a.shape[1], len(b)) for name, (a, b) in pairs.items()}
    over = [name for name, (a, _) in pairs.items() if len(a) > sides[name]]
    if over:
        name = min(over, key=lambda name: sides[name])
        module = name.removeprefix("base_model.model.").partition(".lora_A")[0]
        raise InputError(
            f"--optimizer rite needs factors of full rank, and a rank of {len(pairs[name][0])} is "
            f"more than {module} can have",
            f"use a --rank of {sides[name]} or less, or another --optimizer",
        )
