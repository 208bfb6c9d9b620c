"""HeteroLoRA: what the proxies score, what modules get for it, and dynamic allocation."""

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.plain import CLOSED_ROWS, DenseModel, logits, loss
from torch import Tensor, nn

from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.budget import Budget
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.forward import collate
from recycle_cli.engine.store import Snapshot, Store
from recycle_cli.engine.training import Trained, TrainingPlan, train
from recycle_cli.errors import InputError, RecycleError
from recycle_cli.progress import Silent
from recycle_cli.tuning.catalog import METHODS
from recycle_cli.tuning.lora_allocations.hetero import (
    Reallocation,
    allotted,
    budget,
    enlarged,
    score,
    with_ranks,
)
from recycle_cli.tuning.lora_allocations.proxies import (
    PROXIES,
    constant,
    grad_norm,
    snip,
    synflow,
)
from recycle_cli.tuning.lora_architectures.fresh import Target, lora_targets
from recycle_cli.tuning.lora_form import Setup, form_budget, former_of, ordinary, train_form
from recycle_cli.tuning.peft_layers import factor_pair, peft_layers
from recycle_cli.tuning.target_lora import LoraRecipe, target_lora

TOKENS = list(range(3, 43))
PLAN = TrainingPlan(steps=12, lr=0.02, batch_size=3, eval_every=3, patience=100)
RECIPE = LoraRecipe(rank=2, alpha=4, dropout=0.1)
Q0 = "model.layers.0.self_attn.q_proj"
SQUARE = Target((8, 8), 2, 4, 2)


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS)


@pytest.fixture
def targets(pico_base: BaseModel) -> dict[str, Target]:
    """Of the bare model."""
    return lora_targets(pico_base, RECIPE)


@pytest.fixture
def wrapped(
    pico_base: BaseModel, targets: dict[str, Target]
) -> Iterator[dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """The pico model with a LoRA in every module, and its factors, none of which is zero."""
    with target_lora(pico_base, RECIPE, 0):
        pairs = {path: factor_pair(layer) for path, layer in peft_layers(pico_base).items()}
        generator = torch.Generator().manual_seed(0)
        for _, b in pairs.values():
            b.data.copy_(0.1 * torch.randn(b.shape, generator=generator))
        yield pairs


def dense_gradients(
    base: BaseModel, pairs: dict[str, Any], examples: Sequence[Example]
) -> dict[str, tuple[Tensor, Tensor]]:
    """dL/dA and dL/dB from dense matrices on the bare weights, rows one at a time; the scale is
    alpha / rank = 2."""
    factors = {
        path: (a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_())
        for path, (a, b) in pairs.items()
    }
    bare = {path: layer.base_layer.weight for path, layer in peft_layers(base).items()}
    model = copy.deepcopy(base.model)
    # The copy without PEFT's layers.
    for path, layer in peft_layers(replace(base, model=model)).items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer.base_layer)
    assert all(torch.equal(model.get_submodule(p).weight, w) for p, w in bare.items())
    dense = DenseModel(replace(base, model=model), {p: 2 * b @ a for p, (a, b) in factors.items()})
    loss(dense, examples).backward()
    return {path: (a.grad, b.grad) for path, (a, b) in factors.items()}  # type: ignore[misc]


def test_scores_are_those_of_autograd(
    pico_base: BaseModel, wrapped: dict[str, Any], examples: list[Example]
) -> None:
    expected = dense_gradients(pico_base, wrapped, examples)
    parts = (examples[:2], examples[2:5], examples[5:])
    batches = [collate(pico_base, part) for part in parts]
    norms = grad_norm(pico_base, wrapped, batches)
    assert norms == pytest.approx(
        {path: float(a.norm() + b.norm()) for path, (a, b) in expected.items()}, rel=1e-4
    )
    saliency = snip(pico_base, wrapped, batches)
    assert saliency == pytest.approx(
        {
            path: sum(
                float((factor.detach() * grad).abs().sum())
                for factor, grad in zip(wrapped[path], expected[path], strict=True)
            )
            for path in wrapped
        },
        rel=1e-4,
    )
    assert min(norms.values()) > 0
    assert min(saliency.values()) > 0
    assert len(set(constant(pico_base, wrapped, batches).values())) == 1


