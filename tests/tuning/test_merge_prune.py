import math
from pathlib import Path

import pytest
import torch
from support.plain import CLOSED_ROWS, Q0, DenseModel, logits, mixed_updates
from torch import Tensor

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.forward import answer_loss, collate
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.lora.folder import read_adapter, write_adapter
from recycle_cli.progress import Silent
from recycle_cli.tuning.merge_prune import MergePrune, importance
from recycle_cli.tuning.mixture import parameter_name
from recycle_cli.tuning.tuned import Ingredients, fit

TOKENS = list(range(3, 43))
PLAN = TrainingPlan(steps=3, lr=1e-2, batch_size=3, eval_every=1, schedule="step", warmup=0.0)


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS)


def made(
    base: BaseModel,
    prune: float = 0.4,
    score: str = "input",
    level: str = "parameter",
    restore: str = "zero",
) -> MergePrune:
    ingredients = Ingredients(mixed_updates(base), ["one", "two", "three"])
    return MergePrune(ingredients, prune=prune, score=score, level=level, restore=restore)


def own_tensors(merged: MergePrune) -> list[tuple[Tensor, Tensor]]:
    """Every A_i and B_i as it is, beside what the adapter came with; padding left out."""
    return [
        pair
        for path, piece in merged.source.items()
        for at in range(len(piece.ranks))
        for pair in zip(merged._own(path, at), piece.one(at), strict=True)
    ]


def stepped(base: BaseModel, merged: MergePrune, examples: list[Example], steps: int = 1) -> None:
    """Optimizer steps as the training loop takes them, without its best state."""
    optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-2, weight_decay=0)
    with merged.attached(base):
        merged.prepare(base, examples)
        for _ in range(steps):
            optimizer.zero_grad()
            answer_loss(base, collate(base, examples)).backward()
            optimizer.step()
            merged.after_step()


