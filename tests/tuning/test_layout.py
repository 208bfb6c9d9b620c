import itertools
import math

import pytest
import torch
from support.plain import DOWN, HEAD, Q0, Q1, DenseModel, logits, mixed_updates
from support.plain import dense as dense_update
from torch import Tensor

from recycle_cli.engine.adapted import concatenate, with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.products import attached
from recycle_cli.tuning.choices import ACTIVATIONS, AFFINE, GRANULARITIES, INITS, LR_SCHEDULES
from recycle_cli.tuning.layout import ACTIVATIONS as FUNCTIONS
from recycle_cli.tuning.layout import INITS as STARTS
from recycle_cli.tuning.layout import group_of, lay_out
from recycle_cli.tuning.mixture import Mixture, MixtureRecipe

CPU = torch.device("cpu")
TOKENS = list(range(3, 43))
# Adapters by module, as in `mixed_updates`: ranks 3 1 2 | 5 4 | 2 7.
SPANS = {DOWN: [(0, 1), (2, 7)], HEAD: [(0, 2)], Q0: [(0, 3), (1, 5)], Q1: [(1, 4), (2, 2)]}


def mixture_of(base: BaseModel, recipe: MixtureRecipe, target: int | None = None) -> Mixture:
    return Mixture(mixed_updates(base), recipe, CPU, target, seed=3)


def randomised(base: BaseModel, recipe: MixtureRecipe) -> Mixture:
    mixture = mixture_of(base, recipe)
    generator = torch.Generator().manual_seed(1)
    for row in mixture.parameters():
        row.data.copy_(torch.randn(row.shape, generator=generator))
    return mixture


def test_the_words_are_those_that_mean_something() -> None:
    assert set(ACTIVATIONS) == set(FUNCTIONS)
    assert set(INITS) == set(STARTS)
    assert set(AFFINE) <= set(ACTIVATIONS)
    assert "cosine" in LR_SCHEDULES


@pytest.mark.parametrize(
    ("granularity", "groups", "count"),
    [
        # Layer 0: q of adapters 0, 1. Layer 1: q of 1, 2, down of 0, 2. The head: 0.
        ("adapter", ["model"], 3),
        ("layer", ["lm_head", "model.layers.0", "model.layers.1"], 1 + 2 + 3),
        (
            "sublayer",
            ["lm_head", "model.layers.0.self_attn", "model.layers.1.mlp",
             "model.layers.1.self_attn"],
            1 + 2 + 2 + 2,
        ),
        ("module", [HEAD, Q0, DOWN, Q1], 1 + 2 + 2 + 2),
        ("dimension", [HEAD, Q0, DOWN, Q1], 2 + 8 + 8 + 6),
    ],
)  # fmt: skip
def test_a_granularity_ties_the_right_coefficients(
    pico_base: BaseModel, granularity: str, groups: list[str], count: int
) -> None:
    layout = lay_out(
        {path: piece.owner for path, piece in concatenate(mixed_updates(pico_base)).items()},
        3,
        granularity,
    )
    assert list(layout.groups) == groups
    assert layout.count == count


@pytest.mark.parametrize(
    ("path", "layer", "sublayer"),
    [
        ("model.layers.7.mlp.up_proj", "model.layers.7", "model.layers.7.mlp"),
        ("transformer.h.11.attn.c_attn", "transformer.h.11", "transformer.h.11.attn"),
        ("model.layers.2.experts.5.w1", "model.layers.2", "model.layers.2.experts"),
        ("lm_head", "lm_head", "lm_head"),
    ],
)
def test_the_group_of_a_module(path: str, layer: str, sublayer: str) -> None:
    assert group_of(path, "adapter") == "model"
    assert group_of(path, "layer") == layer
    assert group_of(path, "sublayer") == sublayer
    assert group_of(path, "module") == group_of(path, "dimension") == path


def by_hand(activation: str, row: list[float], slope: float, offset: float) -> list[float]:
    """f of the coefficients that are there."""
    scale = sum(map(math.exp, row))
    functions = {
        "linear": lambda c: c,
        "leaky-relu": lambda c: c if c > 0 else 0.01 * c,
        "squared": lambda c: c * c,
        "sigmoid": lambda c: 1 / (1 + math.exp(-c)),
        "softmax": lambda c: math.exp(c) / scale,
    }
    return [slope * functions[activation](c) + offset for c in row]


CASES = [
    MixtureRecipe(activation, "zero", granularity, affine)
    for activation, granularity, affine in itertools.product(
        ACTIVATIONS, GRANULARITIES, (False, True)
    )
    if not affine or activation in AFFINE
]


