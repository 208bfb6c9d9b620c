import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from support import plain
from support.plain import (
    CLOSED_ROWS,
    Q0,
    DenseModel,
    logits,
    mixed_updates,
    weighted_sum,
)

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.forward import answer_loss, collate
from recycle_cli.engine.products import attached
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.lora.config import AdapterProblem
from recycle_cli.lora.folder import read_adapter, write_adapter
from recycle_cli.lora.update import LowRankUpdate
from recycle_cli.progress import Silent
from recycle_cli.settings import Settings
from recycle_cli.tuning.mixture import Mixture, MixtureRecipe
from recycle_cli.tuning.tuned import fit

PLAN = TrainingPlan(steps=12, lr=0.1, batch_size=3, eval_every=4)
STEP = 1e-2
TOKENS = list(range(3, 43))
CPU = torch.device("cpu")
RECIPES = [
    MixtureRecipe(*pair) for pair in itertools.product(["leaky-relu", "linear"], ["zero", "one"])
]
# Which of the three adapters has each module, in the order of the paths.
PRESENT = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]])


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS)


@pytest.fixture
def random_mixture(pico_base: BaseModel) -> Mixture:
    """Coefficients on both sides of zero."""
    mixture = Mixture(mixed_updates(pico_base), MixtureRecipe(), CPU)
    generator = torch.Generator().manual_seed(0)
    for row, drawn in zip(
        mixture.coefficients, torch.randn(4, 3, generator=generator), strict=True
    ):
        row.data.copy_(drawn)
    return mixture


def of_mixture(base: BaseModel, mixture: Mixture) -> torch.Tensor:
    with torch.no_grad(), attached(base, mixture.components, mixture.gates()):
        return logits(base.model, TOKENS)


def stacked(mixture: Mixture) -> torch.Tensor:
    """The coefficients, (groups, width)."""
    return torch.stack([row.detach() for row in mixture.coefficients])


@torch.no_grad()
def of_base(base: BaseModel) -> torch.Tensor:
    return logits(base.model, TOKENS)


@pytest.mark.parametrize("activation", ["leaky-relu", "linear"])
def test_from_zero_it_starts_as_the_base(pico_base: BaseModel, activation: str) -> None:
    mixture = Mixture(mixed_updates(pico_base), MixtureRecipe(activation, "zero"), CPU)
    assert torch.equal(of_mixture(pico_base, mixture), of_base(pico_base))


@pytest.mark.parametrize("activation", ["leaky-relu", "linear"])
def test_from_one_it_starts_as_the_adapter(pico_base: BaseModel, activation: str) -> None:
    update = mixed_updates(pico_base)[0]
    mixture = Mixture([update], MixtureRecipe(activation, "one"), CPU)
    with with_adapter(pico_base, update):
        expected = of_base(pico_base)
    torch.testing.assert_close(of_mixture(pico_base, mixture), expected, rtol=0, atol=2e-5)
    assert not torch.equal(expected, of_base(pico_base))


