"""How much memory a training takes, told before it starts, and fitted to what is free.

Nothing is guessed from the architecture: what the backward pass keeps is measured on passes of one
row and of two, and goes on in a line from there.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import Tensor, nn

from recycle_cli.engine.attention import attention_with_gradients
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, shared_length
from recycle_cli.engine.forward import answer_loss, collate
from recycle_cli.engine.search import SearchPlan
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.errors import RecycleError

# Beside a trained number: its gradient, AdamW's two moments, and the best value so far.
COPIES = 4
CGROUP = Path("/sys/fs/cgroup")


Plan = TypeVar("Plan", TrainingPlan, SearchPlan)


@dataclass(frozen=True)
class Budget:
    """Bytes that a training takes beyond the loaded model and adapters.

    Args:
        trained: gradients, moments and best values of what is trained.
        fixed: what a pass keeps whatever its rows: what they begin with.
        a_row: what each row of a pass adds: activations kept for the backward pass, logits.
        free: what may be taken.
    """

    trained: int
    fixed: int
    a_row: int
    free: int

    def needed(self, rows: int) -> int:
        """With so many rows a pass."""
        return self.trained + self.fixed + self.a_row * rows

    def fitted(self, plan: Plan) -> Plan:
        """The plan with as many rows a pass as fit, halved from what it says; the rows of a step,
        and so the result up to rounding, stay the same.

        Raises:
            RecycleError: not even one row fits.
        """
        rows = plan.rows_a_pass
        while rows > 1 and self.needed(rows) > self.free:
            rows = (rows + 1) // 2
        if self.needed(rows) > self.free:
            raise RecycleError(
                f"training takes {in_words(self.needed(1))} beyond the model, row by row, and "
                f"{in_words(self.free)} may be taken",
                "use fewer adapters or shorter rows"
                + ("" if getattr(plan, "checkpointing", True) else ", --gradient-checkpointing")
                + ", or another machine",
            )
        return plan if rows >= plan.rows_a_pass else plan.with_rows_a_pass(rows)


def estimate(
    base: BaseModel,
    parameters: Iterable[nn.Parameter],
    examples: Sequence[Example],
    plan: TrainingPlan,
    limit: int | None = None,
    held: Iterable[Tensor] = (),
) -> Budget:
    """The budget of a training, from two short passes over its longest rows.

    Args:
        base: the model, with whatever holds the parameters attached.
        parameters: what is trained.
        examples: the training rows, at least one.
        plan: how to train.
        limit: bytes that may be taken; None for what is free.
        held: tensors beside the model's that are there anyway, such as the adapters' factors.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    longest = max(examples, key=lambda example: len(example.prompt) + len(example.answer))
    shared = 0 if plan.checkpointing else shared_length([e.prompt for e in examples])
    there = {t.untyped_storage().data_ptr() for t in (*base.model.parameters(), *trained, *held)}
    one, two = (_kept(base, there, [longest] * rows, shared) for rows in (1, 2))
    a_row, fixed = two - one, max(0, 2 * one - two)
    if plan.checkpointing:
        fixed, a_row = 0, _checkpointed(base, a_row, len(longest.prompt) + len(longest.answer))
    numbers = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    # The gradients of the logits, in float32 and in the model's dtype.
    a_row += len(longest.answer) * base.model.config.get_text_config().vocab_size * 8
    return Budget(
        COPIES * numbers, fixed, a_row, free_memory(base.compute.device) if limit is None else limit
    )


def estimate_search(
    base: BaseModel, examples: Sequence[Example], limit: int | None = None
) -> Budget:
    """The budget of passes without gradients: what one layer holds at a time, the keys and values
    of what the rows begin with, and the logits.

    Args:
        base: the model.
        examples: the rows, at least one.
        limit: bytes that may be taken; None for what is free.
    """
    config = base.model.config.get_text_config()
    longest = max(len(example.prompt) + len(example.answer) for example in examples)
    widest = max(out for path, (out, _) in base.shapes.items() if path != "lm_head")
    # The gated MLP's three widest, and about as many of the hidden size around them.
    layer = longest * (3 * widest + 4 * config.hidden_size) * base.dtype.itemsize
    kept = longest * config.num_hidden_layers * 2 * config.hidden_size * base.dtype.itemsize
    answer = max(len(example.answer) for example in examples)
    logits = answer * config.vocab_size * (base.dtype.itemsize + 8)
    free = free_memory(base.compute.device) if limit is None else limit
    return Budget(trained=0, fixed=0, a_row=layer + kept + logits, free=free)


def _kept(base: BaseModel, known: set[int], rows: Sequence[Example], shared: int) -> int:
    """Bytes that a forward pass keeps for the backward one, apart from those at known addresses."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = collate(base, rows, shared)
    with (
        attention_with_gradients(base, batch.attention.shape[1]),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        # Held until the count is done: an address that is free again would be counted once.
        loss = answer_loss(base, batch)
    del loss
    return sum(kept.values())


def _checkpointed(base: BaseModel, a_row: int, tokens: int) -> int:
    """The same where each layer keeps what enters it, and one layer at a time all of it."""
    config = base.model.config.get_text_config()
    layers: int = config.num_hidden_layers
    entering = tokens * config.hidden_size * base.dtype.itemsize
    kept: int = layers * entering + a_row // layers
    return kept


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """What tensors hold, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken on a device: what the system, and a container around it, has left."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + unused
    left = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        used = int((CGROUP / "memory.current").read_text())
        left = min(left, int((CGROUP / "memory.max").read_text()) - used)
    return max(0, left)


def check_room(needed: int, device: torch.device, limit: int | None, what: str) -> None:
    """Checks that something fits before it is loaded.

    Raises:
        RecycleError: it does not.
    """
    free = free_memory(device) if limit is None else limit
    if needed > free:
        raise RecycleError(
            f"{what} take {in_words(needed)}, and {in_words(free)} may be taken",
            "use fewer of them, or another machine",
        )


def in_words(count: int) -> str:
    """Bytes as people read them."""
    value = float(count)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} GB" if value < 1000 else f"{value:,.0f} GB"