def test_synflow_is_snip_of_a_model_of_sizes(
    pico_base: BaseModel, wrapped: dict[str, Any], examples: list[Example]
) -> None:
    model = copy.deepcopy(pico_base.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
        model.get_input_embeddings().weight.fill_(1)
    sizes = replace(pico_base, model=model)
    pairs = {path: factor_pair(layer) for path, layer in peft_layers(sizes).items()}
    # The head is a matrix of its own, so that ones in the embeddings leave it alone.
    assert not pico_base.model.config.tie_word_embeddings
    batches = [collate(pico_base, examples)]
    expected = snip(sizes, pairs, batches)
    assert synflow(pico_base, wrapped, batches) == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def signed_zero(pico_base: BaseModel) -> Iterator[None]:
    """A weight that is zero and has a sign."""
    weights = pico_base.model.get_input_embeddings().weight.detach()
    before = weights[7, 0].clone()
    weights[7, 0] = -0.0
    yield
    weights[7, 0] = before


@pytest.mark.usefixtures("signed_zero")
@pytest.mark.parametrize("name", list(PROXIES))
def test_scoring_leaves_no_trace(
    pico_base: BaseModel, wrapped: dict[str, Any], examples: list[Example], name: str
) -> None:
    parameters = [factor for pair in wrapped.values() for factor in pair]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for at, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 0.1 * at)
    optimizer.step()
    weights = copy.deepcopy(pico_base.model.state_dict())
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    state, random = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    wants = [parameter.requires_grad for parameter in pico_base.model.parameters()]
    # In the midst of a step, where dropout is on.
    pico_base.model.train()

    score(pico_base, name, examples, PLAN)

    now = pico_base.model.state_dict()
    for key, weight in weights.items():
        assert torch.equal(now[key].view(torch.int32), weight.view(torch.int32)), key
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    for index, of_parameter in optimizer.state_dict()["state"].items():
        for key, tensor in of_parameter.items():
            assert torch.equal(tensor, state["state"][index][key])
    assert torch.equal(torch.get_rng_state(), random)
    assert [p.requires_grad for p in pico_base.model.parameters()] == wants
    assert all(module.training for module in pico_base.model.modules())
    pico_base.model.eval()
    hooks = pico_base.model.get_input_embeddings()._forward_hooks
    assert not hooks


@pytest.mark.parametrize("name", ["snip", "synflow"])
def test_at_the_start_of_a_lora_sizes_say_nothing(
    pico_base: BaseModel, examples: list[Example], name: str
) -> None:
    with target_lora(pico_base, RECIPE, 0):
        with pytest.raises(InputError) as caught:
            score(pico_base, name, examples, PLAN)
        assert "B is zero in every module" in caught.value.message
        assert "--proxy-steps" in caught.value.hint
        # There A has no gradient, so the norm is that of B's.
        assert min(score(pico_base, "grad-norm", examples, PLAN).values()) > 0


