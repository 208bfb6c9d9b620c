"""ResLoRA (arXiv 2402.18039): shortcuts between the LoRAs of modules of the same kind.

All q projections form a chain in the order of their layers, all v projections another, and so on.
A module n reaches back to the p modules before it in its chain, as far as their shapes are its own:

- `res-bs`, shortcuts of blocks: y_n = W_n x_n + sum_{k=n-p..n} s_k B_k A_k x_n.
- `res-ms`, of the middle: y_n = W_n x_n + s_n B_n (A_n x_n + sum_{k=n-p..n-1} A_k x_k).
- `res-is`, of inputs: y_n = W_n x_n + s_n B_n A_n (x_n + x_{n-1}), with x_{-1} = x_0.

The first is one LoRA of rank (p + 1) r in each module, exactly. The others reach inputs that a
single module does not see, so their results put a_k x_n in the place of x_k, with a_k the ratio of
the sizes of x_k and x_n over the last `WINDOW` passes of training ("based on input"): A*_n = A_n +
sum_k a_k A_k of the middle's, (1 + a) s_n of the inputs', both of rank r.
"""

import abc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.errors import InputError
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

WINDOW = 100


def blocks(setup: Setup, within: Former, *, previous: int) -> AbstractContextManager[LoraForm]:
    """`res-bs` in the place of the ordinary LoRA: see `lora_form`."""
    seed = setup.plan.seed
    return of_tuned(setup, BlockShortcuts(setup.base, setup.recipe, seed=seed, reach=previous))


def middle(setup: Setup, within: Former, *, previous: int) -> AbstractContextManager[LoraForm]:
    """`res-ms`, likewise.

    Raises:
        InputError: layers would be run again one by one.
    """
    _check_runs_once(setup)
    seed = setup.plan.seed
    return of_tuned(setup, MiddleShortcuts(setup.base, setup.recipe, seed=seed, reach=previous))


def inputs(setup: Setup, within: Former) -> AbstractContextManager[LoraForm]:
    """`res-is`, likewise.

    Raises:
        InputError: layers would be run again one by one.
    """
    _check_runs_once(setup)
    return of_tuned(setup, InputShortcuts(setup.base, setup.recipe, seed=setup.plan.seed))


def _check_runs_once(setup: Setup) -> None:
    if setup.plan.checkpointing:
        raise InputError(
            "shortcuts between layers need all of a pass at once, and --gradient-checkpointing "
            "runs its layers again one by one",
            "leave it out, or use --architecture res-bs",
        )


def kind_of(path: str) -> str:
    """What modules of the same kind have in common: the path without the number of the layer."""
    parts = path.split(".")
    at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return path if at is None else ".".join([*parts[:at], "*", *parts[at + 1 :]])


def linked(targets: Mapping[str, Target], reach: int) -> dict[str, list[str]]:
    """The modules that each one reaches back to, oldest first.

    Args:
        targets: by path, in the order of the model.
        reach: how many at most.
    """
    chains: dict[str, list[str]] = {}
    found = {}
    for path, target in targets.items():
        chain = chains.setdefault(kind_of(path), [])
        if chain and not _fit(targets[chain[-1]], target):
            chain.clear()
        found[path] = chain[max(0, len(chain) - reach) :]
        chain.append(path)
    return found


def _fit(one: Target, other: Target) -> bool:
    return one.shape == other.shape and one.rank == other.rank


class ResLora(FreshLora, abc.ABC):
    """A LoRA in each module, with shortcuts.

    Attributes:
        lora_A: (rank, in) float32 by module.
        lora_B: (out, rank) likewise.
        links: the modules that each one reaches back to, oldest first.
    """

    def __init__(self, base: BaseModel, recipe: LoraRecipe, *, seed: int, reach: int) -> None:
        super().__init__(base, recipe)
        sizes = self.targets.items()
        a_shapes = [(path, (target.rank, target.shape[1])) for path, target in sizes]
        b_shapes = [(path, (target.shape[0], target.rank)) for path, target in sizes]
        self.lora_A = factors(a_shapes, kaiming, self.device, "lora", seed)
        self.lora_B = factors(b_shapes, zeros, self.device)
        self.links = linked(self.targets, reach)

    def pair(self, path: str) -> tuple[Tensor, Tensor]:
        """A (rank, in) and s B (out, rank) of a module's own LoRA."""
        name = parameter_name(path)
        return self.lora_A[name], self.lora_B[name] * self.targets[path].scale

    def result(self) -> ModelUpdate:
        """See `Tuned`."""
        with torch.no_grad():
            merged = {path: self.merged(path) for path in self.targets}
        return {path: LowRankUpdate(a.cpu(), b.cpu(), 1.0) for path, (a, b) in merged.items()}

    @abc.abstractmethod
    def merged(self, path: str) -> tuple[Tensor, Tensor]:
        """A and B of the LoRA that stands for the module in the result, scale included."""


