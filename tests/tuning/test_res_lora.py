"""ResLoRA: shortcuts between layers, and their merges back."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.plain import CLOSED_ROWS, DenseModel, logits
from torch import Tensor, nn

from recycle_cli.engine.adapted import with_adapter
from recycle_cli.engine.base_model import BaseModel
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.training import TrainingPlan
from recycle_cli.lora.folder import read_adapter, write_adapter
from recycle_cli.progress import Silent
from recycle_cli.tuning.lora_architectures.fresh import Target, lora_targets
from recycle_cli.tuning.lora_architectures.res_lora import (
    WINDOW,
    BlockShortcuts,
    InputShortcuts,
    MiddleShortcuts,
    ResLora,
    Sizes,
    kind_of,
    linked,
)
from recycle_cli.tuning.target_lora import LoraRecipe, target_lora
from recycle_cli.tuning.tuned import fit

TOKENS = list(range(3, 43))
PLAN = TrainingPlan(steps=6, lr=0.02, batch_size=3, eval_every=3)
RECIPE = LoraRecipe(rank=3, alpha=6, dropout=0.0, target_modules=("q_proj", "v_proj", "down_proj"))
KINDS = (BlockShortcuts, MiddleShortcuts, InputShortcuts)
FIRST, SECOND = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[:3])


def fresh(kind: type[ResLora], base: BaseModel, recipe: LoraRecipe = RECIPE) -> ResLora:
    reach = {} if kind is InputShortcuts else {"reach": 4}
    return kind(base, recipe, seed=3, **reach)  # type: ignore[call-arg]


def make(kind: type[ResLora], base: BaseModel, recipe: LoraRecipe = RECIPE) -> ResLora:
    """With B drawn too, so that every term counts."""
    made = fresh(kind, base, recipe)
    generator = torch.Generator().manual_seed(0)
    for factor in made.lora_B.values():
        factor.data.copy_(0.2 * torch.randn(factor.shape, generator=generator))
    return made


def products(made: ResLora, path: str) -> Tensor:
    """B A of a module's own LoRA, in its dtype; the scale is alpha / rank = 2."""
    name = path.replace(".", "/")
    return 2 * made.lora_B[name].detach() @ made.lora_A[name].detach()


def chain_of_two(made: ResLora, first: Tensor, second: Tensor) -> tuple[nn.Linear, Tensor, Tensor]:
    """Passes inputs through both q projections, as a pass of the model does."""
    module = nn.Linear(32, 32, bias=False).double()
    forwards = made.forwards(None, 0)  # type: ignore[arg-type]  # of no use to it
    return module, forwards[FIRST](module, first), forwards[SECOND](module, second)


def inputs(*seeds: int) -> list[Tensor]:
    return [
        torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in seeds
    ]


def test_modules_of_a_kind_are_chained_in_the_order_of_layers() -> None:
    square, other = Target((8, 8), 2, 1, 1), Target((8, 4), 2, 1, 1)
    targets = {f"layers.{at}.{name}": square for at in range(5) for name in ("q", "mlp.up")}
    assert kind_of("model.layers.11.mlp.3.up") == "model.layers.*.mlp.3.up"
    assert kind_of("lm_head") == "lm_head"
    links = linked(targets, 2)
    assert links["layers.0.q"] == []
    assert links["layers.1.q"] == ["layers.0.q"]
    assert links["layers.4.mlp.up"] == ["layers.2.mlp.up", "layers.3.mlp.up"]
    assert len(linked(targets, 99)["layers.4.q"]) == 4
    assert not any(linked(targets, 0).values())
    # Where a shape or a rank differs, the chain begins anew.
    for broken in (other, Target((8, 8), 3, 1, 1)):
        links = linked({**targets, "layers.2.q": broken}, 99)
        assert links["layers.2.q"] == links["layers.3.q"] == []
        assert links["layers.4.q"] == ["layers.3.q"]
        assert len(links["layers.4.mlp.up"]) == 4


