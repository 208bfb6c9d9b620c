"""Gradient checkpointing: a layer's activations are computed again when they are needed."""

import contextlib
from collections.abc import Callable, Iterator

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.errors import InputError


@contextlib.contextmanager
def gradient_checkpointing(base: BaseModel) -> Iterator[None]:
    """The base model, keeping only what enters each decoder layer, as long as the context lasts.

    Its layers are told that they are in training, which is what makes transformers run them again;
    what they hold, dropout among it, is not.

    Raises:
        InputError: the model cannot.
    """
    if not base.model.supports_gradient_checkpointing:
        raise InputError(
            f"{base.id} knows no gradient checkpointing", "leave out --gradient-checkpointing"
        )
    _switch(base, "enable")({"use_reentrant": False})
    # Embeddings need no gradients in this form; transformers has them asked for, and does not stop.
    base.model.disable_input_require_grads()
    layers = [m for m in base.model.modules() if getattr(m, "gradient_checkpointing", False)]
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = True
        yield
    finally:
        for layer, training in zip(layers, before, strict=True):
            layer.training = training
        _switch(base, "disable")()


def _switch(base: BaseModel, what: str) -> Callable[..., None]:
    """What newer versions of transformers call activation checkpointing."""
    model = base.model
    names = (f"{kind}_checkpointing_{what}" for kind in ("activation", "gradient"))
    switch: Callable[..., None] = next(getattr(model, n) for n in names if hasattr(model, n))
    return switch