class BlockShortcuts(ResLora):
    """`res-bs`."""

    def added(self, path: str, x: Tensor) -> Tensor:
        """See `FreshLora`."""
        return low_rank(self.dropped(x), *self.merged(path))

    def merged(self, path: str) -> tuple[Tensor, Tensor]:
        """See `ResLora`; exact, of rank (p + 1) r."""
        pairs = [self.pair(one) for one in (*self.links[path], path)]
        return torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)


class Sizes:
    """The mean Frobenius norms of inputs over the last passes of training.

    Attributes:
        norms: (modules, WINDOW) float32, a ring.
        passes: (modules,) int64, how many were noted in all.
    """

    def __init__(self, paths: Sequence[str], device: torch.device) -> None:
        self.rows = {path: row for row, path in enumerate(paths)}
        self.norms = torch.zeros(len(paths), WINDOW, device=device)
        self.passes = torch.zeros(len(paths), dtype=torch.int64, device=device)

    def note(self, path: str, size: Tensor) -> None:
        """Takes the size of one more input, ()."""
        row = self.rows[path]
        self.norms[row, self.passes[row] % WINDOW] = size
        self.passes[row] += 1

    def ratio(self, path: str, other: str) -> Tensor:
        """The mean size of one module's inputs in that of another's; 1 where none were noted."""
        one, two = (self._mean(name) for name in (path, other))
        return torch.where((one > 0) & (two > 0), one / two, 1.0)

    def _mean(self, path: str) -> Tensor:
        row = self.rows[path]
        return self.norms[row].sum() / self.passes[row].clamp(min=1, max=WINDOW)


class _AcrossLayers(ResLora, abc.ABC):
    """Shortcuts that bring something of a pass from one layer to the next.

    Attributes:
        sizes: of the inputs, for the result.
    """

    def __init__(self, base: BaseModel, recipe: LoraRecipe, *, seed: int, reach: int) -> None:
        super().__init__(base, recipe, seed=seed, reach=reach)
        self.sizes = Sizes(list(self.targets), self.device)
        self._carried: dict[str, Tensor] = {}
        self._seen: list[tuple[str, Tensor]] = []

    def kept(self) -> dict[str, Tensor]:
        """See `Tuned`."""
        return {"norms": self.sizes.norms, "passes": self.sizes.passes}

    def added(self, path: str, x: Tensor) -> Tensor:
        """See `FreshLora`."""
        if self.training:
            self._seen.append((path, x.detach().float().norm()))
        # Layers come in order in every pass, so what is carried is of the same rows.
        carried = [self._carried[one] for one in self.links[path]]
        added, self._carried[path] = self.combined(path, x, carried)
        return added

    def train(self, mode: bool = True) -> "_AcrossLayers":
        """Forgets passes that no step came of, and lets go of the last one's graph."""
        self._carried.clear()
        self._seen.clear()
        super().train(mode)
        return self

    def after_step(self) -> None:
        """Notes the sizes of the step's inputs."""
        for path, size in self._seen:
            self.sizes.note(path, size)
        self._seen.clear()

    @abc.abstractmethod
    def combined(self, path: str, x: Tensor, carried: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What is added to the output of a module with input x, and what it carries on, given what
        those before it did."""

    def finish(self) -> dict[str, float]:
        """Tells the mean of the ratios that the result puts in the place of what was carried."""
        ratios = [self.sizes.ratio(k, n) for n, links in self.links.items() for k in links]
        return {"mean_input_ratio": float(torch.stack(ratios).mean())} if ratios else {}


class MiddleShortcuts(_AcrossLayers):
    """`res-ms`."""

    def combined(self, path: str, x: Tensor, carried: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See `_AcrossLayers`: A_n x_n is carried on."""
        a, b = self.pair(path)
        own = self.dropped(x).to(a.dtype) @ a.T
        return sum(carried, start=own) @ b.T, own

    def merged(self, path: str) -> tuple[Tensor, Tensor]:
        """See `ResLora`: A*_n."""
        a, b = self.pair(path)
        before = [self.sizes.ratio(one, path) * self.pair(one)[0] for one in self.links[path]]
        return sum(before, start=a), b


class InputShortcuts(_AcrossLayers):
    """`res-is`."""

    def __init__(self, base: BaseModel, recipe: LoraRecipe, *, seed: int) -> None:
        super().__init__(base, recipe, seed=seed, reach=1)

    def combined(self, path: str, x: Tensor, carried: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """See `_AcrossLayers`: x_n is carried on."""
        (before,) = carried or (x,)
        return low_rank(self.dropped(x + before), *self.pair(path)), x

    def merged(self, path: str) -> tuple[Tensor, Tensor]:
        """See `ResLora`: (1 + a) s_n B_n."""
        a, b = self.pair(path)
        ratios = [self.sizes.ratio(one, path) for one in self.links[path]]
        return a, b * (1 + ratios[0] if ratios else 2)
