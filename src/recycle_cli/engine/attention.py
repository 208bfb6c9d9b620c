"""How attention is computed where a backward pass follows."""

import contextlib

from torch.nn.attention import SDPBackend, sdpa_kernel

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.products import WIDE

SHORT_LINE = 160
"""Tokens up to which attention may keep its scores, a number for each pair of tokens."""


def attention_with_gradients(
    base: BaseModel, length: int
) -> contextlib.AbstractContextManager[object]:
    """The quicker way for lines of this length, forward and backward; where layers are run again in
    the backward pass, it has to last until the end of that.

    The fused kernel's way back is slow on a CPU in bfloat16: for short lines plain products take
    half its time, and keep all scores for it.

    Args:
        base: the model.
        length: tokens in a line, what all of them begin with included.
    """
    if base.compute.device.type == "cpu" and base.dtype not in WIDE and length <= SHORT_LINE:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()