def test_targets_ranks_and_scales_are_those_of_peft(pico_base: BaseModel) -> None:
    for recipe in (
        LoraRecipe(rank=4, alpha=6),
        LoraRecipe(rank=4, alpha=6, use_rslora=True, target_modules=("mlp.up_proj", "lm_head")),
        LoraRecipe(
            rank=4,
            target_modules=("q_proj", "v_proj"),
            rank_pattern={"layers.1.self_attn.q_proj": 2},
            alpha_pattern={"v_proj": 3},
        ),
    ):
        found = lora_targets(pico_base, recipe)
        with target_lora(pico_base, recipe, 0) as peft_model:
            theirs = {
                name.removeprefix("base_model.model."): module
                for name, module in peft_model.named_modules()
                if hasattr(module, "lora_A")
            }
            assert list(found) == list(theirs)
            for path, target in found.items():
                module = theirs[path]
                assert target.shape == (module.out_features, module.in_features)
                assert target.rank == module.r["default"]
                assert target.scale == pytest.approx(module.scaling["default"])


@pytest.mark.parametrize("kind", [BlockShortcuts, MiddleShortcuts])
def test_without_shortcuts_it_is_a_plain_lora(pico_base: BaseModel, kind: type[ResLora]) -> None:
    made = make(kind, pico_base)
    made.links = linked(made.targets, 0)
    deltas = {path: products(made, path) for path in made.targets}
    with torch.no_grad():
        expected = logits(DenseModel(pico_base, deltas), TOKENS)
        with made.attached(pico_base):
            found = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_the_base(pico_base: BaseModel, kind: type[ResLora]) -> None:
    made = fresh(kind, pico_base)
    with torch.no_grad():
        before = logits(pico_base.model, TOKENS)
        with made.attached(pico_base):
            assert torch.equal(logits(pico_base.model, TOKENS), before)


def test_each_form_adds_what_its_equation_says(pico_base: BaseModel) -> None:
    one, two = inputs(1, 2)
    for kind in KINDS:
        made = make(kind, pico_base).double()
        module, y_one, y_two = chain_of_two(made, one, two)
        first, second = products(made, FIRST), products(made, SECOND)
        name_one, name_two = (path.replace(".", "/") for path in (FIRST, SECOND))
        b_two, a_one = 2 * made.lora_B[name_two].detach(), made.lora_A[name_one].detach()
        added = {
            BlockShortcuts: (one @ first.T, two @ (first + second).T),
            MiddleShortcuts: (one @ first.T, two @ second.T + one @ (b_two @ a_one).T),
            InputShortcuts: (2 * one @ first.T, (two + one) @ second.T),
        }[kind]
        for y, x, plus in zip((y_one, y_two), (one, two), added, strict=True):
            torch.testing.assert_close(y, x @ module.weight.T + plus, rtol=1e-12, atol=1e-12)


def test_block_shortcuts_export_exactly(
    pico_base: BaseModel, examples: list[Example], tmp_path: Path
) -> None:
    made = fresh(BlockShortcuts, pico_base)
    trained, _ = fit(pico_base, made, examples, examples, PLAN, Silent())
    assert trained.best_loss < trained.history[0][1] - 0.05
    with torch.no_grad(), made.attached(pico_base):
        expected = logits(pico_base.model, TOKENS)
    write_adapter(tmp_path, made.result(), "pico")
    update = read_adapter(tmp_path).update
    assert {path: piece.rank for path, piece in update.items()} == {
        path: 3 if ".0." in path else 6 for path in made.targets
    }
    with torch.no_grad(), with_adapter(pico_base, update):
        found = logits(pico_base.model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [MiddleShortcuts, InputShortcuts])