@pytest.mark.parametrize("activation", ["leaky-relu", "linear"])
def test_it_is_the_weighted_sum_of_the_adapters(
    pico_base: BaseModel, random_mixture: Mixture, activation: str
) -> None:
    random_mixture.recipe = MixtureRecipe(activation)
    c = stacked(random_mixture)
    weights = torch.where(c > 0, c, 0.01 * c) if activation == "leaky-relu" else c
    with torch.no_grad():
        deltas = weighted_sum(mixed_updates(pico_base), weights)
        expected = logits(DenseModel(pico_base, deltas), TOKENS)
    found = of_mixture(pico_base, random_mixture)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    torch.testing.assert_close(random_mixture.activated(), weights * PRESENT)
    assert (random_mixture.activated() != 0).equal(PRESENT.bool())


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_trained_mixture_is_one_adapter(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path, recipe: MixtureRecipe
) -> None:
    updates = mixed_updates(pico_base)
    mixture = Mixture(updates, recipe, CPU)
    before = of_base(pico_base)
    start = of_mixture(pico_base, mixture)
    trained, _ = fit(pico_base, mixture, examples[:3], examples[:3], PLAN, Silent())
    assert trained.best_step > 0
    assert trained.best_loss < trained.history[0][1] - 0.01
    expected = of_mixture(pico_base, mixture)
    assert (expected - start).abs().mean() > 0.01
    assert torch.equal(of_base(pico_base), before)

    folded = mixture.folded()
    for path, piece in folded.items():
        assert piece.rank == sum(update[path].rank for update in updates if path in update)
    write_adapter(tmp_path, folded, pico_base.id)
    for update in (folded, read_adapter(tmp_path).update):
        with with_adapter(pico_base, update):
            torch.testing.assert_close(of_base(pico_base), expected, rtol=0, atol=2e-5)


def test_modules_that_an_adapter_lacks_get_no_gradient(
    pico_base: BaseModel, examples: list[Example], random_mixture: Mixture
) -> None:
    with attached(pico_base, random_mixture.components, random_mixture.gates()):
        answer_loss(pico_base, collate(pico_base, examples)).backward()
    for row, present in zip(random_mixture.coefficients, PRESENT.bool(), strict=True):
        assert row.grad is not None
        assert (row.grad != 0).equal(present)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 1), (2, 2), (3, 1)])
def test_a_gradient_is_a_finite_difference(
    pico_base: BaseModel, examples: list[Example], row: int, column: int
) -> None:
    """In float64, but for the model's norms, which stay in float32."""
    double = dataclasses.replace(pico_base, model=copy.deepcopy(pico_base.model).double())
    wide = [
        {p: u.to(torch.float64) for p, u in update.items()} for update in mixed_updates(pico_base)
    ]
    mixture = Mixture(wide, MixtureRecipe("linear", "one"), CPU).double()
    c = mixture.coefficients[row]
    with attached(double, mixture.components, mixture.gates()):
        answer_loss(double, collate(double, examples)).backward()
        losses = []
        for shift in (STEP, -STEP):
            with torch.no_grad():
                c[column] = 1 + shift
                losses.append(float(plain.loss(double.model, examples)))
    assert c.grad is not None
    difference = (losses[0] - losses[1]) / (2 * STEP)
    assert float(c.grad[column]) == pytest.approx(difference, rel=1e-3, abs=5e-5)


def test_coefficients_stay_float32_on_a_bfloat16_base(
    pico_folder: Path, examples: list[Example], tmp_path: Path
) -> None:
    base = load_base_model(str(pico_folder), Settings(tmp_path, True, "bfloat16", "cpu"))
    mixture = Mixture(mixed_updates(base), MixtureRecipe(), CPU)
    assert torch.equal(of_mixture(base, mixture), of_base(base))
    fit(base, mixture, examples[:3], examples[:3], PLAN, Silent())
    # They lie between what bfloat16 can hold.
    now = stacked(mixture)[PRESENT.bool()]
    assert now.dtype == torch.float32
    assert (now.bfloat16().float() != now).float().mean() > 0.9
    for piece in mixture.folded().values():
        assert (piece.A.dtype, piece.B.dtype) == (torch.float32, torch.float32)
    expected = of_mixture(base, mixture)
    with with_adapter(base, mixture.folded()):
        torch.testing.assert_close(of_base(base), expected, rtol=0, atol=0.1)


def test_an_adapter_of_another_model_is_refused(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    foreign = {Q0: LowRankUpdate(torch.ones(2, 31), torch.ones(32, 2), 1.0)}
    mixture = Mixture([foreign], MixtureRecipe(), CPU)
    with pytest.raises(AdapterProblem, match="q_proj"):
        fit(pico_base, mixture, examples, examples, PLAN, Silent())
