"""The mixture: adapters with learned coefficients.

y = W x + sum_i f(c_mi) s_i B_mi A_mi x for every linear module m (arXiv 2602.12323, section 3).
The base stays frozen, and so do the adapters, unless the recipe says otherwise; the result is
exactly one LoRA whose rank is the sum of the adapters' ranks.

Three published methods are this with other settings: AdaMerging (arXiv 2310.02575) with labels,
pi-tuning (arXiv 2304.14381), which trains the adapters' factors too, and LoraHub (arXiv
2307.13269), which searches without gradients. SD-LoRA is in `tuning.sd_lora`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from recycle_cli.engine.adapted import Forward, Gate, ModuleComponents, concatenate, fold, shapes_of
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.products import (
    Form,
    Reuse,
    choose_forms,
    frozen_product,
    on_device,
    trained_product,
)
from recycle_cli.lora.draws import generator_for
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.parameters import Value
from recycle_cli.tuning.layout import ACTIVATIONS, INITS, MODULE, Layout, Start, lay_out
from recycle_cli.tuning.tuned import Ingredients, Share, Tuned

Factors = Literal["frozen", "new", "all"]
NEW_SPREAD = 0.01


@dataclass(frozen=True)
class MixtureRecipe:
    """The form of a mixture.

    Args:
        activation: f, a key of `ACTIVATIONS`.
        init: where the coefficients start, a key of `INITS`. With "zero" (and an f that keeps
            zero) the model starts as the base model.
        granularity: what shares a coefficient, one of `GRANULARITIES`.
        affine: follow f by a f(c) + b with learned a and b for each group, from 1 and 0; for the
            activations in `AFFINE`.
        l1: the weight of mean |c| in the loss.
        factors: what is trained beside the coefficients: no factors (`frozen`), those of the last
            adapter (`new`), or those of all.
    """

    activation: str = "leaky-relu"
    init: str = "zero"
    granularity: str = MODULE
    affine: bool = False
    l1: float = 0.0
    factors: Factors = "frozen"


class Mixture(Tuned):
    """The coefficients of several adapters.

    Attributes:
        layout: which component takes which coefficient.
        coefficients: for each group of the layout (width,) float32, before the activation; entries
            that are not present are never used.
        slopes: for each group (1,) float32, a of the affine form; empty without it.
        offsets: for each group (1,) float32, b of the affine form; empty without it.
        components: the frozen components, by module path.
        lora_A: the trained components (components, in) float32, by module path with / for dots.
        lora_B: (out, components), likewise.
    """

    def __init__(
        self,
        updates: Sequence[ModelUpdate],
        recipe: MixtureRecipe,
        device: torch.device,
        target: int | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe
        self.adapters = len(updates)
        frozen, trained = _divide(updates, recipe.factors, dtype)
        self.components = frozen
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for path, piece in trained.items():
            self.lora_A[parameter_name(path)] = nn.Parameter(piece.A.float().to(device))
            self.lora_B[parameter_name(path)] = nn.Parameter(piece.B.float().to(device))
        self.owners = {
            path: torch.cat([part[path].owner for part in (frozen, trained) if path in part])
            for path in sorted({*frozen, *trained})
        }
        self.layout: Layout = lay_out(self.owners, self.adapters, recipe.granularity)
        owner = _owners(self.layout, self.owners)
        start = INITS[recipe.init](Start(owner, self.adapters, target, seed))
        if recipe.factors == "new":
            # Its B is zero, so with a coefficient of zero neither would ever move.
            start = torch.where((owner == self.adapters - 1) & (start == 0), 1.0, start)
        self.coefficients = _parameters(start.to(device))
        ones = torch.ones(len(start) if recipe.affine else 0, 1, device=device)
        self.slopes, self.offsets = _parameters(ones), _parameters(torch.zeros_like(ones))
        self._reuse = Reuse()
        self._present = self.layout.present.to(device)
        self._columns = {path: taken.to(device) for path, taken in self.layout.column.items()}

    def public_name(self, name: str) -> str:
        """See `Tuned`: coefficients, slopes and offsets go by the name of their group."""
        kind, _, which = name.partition(".")
        if kind in ("lora_A", "lora_B"):
            return super().public_name(name)
        return f"{kind}.{self.layout.groups[int(which)]}"

    def row(self, number: int) -> Tensor:
        """f(c) of a group, or a f(c) + b, (width,)."""
        activation = ACTIVATIONS[self.recipe.activation]
        activated = activation(self.coefficients[number], self._present[number])
        if self.recipe.affine:
            activated = self.slopes[number] * activated + self.offsets[number]
        return activated

    def gates(self) -> dict[str, Gate]:
        """For each module path, the function that gives one number for each rank-1 component:
        the frozen ones, then the trained ones."""
        return {path: self._gate(path) for path in self.owners}

    @property
    def reuse(self) -> Reuse:
        """See `Tuned`."""
        return self._reuse

    def held(self) -> list[Tensor]:
        """See `Tuned`."""
        factors = [t for piece in self.components.values() for t in (piece.A, piece.B)]
        return [*super().held(), *factors]

    def told(self, base: BaseModel, tokens: float) -> str:
        """See `Tuned`."""
        forms = list(choose_forms(self.components, tokens, base.dtype).values())
        return ", ".join(f"{forms.count(form)} modules {form}" for form in sorted(set(forms)))

    def forwards(self, base: BaseModel, tokens: float) -> Mapping[str, Forward]:
        """See `Tuned`."""
        components = on_device(self.components, base)
        forms = choose_forms(components, tokens, base.dtype)
        return {path: self._forward(path, components.get(path), forms) for path in self.owners}

    def _forward(
        self, path: str, piece: ModuleComponents | None, forms: Mapping[str, Form]
    ) -> Forward:
        gate, key = self._gate(path), parameter_name(path)
        if piece is None:
            return trained_product(self.lora_A[key], self.lora_B[key], gate)
        if key not in self.lora_A:
            return frozen_product(piece, gate, forms[path], self._reuse)
        count = len(piece.owner)
        whole = frozen_product(piece, lambda: gate()[:count], forms[path])
        return trained_product(self.lora_A[key], self.lora_B[key], lambda: gate()[count:], whole)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """See `Tuned`."""
        trained = {
            path: (self.lora_B[key].shape[0], self.lora_A[key].shape[1])
            for path in self.owners
            if (key := parameter_name(path)) in self.lora_A
        }
        return {**shapes_of(self.components), **trained}

    def activated(self) -> Tensor:
        """The number before the components of each adapter, (modules, adapters), as a mean where
        they have several; zero where an adapter lacks the module. Rows are in the order of
        `owners`."""
        means = torch.zeros(len(self.owners), self.adapters)
        for mean, (path, owner) in zip(means, self.owners.items(), strict=True):
            counts = torch.bincount(owner, minlength=self.adapters).clamp(min=1)
            gate = self._gate(path)().detach().float().cpu()
            mean.index_add_(0, owner, gate).div_(counts)
        return means

    def by_module(self) -> Mapping[str, Tensor]:
        """See `Tuned`."""
        return dict(zip(self.owners, self.activated(), strict=True))

    def shares(self) -> list[Share]:
        """See `Tuned`."""
        there = [torch.bincount(o, minlength=self.adapters) > 0 for o in self.owners.values()]
        pairs = zip(self.activated().T, torch.stack(there).T, strict=True)
        own = [numbers[modules] for numbers, modules in pairs]
        return [Share(float(numbers.mean()), float(numbers.abs().max())) for numbers in own]

    def penalty(self) -> Tensor | None:
        """l1 times the mean of |c| over the coefficients in use."""
        if not self.recipe.l1:
            return None
        rows = zip(self.coefficients, self._present, strict=True)
        total = torch.stack([row[there].abs().sum() for row, there in rows]).sum()
        return self.recipe.l1 * total / self.layout.count

    def searched(self) -> list[tuple[nn.Parameter, Tensor]]:
        """See `Tuned`."""
        return list(zip(self.coefficients, self._present, strict=True))

    def result(self) -> ModelUpdate:
        """See `Tuned`."""
        return self.folded()

    def folded(self) -> ModelUpdate:
        """The one LoRA that equals the mixture as it stands."""
        return fold(self._all_components(), self.gates())

    def _all_components(self) -> dict[str, ModuleComponents]:
        """Frozen and trained components side by side."""
        if not len(self.lora_A):
            return self.components
        found = {}
        for path, owner in self.owners.items():
            key, pieces = parameter_name(path), []
            if path in self.components:
                pieces.append((self.components[path].A, self.components[path].B))
            if key in self.lora_A:
                pieces.append((self.lora_A[key].detach().cpu(), self.lora_B[key].detach().cpu()))
            a = torch.cat([a.float() for a, _ in pieces])
            b = torch.cat([b.float() for _, b in pieces], dim=1)
            found[path] = ModuleComponents(a, b, owner)
        return found

    def _gate(self, path: str) -> Gate:
        row, columns = self.layout.row[path], self._columns[path]
        return lambda: self.row(row)[columns]


def _divide(
    updates: Sequence[ModelUpdate], factors: Factors, dtype: torch.dtype | None
) -> tuple[dict[str, ModuleComponents], dict[str, ModuleComponents]]:
    """The components that stay frozen, in `dtype`, and those that are trained."""
    if factors == "frozen":
        return concatenate(updates, dtype), {}
    if factors == "all":
        return {}, concatenate(updates)
    last = len(updates) - 1
    new = {
        path: ModuleComponents(piece.A, piece.B, torch.full_like(piece.owner, last))
        for path, piece in concatenate(updates[last:]).items()
    }
    return concatenate(updates[:last], dtype), new


def parameter_name(path: str) -> str:
    """What a module path is called among parameters, whose names hold no dots."""
    return path.replace(".", "/")


def _parameters(rows: Tensor) -> nn.ParameterList:
    """One parameter for each row, so that a module's gradient touches its own row alone."""
    return nn.ParameterList(nn.Parameter(row.clone()) for row in rows)