@pytest.mark.parametrize("name", ["grad-norm", "snip"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_that_the_answer_depends_on_comes_first(
    pico_base: BaseModel,
    wrapped: dict[str, Any],
    targets: dict[str, Target],
    examples: list[Example],
    name: str,
    layer: int,
) -> None:
    """With hardly anything of what the other one does in the model's hidden states."""
    other = pico_base.model.model.layers[1 - layer]
    with contextlib.ExitStack() as hooks:
        for part in (other.self_attn.o_proj, other.mlp.down_proj):
            hook = part.register_forward_hook(lambda _m, _i, y: 0.01 * y)
            hooks.callback(hook.remove)
        scores = score(pico_base, name, examples, PLAN)
    best = sorted(scores, key=lambda path: scores[path], reverse=True)[:7]
    assert all(path.startswith(f"model.layers.{layer}.") for path in best)
    # Half of the modules, which are alike in both layers, is that layer.
    assert set(allotted(targets, scores, 0.5)) == set(best)


def test_a_module_without_input_gets_nothing(pico_base: BaseModel, examples: list[Example]) -> None:
    targets = lora_targets(pico_base, RECIPE)
    with target_lora(pico_base, RECIPE, 0):
        module = pico_base.model.get_submodule(Q0)
        hook = module.register_forward_pre_hook(lambda _m, inputs: (inputs[0] * 0,))
        scores = score(pico_base, "grad-norm", examples, PLAN)
        hook.remove()
    assert scores[Q0] == 0
    # Nor do keys matter that no query asks for.
    dead = {Q0, Q0.replace("q_proj", "k_proj")}
    assert set(allotted(targets, scores, 1.0)) == set(targets) - dead


def test_alike_modules_are_a_share_of_all() -> None:
    targets = {f"m{at}": SQUARE for at in range(10)}
    scores = {name: float(at + 1) for at, name in enumerate(targets)}
    # floor(0.25 * 10) at rank 8, and the rest of the budget in the next.
    assert allotted(targets, scores, 0.25) == {"m9": 8, "m8": 8, "m7": 4}
    assert allotted(targets, scores, 0.2) == {"m9": 8, "m8": 8, "m7": 4}
    assert allotted(targets, scores, 0.5) == {f"m{at}": 4 for at in (9, 8, 7, 6, 5)}
    assert allotted(targets, scores, 1.0) == dict.fromkeys(reversed(targets), 2)


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.7, 1.0])
@pytest.mark.parametrize("rslora", [False, True])
def test_as_many_numbers_are_trained_as_in_the_uniform_baseline(
    pico_base: BaseModel, share: float, rslora: bool
) -> None:
    recipe = replace(RECIPE, rank_pattern={"up_proj": 3}, use_rslora=rslora)
    targets = lora_targets(pico_base, recipe)
    with target_lora(pico_base, recipe, 0) as peft_model:
        uniform = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert budget(targets) == uniform
    generator = torch.Generator().manual_seed(0)
    scores = {path: float(torch.rand((), generator=generator)) for path in targets}
    ranks = allotted(targets, scores, share)
    with target_lora(pico_base, with_ranks(recipe, targets, ranks, share), 0) as peft_model:
        layers = peft_layers(pico_base)
        assert {path: factor_pair(layer)[0].shape[0] for path, layer in layers.items()} == ranks
        count = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
        scales = {path: layer.scaling["default"] for path, layer in layers.items()}
    # Short of it by less than a rank of the module that was next.
    assert 0 <= uniform - count < max(sum(target.shape) for target in targets.values())
    for path, scale in scales.items():
        large = min(math.ceil(targets[path].rank / share), *targets[path].shape)
        assert scale == pytest.approx(4 / large ** (0.5 if rslora else 1), rel=1e-6)


def test_the_large_rank_is_no_more_than_a_module_has(pico_base: BaseModel) -> None:
    targets = lora_targets(pico_base, replace(RECIPE, rank=16))
    with target_lora(pico_base, enlarged(replace(RECIPE, rank=16), targets, 0.25), 0):
        for path, layer in peft_layers(pico_base).items():
            assert factor_pair(layer)[0].shape[0] == min(64, *targets[path].shape)


def test_the_tiniest_share_neither_asks_for_a_rank_that_no_module_has_nor_mutes_the_lora(
    pico_base: BaseModel, targets: dict[str, Target]
) -> None:
    recipe = enlarged(RECIPE, targets, 1e-4)
    assert recipe.rank == 32
    with target_lora(pico_base, recipe, 0):
        for path, layer in peft_layers(pico_base).items():
            assert layer.scaling["default"] == pytest.approx(4 / min(targets[path].shape))


def test_ties_are_broken_by_chance_alone() -> None:
    targets = {f"m{at}": SQUARE for at in range(5)}
    scores = dict.fromkeys(targets, 1.0)
    first = Counter(next(iter(allotted(targets, scores, 0.2, seed))) for seed in range(1000))
    assert first.keys() == targets.keys()
    # Five standard deviations of a fifth of a thousand.
    assert all(abs(count - 200) < 64 for count in first.values())
    assert allotted(targets, scores, 0.2, 3) == allotted(targets, scores, 0.2, 3)


def test_without_any_score_nothing_is_allotted() -> None:
    with pytest.raises(InputError, match="all scores are 0"):
        allotted({"m": SQUARE}, {"m": 0.0}, 0.5)


