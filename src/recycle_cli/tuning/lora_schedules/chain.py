"""RAC-LoRA (arXiv 2410.08305) and COLA (arXiv 2401.04151): a chain of LoRAs, trained one after
another, each on top of the sum of those before.

dW = sum_t s B_t A_t. The steps are cut into blocks. In COLA a block trains a LoRA that starts as
usual, A drawn and B zero. In RAC-LoRA a coin decides for each block which of the two factors is
drawn and stays as it is, a random sketch; the other one starts at zero and is trained. A step of
gradient descent then projects the gradient on a random subspace, and the chain converges to where
full training would, while a single such LoRA stalls.

Every block has parameters of its own, so that the optimizer's moments begin anew with it, and
those that came before are out of its reach. The result is one LoRA of rank T r, exactly, or of the
module's smaller side where that is less.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.budget import COPIES, tensor_bytes
from recycle_cli.lora.draws import generator_for
from recycle_cli.lora.truncation import parse_rank_policy, truncate_module
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.tuning.lora_architectures.fresh import (
    FreshLora,
    Target,
    factors,
    kaiming,
    low_rank,
    zeros,
)
from recycle_cli.tuning.lora_form import Former, LoraForm, Setup, of_tuned
from recycle_cli.tuning.mixture import parameter_name
from recycle_cli.tuning.target_lora import LoraRecipe


def rac(setup: Setup, within: Former, *, blocks: int) -> AbstractContextManager[LoraForm]:
    """RAC-LoRA in the place of a single LoRA: see `lora_form`."""
    return _chain(setup, blocks, randomised=True)


def cola(setup: Setup, within: Former, *, blocks: int) -> AbstractContextManager[LoraForm]:
    """COLA, likewise."""
    return _chain(setup, blocks, randomised=False)


@contextlib.contextmanager
def _chain(setup: Setup, blocks: int, randomised: bool) -> Iterator[LoraForm]:
    steps, seed = setup.plan.steps, setup.plan.seed
    made = Chain(
        setup.base, setup.recipe, steps=steps, seed=seed, randomised=randomised, blocks=blocks
    )
    # The best state and the optimizer keep those that are done as well.
    later = (COPIES - 1) * tensor_bytes(made.blocks[1:].parameters())
    with of_tuned(setup, made) as form:
        yield replace(form, later=later)


class Block(nn.Module):
    """A LoRA of the chain: its factors by module, and which of them it trains ("A", "B", "AB")."""

    def __init__(
        self, targets: dict[str, Target], trains: str, device: torch.device, *key: object
    ) -> None:
        super().__init__()
        self.trains = trains
        of_a = [(path, (t.rank, t.shape[1])) for path, t in targets.items()]
        of_b = [(path, (t.shape[0], t.rank)) for path, t in targets.items()]
        self.lora_A = factors(of_a, zeros if trains == "A" else kaiming, device, *key, "A")
        self.lora_B = factors(of_b, _sketch if trains == "A" else zeros, device, *key, "B")

    def let_train(self, on: bool) -> None:
        """Lets gradients reach what it trains, or nothing."""
        self.lora_A.requires_grad_(on and "A" in self.trains)
        self.lora_B.requires_grad_(on and "B" in self.trains)

    def started(self) -> bool:
        """Whether its product is anything but zero."""
        started = self.lora_A if self.trains == "A" else self.lora_B
        return any(bool(factor.any()) for factor in started.values())


def _sketch(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """B of a left sketch, (out, rank): as large as A of a right one, along its own long side."""
    return kaiming((shape[1], shape[0]), generator).T.contiguous()


class Chain(FreshLora):
    """The LoRAs of all blocks.

    Attributes:
        blocks: in their order; those still to come are zero products.
        steps_done: () int64.
    """

    steps_done: Tensor

    def __init__(
        self,
        base: BaseModel,
        recipe: LoraRecipe,
        *,
        steps: int,
        seed: int,
        randomised: bool,
        blocks: int,
    ) -> None:
        super().__init__(base, recipe)
        self._steps = max(1, steps)
        count = min(blocks, self._steps)
        self._blocks = [
            Block(
                self.targets,
                _coin(seed, number) if randomised else "AB",
                self.device,
                *("chain", seed, number),
            )
            for number in range(count)
        ]
        self.blocks = nn.ModuleList(self._blocks)
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))
        self.eval()

    @property
    def current(self) -> int:
        """The number of the block that the next step trains, or the last one: block k begins after
        steps * k / blocks steps, rounded down."""
        count = len(self._blocks)
        begun = ((int(self.steps_done) + 1) * count - 1) // self._steps
        return min(begun, count - 1)

    def train(self, mode: bool = True) -> "Chain":
        """Lets gradients reach the current block alone."""
        for number, block in enumerate(self._blocks):
            block.let_train(number == self.current)
        return super().train(mode)

    def after_step(self) -> None:
        """Goes on to the next block where this one has had its steps."""
        self.steps_done += 1

    def added(self, path: str, x: Tensor) -> Tensor:
        """See `FreshLora`: blocks that are done count as part of the weight, without dropout."""
        current = self.current
        added = low_rank(self.dropped(x), *self._pair(path, self._blocks[current : current + 1]))
        if current:
            added = added + low_rank(x, *self._pair(path, self._blocks[:current]))
        return added

    def _pair(self, path: str, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        """A and s B of some blocks, side by side."""
        name, scale = parameter_name(path), self.targets[path].scale
        a = torch.cat([block.lora_A[name] for block in blocks])
        return a, torch.cat([block.lora_B[name] for block in blocks], dim=1) * scale

    @torch.no_grad()
    def result(self) -> ModelUpdate:
        """See `Tuned`."""
        started = [block for block in self._blocks if block.started()]
        update = {}
        for path in self.targets:
            a, b = self._pair(path, started or self._blocks[:1])
            update[path] = _reduced(LowRankUpdate(a.cpu(), b.cpu(), 1.0))
        return update

    def finish(self) -> dict[str, float]:
        """Tells how many blocks are in the result."""
        return {"blocks": float(sum(block.started() for block in self._blocks))}


def _reduced(piece: LowRankUpdate) -> LowRankUpdate:
    """The same update of no more rank than its smaller side has."""
    side = min(piece.shape)
    if piece.rank <= side:
        return piece
    return truncate_module(piece, parse_rank_policy(str(side))).update


def _coin(seed: int, number: int) -> str:
    """The factor that a block of RAC-LoRA trains."""
    side = int(torch.randint(2, (), generator=generator_for("coin", seed, number)))
    return "AB"[side]
