"""What a model says to a few fixed sentences, to compare one form of it with another."""

import torch
from torch import Tensor

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.lora.update import ModelUpdate

SENTENCES = (
    "The train to the coast leaves at half past seven, and the last one back at ten.",
    "Question: how many legs do three spiders have? Answer:",
    "def area(width: float, height: float) -> float:\n    return",
    "Dear team, thank you for the report. Two figures in the second table",
)


@torch.no_grad()
def sample_logits(base: BaseModel, update: ModelUpdate | None) -> Tensor:
    """The logits at every position of a few sentences, (positions, vocabulary), in float32.

    Args:
        base: the model.
        update: an adapter to put on it, or None.
    """
    logits = []
    with with_adapter(base, update):
        for sentence in SENTENCES:
            tokens = torch.tensor([base.tokenizer.encode(sentence)], device=base.compute.device)
            logits.append(base.model(tokens, use_cache=False).logits[0].float().cpu())
    return torch.cat(logits)