def _owners(layout: Layout, owners: Mapping[str, Tensor]) -> Tensor:
    """The adapter of each coefficient, (groups, width); 0 where none takes it."""
    found = torch.zeros(layout.present.shape, dtype=torch.int64)
    for path, columns in layout.column.items():
        found[layout.row[path], columns] = owners[path]
    return found


def build(ingredients: Ingredients, *, factors: Factors = "frozen", **settings: Value) -> Mixture:
    """A mixture by the settings of a method in the catalog.

    Args:
        ingredients: the adapters.
        factors: as in `MixtureRecipe`.
        settings: the rest of `MixtureRecipe`; and `new_rank`: where it is a number, a new LoRA of
            that rank joins the adapters, in every module that one of them has, with
            A ~ N(0, 0.01^2) and B = 0.
    """
    given = ingredients
    updates = list(given.updates)
    new_rank = settings.pop("new_rank", None)
    if isinstance(new_rank, int):
        updates.append(new_lora(given, new_rank, _small))
    recipe = MixtureRecipe(factors=factors, **settings)  # type: ignore[arg-type]  # checked before
    return Mixture(updates, recipe, given.device, given.target, given.seed, given.dtype)


Draw = Callable[[tuple[int, int], torch.Generator], Tensor]


def new_lora(ingredients: Ingredients, rank: int, draw: Draw) -> ModelUpdate:
    """A LoRA in every module that some adapter has, which starts as the zero update.

    Args:
        ingredients: the adapters, and the seed.
        rank: its rank.
        draw: gives A, (rank, in).
    """
    shapes: dict[str, tuple[int, int]] = {}
    for update in ingredients.updates:
        for module in update:
            if module not in shapes:
                shapes[module] = update[module].shape
    return {
        module: LowRankUpdate(
            draw((rank, shape[1]), generator_for("new", ingredients.seed, module)),
            torch.zeros(shape[0], rank),
            1.0,
        )
        for module, shape in sorted(shapes.items())
    }


def _small(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return NEW_SPREAD * torch.randn(shape, generator=generator)
