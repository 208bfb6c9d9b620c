"""LoRA-FA (arXiv 2308.03303), by PEFT: A stays as it was drawn, and B follows the gradient that
comes nearest to full training's, through AdamW."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from peft.optimizers import create_lorafa_optimizer

from recycle_cli.engine.training import Hooks
from recycle_cli.tuning.lora_form import Former, LoraForm, Setup
from recycle_cli.tuning.lora_optimizers.pairs import factor_pairs


@contextlib.contextmanager
def lora_fa(setup: Setup, *, within: Former) -> Iterator[LoraForm]:
    """A form of PEFT's, moved so; its parameters are the B alone."""
    with within(setup) as form:
        pairs = factor_pairs(form.parameters)
        for a, _ in pairs.values():
            a.requires_grad_(False)
        trained = {name: p for name, p in form.parameters.items() if p.requires_grad}

        # PEFT takes each module's own scale; rank and alpha are for layers that have none.
        yield replace(form, parameters=trained).then(
            Hooks(
                optimizer=lambda _, plan: create_lorafa_optimizer(
                    form.peft_model,
                    setup.recipe.rank,
                    setup.recipe.alpha,
                    lr=plan.lr,
                    weight_decay=plan.weight_decay,
                )
            )
        )
