import numpy as np
import pytest
import torch
from scipy import stats
from support.low_rank import dense, random_piece
from torch import Tensor

from recycle_cli.lora.random_twin import Kept, random_twin
from recycle_cli.lora.update import Lazy, LowRankUpdate, ModelUpdate

WIDTH = 512
UPDATE: ModelUpdate = {
    "m.a": random_piece(1, 16, (WIDTH, WIDTH), scale=0.5, spread=0.01),
    "m.b": random_piece(2, 16, (WIDTH, WIDTH), scale=-3.0, spread=7.0),
    "m.c": LowRankUpdate(random_piece(3, 16, (1, WIDTH)).A + 5.0, torch.rand(WIDTH, 16), 1.0),
}


def factors(update: ModelUpdate) -> dict[str, Tensor]:
    return {f"{m}.A": p.A for m, p in update.items()} | {f"{m}.B": p.B for m, p in update.items()}


TWIN = factors(random_twin(UPDATE, "one", seed=0))


def equal(one: ModelUpdate, other: ModelUpdate) -> bool:
    ones, others = factors(one), factors(other)
    return ones.keys() == others.keys() and all(torch.equal(ones[k], others[k]) for k in ones)


def test_modules_shapes_and_scales_stay() -> None:
    twin = random_twin(UPDATE, "one", seed=0)
    assert {m: (p.A.shape, p.B.shape, p.scale) for m, p in twin.items()} == {
        m: (p.A.shape, p.B.shape, p.scale) for m, p in UPDATE.items()
    }


@pytest.mark.parametrize("name", sorted(TWIN))
def test_a_factor_is_normal_noise_of_mean_zero_and_the_spread_of_the_real_one(name: str) -> None:
    # The spread is that about the mean, also where the real factor's mean is far from zero.
    spread = float(np.std(factors(UPDATE)[name].numpy()))
    assert stats.kstest(TWIN[name].numpy().ravel() / spread, "norm").pvalue > 1e-3


def test_all_factors_are_independent_of_each_other_and_of_the_real_ones() -> None:
    rows = [factor.numpy().ravel() for factor in (*TWIN.values(), *factors(UPDATE).values())]
    rows += [f.numpy().ravel() for f in factors(random_twin(UPDATE, "two", seed=0)).values()]
    rows += [f.numpy().ravel() for f in factors(random_twin(UPDATE, "one", seed=1)).values()]
    correlations = np.corrcoef([row[: 16 * WIDTH] for row in rows]) - np.eye(len(rows))
    assert np.abs(correlations).max() < 5 / np.sqrt(16 * WIDTH)