@pytest.mark.parametrize("ratio", [0.3, 2.5])
def test_where_inputs_are_multiples_the_merge_is_exact(
    pico_base: BaseModel, kind: type[ResLora], ratio: float
) -> None:
    """X_{n-1} = c x_n in every pass, so that the ratio of their sizes is c."""
    made = make(kind, pico_base).double()
    made.train()
    (two,) = inputs(2)
    module, y_one, y_two = chain_of_two(made, ratio * two, two)
    made.after_step()
    for path, x, y in ((FIRST, ratio * two, y_one), (SECOND, two, y_two)):
        merged = made.result()[path]
        assert merged.rank == 3
        found = x @ (module.weight + merged.dense()).T
        # The sizes are float32.
        torch.testing.assert_close(found, y, rtol=0, atol=1e-6)


def test_ratios_go_by_the_last_hundred_passes() -> None:
    sizes = Sizes(["a", "b"], torch.device("cpu"))
    assert float(sizes.ratio("a", "b")) == 1
    for number in range(1, 251):
        sizes.note("a", torch.full((4,), float(number)).norm())
        sizes.note("b", torch.ones(9).norm())
    last = range(151, 251)
    assert len(last) == WINDOW
    assert float(sizes.ratio("a", "b")) == pytest.approx(2 * sum(last) / 100 / 3)
    assert float(sizes.ratio("b", "a")) == pytest.approx(3 / (2 * sum(last) / 100))


def test_sizes_are_those_of_steps_alone(pico_base: BaseModel, examples: list[Example]) -> None:
    """Not of validations, nor of passes that no step came of, as for a memory budget."""
    made = MiddleShortcuts(pico_base, RECIPE, seed=3, reach=4)
    with torch.no_grad(), made.attached(pico_base):
        logits(pico_base.model, TOKENS)
        made.train()
        logits(pico_base.model, TOKENS)
        made.eval()
        made.after_step()
    assert not made.sizes.passes.any()
    plan = replace(PLAN, steps=2, eval_every=1, warmup=0.0)
    trained, _ = fit(pico_base, made, examples, examples, plan, Silent())
    # Rows begin alike: one pass for the beginning and one for the rest.
    assert made.sizes.passes.tolist() == [2 * trained.best_step] * 6


@pytest.mark.parametrize("kind", [MiddleShortcuts, InputShortcuts])
def test_gradients_reach_the_layer_before_through_the_shortcut(
    pico_base: BaseModel, kind: type[ResLora]
) -> None:
    """With the first layer's own output cut off: its A in the middle, what made its input."""
    made = make(kind, pico_base).double()
    one, two = inputs(1, 2)
    one.requires_grad_()
    _, _, y_two = chain_of_two(made, one, two)
    source = one if kind is InputShortcuts else made.lora_A[FIRST.replace(".", "/")]
    y_two.square().sum().backward()
    assert source.grad is not None
    assert float(source.grad.abs().max()) > 0.01
    # And without the shortcut it would not.
    made.links = linked(made.targets, 0)
    source.grad = None
    _, _, y_two = chain_of_two(made, one, two)
    y_two.square().sum().backward()
    assert source.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_merging_leave_the_base_as_it_is(
    pico_base: BaseModel, examples: list[Example], kind: type[ResLora]
) -> None:
    before = copy.deepcopy(pico_base.model.state_dict())
    made = fresh(kind, pico_base)
    trained, figures = fit(pico_base, made, examples, examples, PLAN, Silent())
    assert trained.best_loss < trained.history[0][1] - 0.05
    made.result()
    after = pico_base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert ("mean_input_ratio" in figures) == (kind is not BlockShortcuts)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_for_training_alone(pico_base: BaseModel, kind: type[ResLora]) -> None:
    recipe = LoraRecipe(rank=3, dropout=0.5, target_modules=("q_proj",))
    made = make(kind, pico_base, recipe)
    with torch.no_grad(), made.attached(pico_base):
        one, two = (logits(pico_base.model, TOKENS) for _ in range(2))
        assert torch.equal(one, two)
        made.train()
        one, two = (logits(pico_base.model, TOKENS) for _ in range(2))
        assert not torch.equal(one, two)
