from pathlib import Path

import numpy as np
import pytest
import torch
from support.plain import CLOSED_ROWS, DOWN, HEAD, Q0, Q1, logits, mixed_updates
from torch import Tensor
from torch.nn import functional

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.forward import answer_loss, collate
from recycle_cli.engine.routing import put_on, route
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.lora.routed import read_routed, write_routed
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.progress import Silent
from recycle_cli.tuning.arrow import Router
from recycle_cli.tuning.mixture import parameter_name
from recycle_cli.tuning.tuned import Ingredients, fit

TOKENS = list(range(3, 43))
PRESENT = {DOWN: [0, 2], HEAD: [0], Q0: [0, 1], Q1: [1, 2]}


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS)


def made(updates: list[ModelUpdate], top_k: int = 4, temperature: float = 1.0) -> Router:
    names = [str(at) for at in range(len(updates))]
    return Router(Ingredients(updates, names), top_k=top_k, temperature=temperature)


@torch.no_grad()
def of(base: BaseModel, router: Router) -> Tensor:
    with router.attached(base):
        return logits(base.model, TOKENS)


def by_hand(
    x: Tensor, weight: Tensor, pieces: list[LowRankUpdate], vectors: Tensor, top_k: int, heat: float
) -> Tensor:
    """One token after the other, one adapter after the other."""
    rows = []
    for token in x:
        scores = [abs(float(token @ v)) / heat for v in vectors]
        chosen = sorted(range(len(scores)), key=lambda at: -scores[at])[: top_k or len(scores)]
        exps = {at: np.exp(scores[at] - max(scores)) for at in chosen}
        y = weight @ token
        for at in chosen:
            share = float(exps[at] / sum(exps.values()))
            y = y + share * pieces[at].scale * (pieces[at].B @ (pieces[at].A @ token))
        rows.append(y)
    return torch.stack(rows)


def test_a_prototype_is_the_top_right_singular_vector(pico_base: BaseModel) -> None:
    updates = mixed_updates(pico_base)
    router = made(updates)
    for path, present in PRESENT.items():
        prototypes = router.prototypes[parameter_name(path)]
        assert len(prototypes) == len(present)
        for vector, at in zip(prototypes.detach(), present, strict=True):
            dense = updates[at][path].dense().double().numpy()
            _, values, right = np.linalg.svd(dense)
            assert values[0] > 1.01 * (values[1] if len(values) > 1 else 0)
            assert abs(float(vector.double().numpy() @ right[0])) == pytest.approx(1, abs=1e-6)


def test_a_prototype_does_not_change_with_the_size_of_an_adapter(pico_base: BaseModel) -> None:
    updates = mixed_updates(pico_base)
    larger = [
        {p: LowRankUpdate(3 * u.A, u.B / 7, -5 * u.scale) for p, u in one.items()}
        for one in updates
    ]
    for one, other in zip(made(updates).parameters(), made(larger).parameters(), strict=True):
        overlap = (one * other).sum(1).abs()
        torch.testing.assert_close(overlap, torch.ones_like(overlap), rtol=0, atol=1e-5)


def test_an_adapter_that_does_nothing_points_nowhere(pico_base: BaseModel) -> None:
    update = {Q0: LowRankUpdate(torch.randn(2, 32), torch.zeros(32, 2), 1.0)}
    assert not next(made([update]).parameters()).any()


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (0, 3.0), (9, 1.0)])
def test_tokens_are_routed_as_by_hand(pico_base: BaseModel, top_k: int, temperature: float) -> None:
    updates = mixed_updates(pico_base)
    router = made(updates, top_k, temperature)
    generator = torch.Generator().manual_seed(4)
    for path, forward in router.forwards(pico_base, 0).items():
        linear = pico_base.model.get_submodule(path)
        x = torch.randn(2, 6, linear.in_features, generator=generator)
        pieces = [updates[at][path] for at in PRESENT[path]]
        vectors = router.prototypes[parameter_name(path)].detach()
        with torch.no_grad():
            flat = x.flatten(0, 1)
            expected = by_hand(flat, linear.weight, pieces, vectors, top_k, temperature)
            found = forward(linear, x)
            torch.testing.assert_close(found.flatten(0, 1), expected, rtol=0, atol=1e-5)
            # What stands beside a token has no say.
            alone = forward(linear, x[1:, 2:3])
            torch.testing.assert_close(alone[0, 0], found[1, 2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_k", [0, 1, 3, 5])
def test_shares_sum_to_one_over_so_many(top_k: int) -> None:
    x, prototypes = torch.randn(7, 8), torch.randn(5, 8)
    shares = route(x, prototypes, top_k, 1.0)
    torch.testing.assert_close(shares.sum(-1), torch.ones(7))
    assert ((shares > 0).sum(-1) == (top_k or 5)).all()
    assert shares.argmax(-1).equal(functional.linear(x, prototypes).abs().argmax(-1))


def test_prototypes_are_trained_by_their_gradient(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    router = made(mixed_updates(pico_base), top_k=1 + 1, temperature=0.7)
    batch = collate(pico_base, examples)
    vector = router.prototypes[parameter_name(Q0)]
    with router.attached(pico_base):
        answer_loss(pico_base, batch).backward()
        assert vector.grad is not None
        for row, column in ((0, 3), (1, 17)):
            losses = []
            for shift in (1e-2, -1e-2):
                with torch.no_grad():
                    vector[row, column] += shift
                    losses.append(float(answer_loss(pico_base, batch)))
                    vector[row, column] -= shift
            difference = (losses[0] - losses[1]) / 2e-2
            assert float(vector.grad[row, column]) == pytest.approx(difference, abs=2e-4)


def test_training_lowers_the_loss_and_the_file_holds_what_was_trained(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    router = made(mixed_updates(pico_base), top_k=2)
    start = of(pico_base, router)
    plan = TrainingPlan(steps=12, lr=0.1, batch_size=3, eval_every=3)
    trained = fit(pico_base, router, examples[:3], examples[:3], plan, Silent())
    assert trained.best_loss < trained.history[0][1]
    expected = of(pico_base, router)
    assert (expected - start).abs().max() > 1e-3
    write_routed(tmp_path, router.result(), pico_base.id, ["0", "1", "2"])
    adapter, base_name = read_routed(tmp_path)
    assert base_name == pico_base.id
    with put_on(pico_base, adapter), torch.no_grad():
        found = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_shares_are_those_of_the_passes_since_training(pico_base: BaseModel) -> None:
    router = made(mixed_updates(pico_base), top_k=1)
    of(pico_base, router)
    router.finish()
    assert [s.mean for s in router.shares()] == [0, 0, 0]
    of(pico_base, router)
    shares = router.shares()
    # In each of four modules the shares of the adapters that are there sum to one.
    assert sum(share.mean for share in shares) == pytest.approx(1)
    assert shares[0].max_abs == 1  # alone in the head
    assert all(0 <= share.mean <= share.max_abs <= 1 for share in shares)
