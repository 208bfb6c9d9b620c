import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.plain import CLOSED_ROWS, HEAD, DenseModel, logits, mixed_updates, random_update
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.forward import answer_loss, collate
from recycle_cli.engine.store import Store
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.lora.folder import read_adapter, write_adapter
from recycle_cli.progress import Silent
from recycle_cli.tuning.merge_prune import MergePrune, importance
from recycle_cli.tuning.mixture import parameter_name
from recycle_cli.tuning.tuned import Ingredients, fit

TOKENS = list(range(3, 43))
PLAN = TrainingPlan(steps=3, lr=1e-2, batch_size=3, eval_every=1, lr_schedule="step", warmup=0.0)


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
    ingredients = Ingredients(mixed_updates(base))
    return MergePrune(ingredients, prune=prune, score=score, level=level, restore=restore)


def own_tensors(merged: MergePrune) -> list[tuple[Tensor, Tensor]]:
    """Every A_i and B_i as it is, beside what the adapter came with; padding left out."""
    return [
        pair
        for path, piece in merged.source.items()
        for at in range(len(piece.ranks))
        for pair in zip(merged._own(path, at), piece.one(at), strict=True)
    ]


class Steps:
    """Optimizer steps as the training loop takes them, with a look before the pruning."""

    def __init__(self, base: BaseModel, merged: MergePrune, examples: list[Example]) -> None:
        self.base, self.merged, self.examples = base, merged, examples
        self.optimizer = torch.optim.AdamW(merged.parameters(), lr=1e-2, weight_decay=0)
        with merged.attached(base):
            merged.prepare(base, examples)

    def step(self) -> None:
        self.optimizer.zero_grad()
        with self.merged.attached(self.base):
            answer_loss(self.base, collate(self.base, self.examples)).backward()
        self.optimizer.step()


def stepped(base: BaseModel, merged: MergePrune, examples: list[Example], steps: int = 1) -> None:
    """Steps, each followed by the pruning."""
    loop = Steps(base, merged, examples)
    for _ in range(steps):
        loop.step()
        merged.after_step()


class ByHand:
    """What the entries of every A_i and B_i count by, in float64, from the definitions."""

    def __init__(self, merged: MergePrune) -> None:
        self.merged = merged
        self.mean = self.spread = [now.double() * 0 for now, _ in own_tensors(merged)]

    def scores(self) -> list[Tensor]:
        """In the order of `own_tensors`; once after each optimizer step."""
        return self._of_grad() if self.merged.score == "grad" else self._of_input()

    def _of_input(self) -> list[Tensor]:
        found = []
        for path, piece in self.merged.source.items():
            norms = self.merged.get_buffer(f"norms_{parameter_name(path)}").double()
            for at in range(len(piece.ranks)):
                a, b = (t.double().requires_grad_() for t in self.merged._own(path, at))
                ((b @ a).abs() * norms).sum().backward()
                found += [t.grad.abs() for t in (a, b) if t.grad is not None]
        return found

    def _of_grad(self) -> list[Tensor]:
        now = []
        for path, piece in self.merged.source.items():
            a, b = self.merged._factors(path)
            assert a.grad is not None
            assert b.grad is not None
            for at in range(len(piece.ranks)):
                pairs = zip(
                    self.merged._own(path, at), piece.own_part(at, (a.grad, b.grad)), strict=True
                )
                now += [(factor.double() * gradient.double()).abs() for factor, gradient in pairs]
        self.mean = [0.85 * was + 0.15 * i for was, i in zip(self.mean, now, strict=True)]
        self.spread = [
            0.85 * was + 0.15 * (i - mean).abs()
            for was, i, mean in zip(self.spread, now, self.mean, strict=True)
        ]
        return [mean * spread for mean, spread in zip(self.mean, self.spread, strict=True)]


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


def assert_norms(base: BaseModel, merged: MergePrune, examples: list[Example]) -> None:
    """Compares them with those of whole rows, one by one, without padding or a shared beginning."""
    squares = dict.fromkeys(merged.source, torch.zeros(()))
    with merged.attached(base), torch.no_grad():
        merged.prepare(base, examples)
        for path in merged.source:

            def add(_m: object, inputs: tuple[Tensor], path: str = path) -> None:
                vectors = inputs[0].reshape(-1, inputs[0].shape[-1])
                squares[path] = squares[path] + vectors.double().square().sum(0)

            handle = base.model.get_submodule(path).register_forward_pre_hook(add)
            for e in examples:
                logits(base.model, [*e.prompt, *e.answer])
            handle.remove()
    for path, total in squares.items():
        found = merged.get_buffer(f"norms_{parameter_name(path)}")
        assert float(total.min()) > 0, path
        torch.testing.assert_close(found.double(), total.sqrt(), rtol=1e-4, atol=1e-4)


