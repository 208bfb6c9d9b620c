"""LoRA+ (arXiv 2402.12354), by PEFT: AdamW with a higher rate for B than for A."""

import contextlib
from collections.abc import Iterator

import torch
from peft.optimizers import create_loraplus_optimizer

from recycle_cli.engine.training import Hooks
from recycle_cli.tuning.lora_form import Former, LoraForm, Setup


@contextlib.contextmanager
def loraplus(setup: Setup, *, within: Former, lr_ratio: float) -> Iterator[LoraForm]:
    """A form of PEFT's, moved so."""
    with within(setup) as form:
        yield form.then(
            Hooks(
                optimizer=lambda _, plan: create_loraplus_optimizer(
                    form.peft_model,
                    torch.optim.AdamW,
                    lr=plan.lr,
                    loraplus_lr_ratio=lr_ratio,
                    loraplus_weight_decay=plan.weight_decay,
                )
            )
        )
