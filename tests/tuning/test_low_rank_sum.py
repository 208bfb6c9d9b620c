"""LoRSum against dense references, in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recycle_cli.tuning.lora_optimizers.gradient_norm import EXACT_ROWS, PROBES, squared_norm
from recycle_cli.tuning.lora_optimizers.low_rank_optimizer import Kfac, LowRankOptimizer, Rule
from recycle_cli.tuning.lora_optimizers.low_rank_sum import Metric, Term, low_rank_sum
from recycle_cli.tuning.lora_optimizers.recording import Recorder
from recycle_cli.tuning.peft_layers import ADAPTER

OUT, WIDTH, RANK, ROWS = 14, 11, 3, 20


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


A, B = drawn(RANK, WIDTH), drawn(OUT, RANK, seed=1)
X, S = drawn(ROWS, WIDTH, seed=2), drawn(ROWS, OUT, seed=3) / ROWS
Z, G = B @ A, S.T @ X


def stepped(eta: float, inner_steps: int, proximal: float = 0.0, **other: Metric) -> Tensor:
    terms = [Term(1.0, A, B), Term(-eta, X, S.T)]
    a, b = low_rank_sum(terms, proximal, inner_steps, **other)
    return b @ a


def truncated(matrix: Tensor) -> Tensor:
    u, s, v = torch.linalg.svd(matrix)
    return (u[:, :RANK] * s[:RANK]) @ v[:RANK]


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(("eta", "inner_steps", "within"), [(0.1, 1, 5e-4), (0.1, 40, 1e-9),
                                                            (5.0, 1500, 1e-6)])  # fmt: skip
def test_many_inner_steps_give_the_truncated_svd_of_the_full_step(
    eta: float, inner_steps: int, within: float
) -> None:
    best = truncated(Z - eta * G)
    assert distance(stepped(eta, inner_steps), best) < within
    assert distance(Z, best) > 10 * within, "else standing still would do"


def test_inner_steps_come_nearer_and_never_under_the_bound() -> None:
    whole = Z - 5 * G
    bound = float(torch.linalg.svdvals(whole)[RANK:].square().sum())
    errors = [float((stepped(5, steps) - whole).square().sum()) for steps in range(1, 30)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0] - 1e-3
    assert errors[-1] >= bound - 1e-9
    assert errors[-1] == pytest.approx(bound, rel=1e-2)


@pytest.mark.parametrize("proximal", [0.0, 0.3])
def test_no_inner_step_is_the_preconditioned_gradient_step(proximal: float) -> None:
    """Both factors at once, each gradient by the inverse Gram matrix of the other factor."""
    eta, held = 0.7, proximal * torch.eye(RANK, dtype=torch.float64)
    a = A - eta * torch.linalg.inv(B.T @ B + held) @ B.T @ G
    b = B - eta * G @ A.T @ torch.linalg.inv(A @ A.T + held)
    found = low_rank_sum([Term(1.0, A, B), Term(-eta, X, S.T)], proximal, 0)
    torch.testing.assert_close(found[0], a)
    torch.testing.assert_close(found[1], b)


@pytest.mark.parametrize("inner_steps", [0, 1, 4])
def test_the_product_does_not_depend_on_how_it_is_split(inner_steps: int) -> None:
    turn = drawn(RANK, RANK, seed=5) + 3 * torch.eye(RANK, dtype=torch.float64)
    terms = [Term(1.0, torch.linalg.inv(turn) @ A, B @ turn), Term(-0.5, X, S.T)]
    a, b = low_rank_sum(terms, 0.0, inner_steps)
    if inner_steps:
        torch.testing.assert_close(b @ a, stepped(0.5, inner_steps))
    else:  # both moves are invariant, each by itself
        torch.testing.assert_close(b @ (torch.linalg.inv(turn) @ A), _moved_b() @ A)


def _moved_b() -> Tensor:
    return low_rank_sum([Term(1.0, A, B), Term(-0.5, X, S.T)], 0.0, 0)[1]


@pytest.mark.parametrize("b", [B, torch.zeros_like(B)], ids=["somewhere", "at the start"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("inner_steps", [0, 1, 3])
def test_without_a_rate_nothing_moves(b: Tensor, dtype: torch.dtype, inner_steps: int) -> None:
    """Not even in directions that a factor lacks, where lam alone says where to be."""
    terms = [Term(1.0, A.to(dtype), b.to(dtype)), Term(0.0, X.to(dtype), S.T.to(dtype))]
    for proximal in (0.0, 1e-5, 1e-2):
        found = low_rank_sum(terms, proximal, inner_steps)
        torch.testing.assert_close(found[0], terms[0].A, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1], terms[0].B, rtol=1e-4, atol=1e-4)


def test_a_metric_gives_the_weighted_svd() -> None:
    """L^-1/2 SVD_r(L^1/2 (Z - eta L^-1 G R^-1) R^1/2) R^-1/2."""
    out, width = drawn(OUT, seed=7).abs() + 0.2, drawn(WIDTH, seed=8).abs() + 0.2
    eta, (left, right) = 0.3, (out.sqrt()[:, None], width.sqrt())
    whole = Z - eta * G / out[:, None] / width
    best = truncated(left * whole * right) / left / right
    found = stepped(eta, 400, metric=Metric(out, width))
    assert distance(found, best) < 1e-8
    assert distance(truncated(whole), best) > 1e-3, "else the metric would not matter"


def test_several_products_add_up() -> None:
    """A gradient and a momentum, as in a step."""
    m_a, m_b = drawn(RANK, WIDTH, seed=9), drawn(OUT, RANK, seed=10)
    whole = 0.9 * Z - 0.2 * G - 0.4 * m_b @ m_a
    terms = [Term(0.9, A, B), Term(-0.2, X, S.T), Term(-0.4, m_a, m_b)]
    a, b = low_rank_sum(terms, 0.0, 400)
    assert distance(b @ a, truncated(whole)) < 1e-8


def test_steps_follow_full_training_where_gradient_descent_on_factors_does_not() -> None:
    """|B A - T|^2 / 2 for an ill-conditioned T of the same rank, at a rate that the matrix itself
    stands."""
    u, _, v = torch.linalg.svd(drawn(OUT, WIDTH, seed=11))
    wanted = (u[:, :RANK] * torch.tensor([30.0, 3, 0.3], dtype=torch.float64)) @ v[:RANK]
    a, b, plain_a, plain_b = A, 0 * B, A, 0 * B
    eye = torch.eye(WIDTH, dtype=torch.float64)
    for _ in range(30):
        gradient = b @ a - wanted
        a, b = low_rank_sum([Term(1.0, a, b), Term(-0.5, eye, gradient)], 1e-9, 1)
        gradient = plain_b @ plain_a - wanted
        plain_a, plain_b = (
            plain_a - 0.5 * plain_b.T @ gradient,
            plain_b - 0.5 * gradient @ plain_a.T,
        )
    assert distance(b @ a, wanted) < 1e-6
    assert not distance(plain_b @ plain_a, wanted) < 1


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple) else (result,):
            if isinstance(one, Tensor):
                self.numbers = max(self.numbers, one.numel())
        return result


@pytest.mark.parametrize("inner_steps", [0, 2])
def test_nothing_of_the_size_of_the_weight_is_made(inner_steps: int) -> None:
    """With in = out = 100,000 that would take 40 GB."""
    side, rank, rows = 100_000, 4, EXACT_ROWS + 1
    a, b = torch.randn(rank, side), torch.randn(side, rank)
    x, s = torch.randn(rows, side), torch.randn(rows, side)
    ones = torch.ones(side)
    with Largest() as largest:
        low_rank_sum([Term(1.0, a, b), Term(-0.1, x, s.T)], 1e-2, inner_steps, Metric(ones, ones))
        squared_norm(x, s)
        squared_norm(x[:50], s[:50])
    assert 0 < largest.numbers <= rows * side


class Wide(nn.Module):
    """What the recorder and the optimizer know of a LoRA layer of PEFT's, without the base's."""

    def __init__(self, side: int, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.ModuleDict({ADAPTER: nn.Linear(side, rank, bias=False)})
        self.lora_B = nn.ModuleDict({ADAPTER: nn.Linear(rank, side, bias=False)})
        self.scaling = {ADAPTER: 0.5}

    def forward(self, x: Tensor) -> Tensor:
        return self.scaling[ADAPTER] * self.lora_B[ADAPTER](self.lora_A[ADAPTER](x))


def test_nor_is_it_in_whole_steps() -> None:
    """From the pass to the moved factors, with momentum, a metric and clipping."""
    side, rows = 100_000, 16
    layer, rule = Wide(side, 2), Rule(1, 1e-2, 0.9, averaged=True, kfac=Kfac(0.9, 0.5, 1e-5))
    recorder = Recorder({"wide": layer})
    optimizer = LowRankOptimizer(recorder, lr=0.1, weight_decay=0.1, rule=rule, seed=0)
    before = layer.lora_B[ADAPTER].weight.detach().clone()
    with Largest() as largest, recorder.recording():
        for _ in range(2):
            optimizer.zero_grad()
            # An input without gradients, as in the first layer, and two passes.
            for count in (rows - 1, 1):
                layer(torch.randn(count, side)).square().sum().backward()
            optimizer.clip([], 1.0)
            optimizer.step()
    assert 0 < largest.numbers <= rows * side
    assert not torch.equal(layer.lora_B[ADAPTER].weight, before)


def test_the_norm_of_few_rows_is_exact() -> None:
    assert float(squared_norm(X, S)) == pytest.approx(float(G.square().sum()), rel=1e-12)


def test_the_norm_of_many_rows_is_estimated_without_bias() -> None:
    rows = EXACT_ROWS + 1
    x, s = drawn(rows, WIDTH, seed=4), drawn(rows, OUT, seed=6)
    exact = float((s.T @ x).square().sum())
    torch.manual_seed(0)
    found = [float(squared_norm(x, s)) / exact for _ in range(200)]
    spread = math.sqrt(2 / PROBES)
    assert abs(sum(found) / len(found) - 1) < 3 * spread / math.sqrt(len(found))
    assert max(abs(one - 1) for one in found) < 4 * spread
    assert len(set(found)) > 1