@pytest.mark.parametrize(("out", "width", "rank"), [(7, 5, 3), (4, 9, 1), (700, 600, 4)])
def test_what_an_entry_counts_by_is_the_derivative(out: int, width: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(out)
    a = torch.randn(rank, width, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(out, rank, generator=generator, dtype=torch.float64, requires_grad=True)
    norms = torch.rand(width, generator=generator, dtype=torch.float64)
    ((b @ a).abs() * norms).sum().backward()
    of_a, of_b = importance(a.detach(), b.detach(), norms)
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(of_a, a.grad.abs())
    torch.testing.assert_close(of_b, b.grad.abs())


def test_the_norms_are_those_of_the_inputs_of_all_tokens(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    """Row by row, without padding, with the starting merge on."""
    merged = made(pico_base)
    seen: dict[str, Tensor] = {}
    with merged.attached(pico_base), torch.no_grad():
        merged.prepare(pico_base, examples)
        for path in (path for path in merged.source if path != "lm_head"):

            def add(_m: object, inputs: tuple[Tensor], path: str = path) -> None:
                seen[path] = seen.get(path, torch.zeros(())) + inputs[0][0].double().square().sum(0)

            handle = pico_base.model.get_submodule(path).register_forward_pre_hook(add)
            for e in examples:
                logits(pico_base.model, [*e.prompt, *e.answer])
            handle.remove()
    for path, total in seen.items():
        found = merged.get_buffer(f"norms_{parameter_name(path)}")
        torch.testing.assert_close(found.double(), total.sqrt(), rtol=1e-4, atol=1e-4)
    assert len(seen) == 3


@pytest.mark.parametrize("score", ["input", "grad"])
@pytest.mark.parametrize("restore", ["zero", "init"])
@pytest.mark.parametrize("prune", [0.05, 0.4, 0.9])
def test_after_each_step_so_many_entries_of_each_tensor_are_pruned(
    pico_base: BaseModel, examples: list[Example], score: str, restore: str, prune: float
) -> None:
    merged = made(pico_base, prune, score, "parameter", restore)
    stepped(pico_base, merged, examples)
    for now, source in own_tensors(merged):
        back = now == (source if restore == "init" else 0)
        assert int(back.sum()) == max(1, math.floor(prune * now.numel()))


@pytest.mark.parametrize("score", ["input", "grad"])
def test_the_lowest_are_pruned(
    pico_base: BaseModel, examples: list[Example], score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = made(pico_base, 0.4, score)
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    real = merged._scores

    def note(path: str) -> tuple[Tensor, Tensor]:
        kept[path] = real(path)
        return kept[path]

    monkeypatch.setattr(merged, "_scores", note)
    stepped(pico_base, merged, examples)
    for path, piece in merged.source.items():
        for at in range(len(piece.ranks)):
            scores = piece.own_part(at, kept[path])
            for now, of in zip(merged._own(path, at), scores, strict=True):
                assert of[now == 0].max() <= of[now != 0].min()


def test_grad_scores_are_smoothed_sizes_and_spreads(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    merged = made(pico_base, 0.4, "grad")
    name = parameter_name(Q0)
    mean = spread = torch.zeros_like(merged.lora_A[name])
    optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-2, weight_decay=0)
    with merged.attached(pico_base):
        for _ in range(3):
            optimizer.zero_grad()
            answer_loss(pico_base, collate(pico_base, examples)).backward()
            optimizer.step()
            a = merged.lora_A[name]
            assert a.grad is not None
            now = (a.detach() * a.grad).abs()
            mean = 0.85 * mean + 0.15 * now
            spread = 0.85 * spread + 0.15 * (now - mean).abs()
            merged.after_step()
    torch.testing.assert_close(merged.get_buffer(f"mean_A_{name}"), mean)
    torch.testing.assert_close(merged.get_buffer(f"spread_A_{name}"), spread)


def test_a_pruned_entry_may_grow_again(pico_base: BaseModel, examples: list[Example]) -> None:
    merged = made(pico_base, 0.4, "grad")
    stepped(pico_base, merged, examples)
    before = [now.clone() for now, _ in own_tensors(merged)]
    stepped(pico_base, merged, examples, steps=2)
    pairs = zip(before, own_tensors(merged), strict=True)
    grown = sum(int(((was == 0) & (now != 0)).sum()) for was, (now, _) in pairs)
    assert grown > 0


@pytest.mark.parametrize(("prune", "count"), [(0.0, 0), (0.3, 2), (0.99, 6)])
@pytest.mark.parametrize("restore", ["zero", "init"])
def test_whole_modules_are_pruned_by_their_mean(
    pico_base: BaseModel, examples: list[Example], prune: float, count: int, restore: str
) -> None:
    """Seven pairs of an adapter and a module."""
    merged = made(pico_base, prune, "input", "module", restore)
    stepped(pico_base, merged, examples)
    back = 0
    for path, piece in merged.source.items():
        for at in range(len(piece.ranks)):
            pairs = zip(merged._own(path, at), piece.one(at), strict=True)
            gone = [torch.equal(now, was if restore == "init" else 0 * was) for now, was in pairs]
            assert gone[0] == gone[1]
            back += gone[0]
    assert back == count


def test_what_fills_ranks_up_is_never_trained(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    merged = made(pico_base, 0.0)
    stepped(pico_base, merged, examples, steps=3)
    for path, piece in merged.source.items():
        own_a, own_b = piece.own
        a, b = merged._factors(path)
        assert not (a * (1 - own_a)).any()
        assert not (b * (1 - own_b)).any()
        assert (a.shape[1] > min(piece.ranks)) == (len(set(piece.ranks)) > 1)
        assert not torch.equal(a, piece.A)


def test_without_steps_it_is_the_product_of_the_sums(pico_base: BaseModel) -> None:
    merged = made(pico_base)
    updates = mixed_updates(pico_base)
    deltas = {}
    for path, piece in merged.result().items():
        own = [u[path].padded(piece.rank) for u in updates if path in u]
        a, b = sum(u.A for u in own), sum(u.scale * u.B for u in own)
        deltas[path] = b @ a
        torch.testing.assert_close(piece.dense(), deltas[path], rtol=0, atol=1e-6)
    with torch.no_grad():
        expected = logits(DenseModel(pico_base, deltas), TOKENS)
        with merged.attached(pico_base):
            found = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_the_export_is_what_was_trained(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    merged = made(pico_base)
    weights = {name: p.clone() for name, p in pico_base.model.named_parameters()}
    trained = fit(pico_base, merged, examples[:4], examples[4:], PLAN, Silent())
    assert len(trained.history) == 4
    write_adapter(tmp_path, merged.result(), pico_base.id)
    with torch.no_grad():
        with merged.attached(pico_base):
            expected = logits(pico_base.model, TOKENS)
        with with_adapter(pico_base, read_adapter(tmp_path).update):
            found = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert all(torch.equal(weights[n], p) for n, p in pico_base.model.named_parameters())


def test_shares_are_the_entries_that_are_left(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    merged = made(pico_base, 0.5)
    assert [(s.mean, s.max_abs) for s in merged.shares()] == [(1, 1)] * 3
    stepped(pico_base, merged, examples)
    for share in merged.shares():
        assert share.mean == pytest.approx(0.5, abs=0.05)
        assert share.mean <= share.max_abs