def test_the_norms_are_those_of_the_inputs_of_all_tokens(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    """With the starting merge on, in the head too, which the backbone does not run."""
    merged = made(pico_base)
    assert HEAD in merged.source
    assert_norms(pico_base, merged, examples)


def test_the_norms_where_a_model_flattens_rows(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    config = OPTConfig(
        vocab_size=len(pico_base.tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=48,
        num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    base = replace(pico_base, model=OPTForCausalLM(config).eval().requires_grad_(False))
    layer = "model.decoder.layers.0"
    update = random_update(base, {f"{layer}.fc1": 2, f"{layer}.fc2": 3}, seed=5)
    ingredients = Ingredients([update])
    settings = {"score": "input", "level": "parameter", "restore": "zero"}
    assert_norms(base, MergePrune(ingredients, prune=0.4, **settings), examples)


@pytest.mark.parametrize("score", ["input", "grad"])
@pytest.mark.parametrize("restore", ["zero", "init"])
@pytest.mark.parametrize("prune", [0.01, 0.4, 0.9])
def test_after_each_step_so_many_entries_of_each_tensor_are_pruned(
    pico_base: BaseModel, examples: list[Example], score: str, restore: str, prune: float
) -> None:
    merged = made(pico_base, prune, score, "parameter", restore)
    stepped(pico_base, merged, examples)
    for now, source in own_tensors(merged):
        back = now == (source if restore == "init" else 0)
        assert int(back.sum()) == max(1, math.floor(prune * now.numel()))
    smallest = min(now.numel() for now, _ in own_tensors(merged))
    assert (prune * smallest < 1) == (prune == 0.01)  # else that one is pruned at least is not met


@pytest.mark.parametrize("restore", ["zero", "init"])
@pytest.mark.parametrize("score", ["input", "grad"])
def test_the_lowest_are_pruned_after_every_step_anew(
    pico_base: BaseModel, examples: list[Example], score: str, restore: str
) -> None:
    merged = made(pico_base, 0.4, score, "parameter", restore)
    loop, by_hand = Steps(pico_base, merged, examples), ByHand(merged)
    pruned: list[list[Tensor]] = []
    for _ in range(4):
        loop.step()
        scores = by_hand.scores()
        merged.after_step()
        pruned.append([])
        for (now, source), of in zip(own_tensors(merged), scores, strict=True):
            back = now == (source if restore == "init" else 0)
            assert int(back.sum()) == math.floor(0.4 * now.numel())
            # The scores are in float32 there.
            assert float(of[back].max()) <= float(of[~back].min()) * (1 + 1e-3)
            pruned[-1].append(back)
    # Some that had been pruned grew again and were let be, while others took their place.
    regrown = [int((was & ~now).sum()) for was, now in zip(pruned[0], pruned[-1], strict=True)]
    assert sum(regrown) > 0


@pytest.mark.parametrize("level", ["parameter", "module"])
@pytest.mark.parametrize("score", ["input", "grad"])
def test_pruning_nothing_is_training_alone(
    pico_base: BaseModel, examples: list[Example], score: str, level: str
) -> None:
    merged, plain = made(pico_base, 0.0, score, level), made(pico_base)
    stepped(pico_base, merged, examples, steps=2)
    loop = Steps(pico_base, plain, examples)
    loop.step()
    loop.step()
    for name, parameter in plain.named_parameters():
        assert torch.equal(merged.get_parameter(name), parameter), name


def test_grad_scores_go_on_where_a_run_was_cut_short(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    """Bit for bit, though the scores of a step are smoothed over those before."""

    class Killed(Silent):
        steps = 0

        def advance(self, note: str = "") -> None:
            self.steps += 1
            if self.steps == 3:
                raise KeyboardInterrupt

    def trained(progress: Silent, store: Store | None) -> MergePrune:
        merged = made(pico_base, 0.4, "grad")
        # Trained on what is validated, so that the last step is the best.
        fit(pico_base, merged, examples, examples, replace(PLAN, steps=6), progress, store)
        return merged

    alone = trained(Silent(), None)
    with pytest.raises(KeyboardInterrupt):
        trained(Killed(), Store(tmp_path, {}))
    resumed = trained(Silent(), Store(tmp_path, {}))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("prune", "count"), [(0.1, 0), (0.15, 1), (0.3, 2), (0.45, 3), (0.6, 4), (0.99, 6)]
)
@pytest.mark.parametrize("score", ["input", "grad"])
@pytest.mark.parametrize("restore", ["zero", "init"])
def test_whole_modules_are_pruned_by_their_mean(
    pico_base: BaseModel,
    examples: list[Example],
    prune: float,
    count: int,
    score: str,
    restore: str,
) -> None:
    """Seven pairs of an adapter and a module, A and B of each side by side in `own_tensors`."""
    merged = made(pico_base, prune, score, "module", restore)
    loop, by_hand = Steps(pico_base, merged, examples), ByHand(merged)
    loop.step()
    scores = by_hand.scores()
    merged.after_step()
    gone = [torch.equal(t, s if restore == "init" else 0 * s) for t, s in own_tensors(merged)]
    assert gone[::2] == gone[1::2]
    both = [
        torch.cat([a.ravel(), b.ravel()]) for a, b in zip(scores[::2], scores[1::2], strict=True)
    ]
    order = sorted(range(7), key=lambda at: float(both[at].mean()))
    assert [at for at in range(7) if gone[2 * at]] == sorted(order[:count])


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
    trained, _ = fit(pico_base, merged, examples[:4], examples[4:], PLAN, Silent())
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