def run(
    base: BaseModel,
    examples: list[Example],
    store: Store | None = None,
    watch: list[tuple[list[str], dict[str, Tensor]]] | None = None,
    plan: TrainingPlan = PLAN,
) -> tuple[Trained, Reallocation, dict[str, Tensor], Tensor]:
    """Dynamic allocation every four steps; `watch` gets what was on and the factors, each step."""
    targets = lora_targets(base, RECIPE)
    with target_lora(base, enlarged(RECIPE, targets, 0.25), 0) as peft_model:
        setup = Setup(base, RECIPE, plan, examples)
        made = Reallocation(setup, targets, proxy="grad-norm", share=0.25, every=4)
        made.begin(plan)
        parameters = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
        own = made.hooks()

        def set_training(on: bool) -> None:
            own.set_training(on)
            peft_model.train(on)
            if not on and watch is not None:
                watch.append((made.enabled(), copy.deepcopy(parameters)))

        hooks = replace(own, set_training=set_training)
        trained = train(base, parameters, examples, examples, plan, Silent(), hooks, store)
        made.settle()
        with torch.no_grad():
            found = {name: p.detach().clone() for name, p in parameters.items()}
            return trained, made, found, logits(base.model, TOKENS)


def test_who_is_off_stands_still_and_is_not_in_the_model(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    watch: list[tuple[list[str], dict[str, Tensor]]] = []
    plan = replace(PLAN, warmup=0.0)
    targets = lora_targets(pico_base, RECIPE)
    _, made, _, _ = run(pico_base, examples, watch=watch, plan=plan)
    assert len(watch) == 12
    for number, (on, now) in enumerate(watch):
        size = sum(8 * sum(targets[path].shape) for path in on)
        assert 0.5 * budget(targets) < size <= budget(targets)
        if number:
            before_on, before = watch[number - 1]
            assert number % 4 == 0 or on == before_on
            moved = {name for name in now if not torch.equal(now[name], before[name])}
            assert {any(f"{path}.lora" in name for path in on) for name in moved} == {True}
            assert all(any(f"{path}.lora_B" in name for name in moved) for path in on)
    told, (on, _) = made.settle(), watch[-1]
    assert told["scorings"] == 3
    assert told["modules_ever_on"] >= len(watch[0][0])
    trained = sum(8 * sum(targets[path].shape) for path in made.enabled())
    assert told["share_of_uniform"] == trained / budget(targets)
    assert 0.5 < told["share_of_uniform"] <= 1
    assert len(on) <= told["modules_ever_on"]


def test_the_best_state_comes_back_with_what_was_on(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    trained, made, found, after = run(pico_base, examples)
    assert trained.best_loss < trained.history[0][1] - 0.05
    scale = dict.fromkeys(made.layers, 4 / 8)
    deltas = {
        path: scale[path]
        * found[f"base_model.model.{path}.lora_B.default.weight"]
        @ found[f"base_model.model.{path}.lora_A.default.weight"]
        for path in made.enabled()
    }
    with torch.no_grad():
        expected = logits(DenseModel(pico_base, deltas), TOKENS)
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-4)


def test_a_resumed_run_ends_as_the_undisturbed_one(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    expected, made, factors, _ = run(pico_base, examples)

    class Stopped(Exception):
        pass

    class At(Store):
        def save(self, snapshot: Snapshot) -> None:
            super().save(snapshot)
            if snapshot.step == 6:
                raise Stopped

    with pytest.raises(Stopped):
        run(pico_base, examples, At(tmp_path, {}))
    found, again, same, _ = run(pico_base, examples, Store(tmp_path, {}))
    assert found == expected
    assert again.enabled() == made.enabled()
    assert again.settle() == made.settle()
    assert all(torch.equal(factors[name], same[name]) for name in factors)


# --- memory --------------------------------------------------------------------------------------

STATIC = {"allocation": "hetero", "proxy": "snip", "share": 0.25, "proxy_steps": 2}
DYNAMIC = {"allocation": "hetero", "proxy": "grad-norm", "share": 0.25, "reallocate_every": 2}


def settings(given: dict[str, Any]) -> dict[str, Any]:
    return dict(METHODS["lora"].settings(given, target=False))


@contextlib.contextmanager
def passes(base: BaseModel) -> Iterator[list[int]]:
    """The rows of each pass over the model that gradients are taken of."""
    seen: list[int] = []

    def note(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            seen.append(len(inputs[0]))

    hook = base.model.base_model.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()


def large_budget(base: BaseModel, examples: list[Example], plan: TrainingPlan) -> Budget:
    """Of an ordinary LoRA with the large rank in every module."""
    recipe = enlarged(RECIPE, lora_targets(base, RECIPE), 0.25)
    setup = Setup(base, recipe, plan, examples)
    with ordinary(setup) as form:
        return form_budget(setup, form, 0)


@pytest.mark.parametrize("given", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_scores_are_taken_in_passes_that_fit(
    pico_base: BaseModel, examples: list[Example], given: dict[str, Any]
) -> None:
    plan = replace(PLAN, steps=2, batch_size=4, eval_every=2)
    whole = large_budget(pico_base, examples, plan)
    # Room for a row, and for all that is kept beside the gradients, but not for two rows.
    limit = whole.needed(1) + whole.trained + whole.a_row // 2
    setup = Setup(pico_base, RECIPE, plan, examples, max_memory=limit)
    with passes(pico_base) as seen, former_of(settings(given))(setup) as form:
        # The first four measure one row and two, and what they begin with.
        formed = seen[4:]
        assert bool(formed) == (given is STATIC)
        fitted = form_budget(setup, form, limit).fitted(plan)
        assert given is STATIC or fitted.micro_batch == 1
        seen.clear()
        train_form(setup, form, examples, replace(fitted, micro_batch=1), Silent())
    assert {*formed, *seen} == {1}


def test_what_does_not_fit_is_refused_before_it_is_scored(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    limit = large_budget(pico_base, examples, PLAN).needed(0)
    setup = Setup(pico_base, RECIPE, PLAN, examples, max_memory=limit)
    with (
        passes(pico_base) as seen,
        pytest.raises(RecycleError, match="training takes"),
        former_of(settings(STATIC))(setup),
    ):
        pass
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["grad-norm", "snip", "synflow"])
def test_scores_are_the_same_where_activations_are_computed_again(
    pico_base: BaseModel, wrapped: dict[str, Any], examples: list[Example], name: str
) -> None:
    # What passes over two rows come to; what all rows begin with is a row of its own.
    calls: list[int] = []
    mlp = pico_base.model.base_model.layers[0].mlp
    hook = mlp.register_forward_pre_hook(lambda _m, inputs: calls.append(len(inputs[0])))
    plan = replace(PLAN, batch_size=2)
    expected = score(pico_base, name, examples, plan)
    once = calls.count(2)
    found = score(pico_base, name, examples, replace(plan, checkpointing=True))
    hook.remove()
    tiny = 1e-6 * max(expected.values())
    assert found == pytest.approx(expected, rel=1e-4, abs=tiny)
    assert once == len(examples) // 2
    assert calls.count(2) == 3 * once


@pytest.mark.parametrize("given", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_where_only_memory_is_asked_for_nothing_is_scored(
    pico_base: BaseModel, examples: list[Example], given: dict[str, Any]
) -> None:
    setup = Setup(pico_base, RECIPE, PLAN, examples, only_measured=True)
    with passes(pico_base) as seen, former_of(settings(given))(setup) as form:
        assert not seen
        found = form_budget(setup, form, 0)
        # Of what all rows begin with and of the rows, one and two.
        assert len(seen) <= 4
        numbers = sum(parameter.numel() for parameter in form.parameters.values())
    assert numbers == 4 * budget(lora_targets(pico_base, RECIPE))
    whole = large_budget(pico_base, examples, PLAN)
    assert (found.fixed, found.a_row) == (whole.fixed, whole.a_row)
    kept_beside = 1 if given is STATIC else 2
    assert found.trained == whole.trained + kept_beside * 4 * numbers


def test_proxy_training_ends_at_its_last_step_even_where_that_is_worse(
    pico_base: BaseModel, examples: list[Example]
) -> None:
    """The best state would be the start, where B is zero and snip has nothing to score."""
    plan = replace(PLAN, lr=3.0, warmup=0.0)
    targets = lora_targets(pico_base, RECIPE)
    large = replace(RECIPE, rank=8)
    with target_lora(pico_base, large, 0) as peft_model:
        parameters = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
        short = replace(plan, steps=2, eval_every=2)
        trained = train(pico_base, parameters, examples, examples, short, Silent())
        assert trained.best_step == 0
    with former_of(settings(STATIC))(Setup(pico_base, RECIPE, plan, examples)) as form:
        assert 0 < len(form.update()) < len(targets)
