"""LoRA-RITE: what its steps do to the product of the factors."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from recycle_cli.engine.training import Hooks, TrainingPlan
from recycle_cli.errors import InputError
from recycle_cli.tuning.lora_form import LoraForm
from recycle_cli.tuning.lora_optimizers.pairs import factor_pairs
from recycle_cli.tuning.lora_optimizers.rite import rite

OUT, WIDTH, RANK, STEPS = 9, 7, 4, 6
PLAN = TrainingPlan(steps=STEPS, lr=0.05)


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


TURNS = {
    "none": torch.eye(RANK, dtype=torch.float64),
    "orthogonal": torch.linalg.qr(drawn(RANK, RANK, seed=1)).Q,
    "stretched": torch.tensor([10.0, 0.1, 3, 1], dtype=torch.float64).diag(),
    "any": drawn(RANK, RANK, seed=2) + 2 * torch.eye(RANK, dtype=torch.float64),
}


def pairs_after(turn: Tensor) -> dict[str, nn.Parameter]:
    """Two pairs, (R^-1 A, B R) of the same products; not in the order of pairs."""
    found = {}
    for side in ("lora_B", "lora_A"):
        for at, name in enumerate(("x", "y")):
            a, b = drawn(RANK, WIDTH, seed=10 + at), drawn(OUT, RANK, seed=20 + at)
            factor = torch.linalg.solve(turn, a) if side == "lora_A" else b @ turn
            found[f"model.{name}.{side}.default.weight"] = nn.Parameter(factor)
    return found


def products(parameters: dict[str, nn.Parameter]) -> list[Tensor]:
    return [b @ a for a, b in factor_pairs(parameters).values()]


def loss(parameters: dict[str, nn.Parameter], size: float = 1.0) -> Tensor:
    """Not quadratic, and of both products together."""
    one, two = products(parameters)
    x = drawn(30, WIDTH, seed=5)
    return size * (x @ one.T + torch.tanh(x @ two.T) - 1).square().mean()


@contextlib.contextmanager
def within(parameters: dict[str, nn.Parameter]) -> Iterator[LoraForm]:
    yield LoraForm(parameters, dict)


def hooks_of(parameters: dict[str, nn.Parameter], update_skipping: float = 0.0) -> Hooks:
    made = rite(None, within=lambda _: within(parameters), update_skipping=update_skipping)  # type: ignore[arg-type]
    with made as form:
        return form.hooks


def trajectory(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensor:
    """Both products after each step."""
    path = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(parameters).backward()
        optimizer.step()
        path.append(torch.stack(products(parameters)).detach())
    return torch.stack(path)


@pytest.mark.parametrize("turn", list(TURNS)[1:])
def test_the_products_go_the_same_way_however_they_are_split(turn: str) -> None:
    found = []
    for one in ("none", turn):
        parameters = pairs_after(TURNS[one])
        optimizer = hooks_of(parameters).optimizer(parameters, PLAN)
        found.append(trajectory(parameters, optimizer))
    moved = (found[0][-1] - torch.stack(products(pairs_after(TURNS["none"])))).norm()
    assert moved > 0.1
    assert (found[1] - found[0]).norm() < 1e-8 * moved


def test_those_of_adam_do_not() -> None:
    found = []
    for one in ("none", "any"):
        parameters = pairs_after(TURNS[one])
        adam = torch.optim.Adam(parameters.values(), lr=PLAN.lr)
        found.append(trajectory(parameters, adam))
    moved = (found[0][-1] - torch.stack(products(pairs_after(TURNS["none"])))).norm()
    assert (found[1] - found[0]).norm() > 0.1 * moved


def test_it_leaves_zero() -> None:
    """In the first step A stays, since B has no directions yet; B moves."""
    parameters = pairs_after(TURNS["none"])
    with torch.no_grad():
        for _, b in factor_pairs(parameters).values():
            b.zero_()
    starts = [a.detach().clone() for a, _ in factor_pairs(parameters).values()]
    optimizer = hooks_of(parameters).optimizer(parameters, PLAN)
    first = loss(parameters).item()
    loss(parameters).backward()
    optimizer.step()
    for (a, b), start in zip(factor_pairs(parameters).values(), starts, strict=True):
        assert torch.equal(a, start)
        assert b.any()
    trajectory(parameters, optimizer)
    assert loss(parameters).item() < first
    assert not torch.equal(next(iter(factor_pairs(parameters).values()))[0], starts[0])


@pytest.mark.parametrize(("update_skipping", "moves"), [(1.0, False), (0.0, True), (1e9, True)])
def test_steps_on_large_gradients_are_skipped_where_asked_for(
    update_skipping: float, moves: bool
) -> None:
    parameters = pairs_after(TURNS["none"])
    before = torch.stack(products(parameters))
    optimizer = hooks_of(parameters, update_skipping).optimizer(parameters, PLAN)
    loss(parameters, size=1e4).backward()
    optimizer.step()
    assert torch.equal(torch.stack(products(parameters)), before) != moves


def test_a_factor_goes_on_by_its_momentum_where_its_gradient_is_skipped() -> None:
    found = []
    for size in (1e4, -1e6):
        parameters = pairs_after(TURNS["none"])
        optimizer = hooks_of(parameters, update_skipping=1.0).optimizer(parameters, PLAN)
        trajectory(parameters, optimizer)
        before = torch.stack(products(parameters)).detach()
        optimizer.zero_grad()
        loss(parameters, size).backward()
        optimizer.step()
        found.append(torch.stack(products(parameters)).detach() - before)
    assert found[0].norm() > 1e-3
    torch.testing.assert_close(found[0], found[1], msg="no gradient had a part in it")


def test_gradients_are_clipped_in_its_own_coordinates_alone() -> None:
    """The loop's clipping, of gradients of the factors, would depend on how products are split."""
    parameters = pairs_after(TURNS["stretched"])
    hooks = hooks_of(parameters)
    loss(parameters, size=1e4).backward()
    before = [p.grad.clone() for p in parameters.values() if p.grad is not None]
    hooks.clip(parameters.values(), 1e-3)
    after = [p.grad for p in parameters.values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True) if y is not None)
    optimizer = hooks.optimizer(parameters, PLAN)
    assert optimizer.param_groups[0]["clip_unmagnified_grad"] == PLAN.max_grad_norm


def test_a_rank_beyond_a_side_is_refused() -> None:
    wide = {
        "base_model.model.x.lora_A.default.weight": nn.Parameter(torch.zeros(5, 8)),
        "base_model.model.x.lora_B.default.weight": nn.Parameter(torch.zeros(4, 5)),
    }
    with pytest.raises(InputError, match="a rank of 5 is more than x can have") as caught:
        hooks_of(wide)
    assert "--rank of 4" in caught.value.hint
