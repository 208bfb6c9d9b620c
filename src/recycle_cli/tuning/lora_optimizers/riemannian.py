"""Riemannian preconditioned LoRA (arXiv 2402.02347), by PEFT: the gradient of each factor is
multiplied by the inverse Gram matrix of the other, and then goes through AdamW."""

import contextlib
from collections.abc import Iterator

import torch
from peft.optimizers import create_riemannian_optimizer

from recycle_cli.engine.training import Hooks
from recycle_cli.tuning.lora_form import Former, LoraForm, Setup


@contextlib.contextmanager
def riemannian(setup: Setup, *, within: Former, damping: float) -> Iterator[LoraForm]:
    """A form of PEFT's, moved so."""
    with within(setup) as form:
        yield form.then(
            Hooks(
                optimizer=lambda _, plan: create_riemannian_optimizer(
                    form.peft_model,
                    torch.optim.AdamW,
                    lr=plan.lr,
                    reg=damping,
                    weight_decay=plan.weight_decay,
                )
            )
        )