def test_seed_and_name_alone_decide() -> None:
    torch.manual_seed(1)
    one = random_twin(UPDATE, "one", seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert equal(random_twin(UPDATE, "one", seed=3), one)
    assert torch.equal(torch.get_rng_state(), state)


def test_neither_the_order_of_the_modules_nor_the_others_decide() -> None:
    twin = random_twin(UPDATE, "one", seed=0)
    assert equal(random_twin(dict(reversed(UPDATE.items())), "one", seed=0), twin)
    alone = random_twin({"m.b": UPDATE["m.b"]}, "one", seed=0)
    assert equal(alone, {"m.b": twin["m.b"]})


@pytest.mark.parametrize(
    ("width", "start"), [(2, [-0.596551, -1.256326]), (16, [1.823775, -0.272652])]
)
def test_the_draws_are_these_on_every_machine(width: int, start: list[float]) -> None:
    # A spread of 1 shows the draws themselves; torch draws 16 numbers and more another way.
    unit = torch.tensor([[-1.0, 1.0] * (width // 2)])
    twin = random_twin({"m.a": LowRankUpdate(unit, unit.T, 1.0)}, "one", seed=0)
    np.testing.assert_allclose(twin["m.a"].A[0, :2].numpy(), start, rtol=1e-4)


def test_the_spread_alone_is_taken_from_the_factor() -> None:
    piece = UPDATE["m.a"]
    larger = LowRankUpdate(piece.A.flip(1) * 4.0 + 1.0, piece.B * -0.5, piece.scale)
    one = random_twin({"m": piece}, "one", seed=0)["m"]
    other = random_twin({"m": larger}, "one", seed=0)["m"]
    torch.testing.assert_close(other.A, one.A * 4.0, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(other.B, one.B * 0.5)


def test_one_number_has_its_size_for_a_spread() -> None:
    def twin(value: float) -> LowRankUpdate:
        one = LowRankUpdate(torch.tensor([[value]]), torch.tensor([[-value]]), 1.0)
        return random_twin({"m": one}, "one", seed=0)["m"]

    assert twin(1.0).A.item() != 0.0
    assert twin(-6.0).A.item() == pytest.approx(6.0 * twin(1.0).A.item())
    assert twin(6.0).B.item() == pytest.approx(6.0 * twin(1.0).B.item())


def test_a_factor_of_zeros_stays_zero() -> None:
    piece = LowRankUpdate(UPDATE["m.a"].A, torch.zeros(4, 16), 1.0)
    assert not random_twin({"m": piece}, "one", seed=0)["m"].dense().any()


def with_norms() -> ModelUpdate:
    """Updates whose factors are related to each other, so that noise of their spread has another
    norm; of several ranks, sizes and scales, one of them zero."""
    small, wide = random_piece(5, 4, (40, 24), scale=0.3), random_piece(6, 1, (7, 90), scale=-8.0)
    square = torch.randn(4, 30, generator=torch.Generator().manual_seed(7))
    return {
        "m.related": LowRankUpdate(square, square.T.contiguous(), 1e-3),
        "m.small": small,
        "m.wide": wide,
        "m.zero": LowRankUpdate(small.A, torch.zeros_like(small.B), 2.0),
    }


def test_the_norm_can_be_kept_too() -> None:
    update = with_norms()
    twin = random_twin(update, "one", seed=0, keep="norm")
    ranks = {m: (p.A.shape, p.B.shape, p.scale) for m, p in twin.items()}
    assert ranks == {m: (p.A.shape, p.B.shape, p.scale) for m, p in update.items()}
    for module, piece in update.items():
        norm = float(np.linalg.norm(dense(piece)))
        assert float(np.linalg.norm(dense(twin[module]))) == pytest.approx(norm, rel=1e-5)
    spread = random_twin(update, "one", seed=0)
    of_spread = float(np.linalg.norm(dense(spread["m.related"])))
    assert of_spread < 0.9 * float(np.linalg.norm(dense(update["m.related"])))


def test_keeping_the_norm_changes_the_size_of_the_noise_alone() -> None:
    update = with_norms()
    spread, norm = (random_twin(update, "one", seed=0, keep=keep) for keep in ("spread", "norm"))
    for module in ("m.related", "m.small", "m.wide"):
        assert torch.equal(norm[module].A, spread[module].A)
        ratios = norm[module].B / spread[module].B
        torch.testing.assert_close(ratios, torch.full_like(ratios, float(ratios.mean())))
        assert float(ratios.mean()) > 0


@pytest.mark.parametrize("keep", ["spread", "norm"])
def test_modules_are_drawn_when_they_are_asked_for_and_the_same_each_time(keep: Kept) -> None:
    update, asked = with_norms(), []

    def make(module: str) -> LowRankUpdate:
        asked.append(module)
        return update[module]

    twin = random_twin(Lazy(update.keys(), make), "one", seed=0, keep=keep)
    assert (list(twin), len(twin), "m.small" in twin) == (list(update), len(update), True)
    assert asked == []
    first = twin["m.small"]
    assert asked == ["m.small"]
    # In another order, after other draws, and from the whole update at once.
    torch.manual_seed(8)
    assert equal({m: twin[m] for m in reversed(list(twin))}, dict(twin.items()))
    assert equal({"m.small": twin["m.small"]}, {"m.small": first})
    assert equal(dict(random_twin(update, "one", seed=0, keep=keep)), dict(twin.items()))
    with pytest.raises(KeyError):
        twin["m.other"]