def expected_deltas(base: BaseModel, mixture: Mixture) -> dict[str, Tensor]:
    """sum over components of f(c) times their rank-1 matrix, one at a time."""
    recipe, updates = mixture.recipe, mixed_updates(base)
    deltas = {}
    for path, spans in SPANS.items():
        group = mixture.layout.groups.index(group_of(path, recipe.granularity))
        row = mixture.coefficients[group].tolist()
        there = mixture.layout.present[group].tolist()
        slope = mixture.slopes[group].item() if recipe.affine else 1.0
        offset = mixture.offsets[group].item() if recipe.affine else 0.0
        values = iter(
            by_hand(
                recipe.activation,
                [c for c, used in zip(row, there, strict=True) if used],
                slope,
                offset,
            )
        )
        table = [next(values) if used else math.nan for used in there]
        delta, seen = torch.zeros(base.shapes[path]), 0
        for adapter, rank in spans:
            piece = updates[adapter][path]
            assert piece.rank == rank
            for at in range(rank):
                value = table[seen + at if recipe.granularity == "dimension" else adapter]
                delta += value * piece.scale * torch.outer(piece.B[:, at], piece.A[at])
            seen += rank
        deltas[path] = delta
    return deltas


@pytest.mark.parametrize("recipe", CASES, ids=str)
def test_every_axis_is_the_sum_of_its_components(
    pico_base: BaseModel, recipe: MixtureRecipe
) -> None:
    mixture = randomised(pico_base, recipe)
    with torch.no_grad():
        expected = logits(DenseModel(pico_base, expected_deltas(pico_base, mixture)), TOKENS)
        with attached(pico_base, mixture.components, mixture.gates()):
            found = logits(pico_base.model, TOKENS)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        with with_adapter(pico_base, mixture.folded()):
            torch.testing.assert_close(logits(pico_base.model, TOKENS), found, rtol=0, atol=5e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_softmax_sums_to_one_over_the_adapters_that_are_there(
    pico_base: BaseModel, granularity: str
) -> None:
    mixture = randomised(pico_base, MixtureRecipe("softmax", granularity=granularity))
    for number in range(len(mixture.layout.groups)):
        row = mixture.row(number)
        assert float(row.detach().sum()) == pytest.approx(1, abs=1e-6)
        assert not row[~mixture.layout.present[number]].any()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_where_coefficients_start(pico_base: BaseModel, granularity: str) -> None:
    def start(init: str, target: int | None = None) -> Tensor:
        recipe = MixtureRecipe("linear", init, granularity)
        mixture = mixture_of(pico_base, recipe, target)
        rows = zip(mixture.coefficients, mixture.layout.present, strict=True)
        return torch.cat([row.detach()[there] for row, there in rows])

    assert not start("zero").any()
    assert (start("one") == 1).all()
    torch.testing.assert_close(start("equal"), torch.full_like(start("equal"), 3**-0.5))
    assert 0 <= float(start("uniform").min()) <= float(start("uniform").max()) <= 1
    assert torch.equal(start("normal"), start("normal"))
    # As the target alone, at a coefficient of 1.
    mixture = mixture_of(pico_base, MixtureRecipe("linear", "one-hot", granularity), 1)
    target = mixed_updates(pico_base)[1]
    for path, piece in mixture.folded().items():
        torch.testing.assert_close(dense_update(piece), dense_update(target[path]))
    assert set(mixture.folded()) == set(target)


def test_normal_and_uniform_have_the_spread_they_promise(pico_base: BaseModel) -> None:
    wide = [mixed_updates(pico_base)[0]] * 4000
    for init, mean, spread in (("normal", 0.0, 0.5), ("uniform", 0.5, 12**-0.5)):
        recipe = MixtureRecipe("linear", init, "adapter")
        values = Mixture(wide, recipe, CPU).coefficients[0].detach()
        assert float(values.mean()) == pytest.approx(mean, abs=0.04)
        assert float(values.std()) == pytest.approx(spread, abs=0.03)


def test_the_penalty_is_the_mean_size_of_the_coefficients_in_use(pico_base: BaseModel) -> None:
    mixture = randomised(pico_base, MixtureRecipe("linear", l1=0.3))
    rows = zip(mixture.coefficients, mixture.layout.present, strict=True)
    used = torch.cat([row[there] for row, there in rows])
    torch.testing.assert_close(mixture.penalty(), 0.3 * used.abs().mean())
