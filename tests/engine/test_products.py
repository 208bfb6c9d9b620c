"""The adaptive layer against PEFT with several adapters on, whose scalings are tensors."""

import copy
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from support import pico, plain
from support.adapters import write_peft_adapter
from support.low_rank import random_piece
from support.pico import ATTENTION, MLP
from support.plain import CLOSED_ROWS, DOWN, Q0, Q1, DenseModel, mixed_updates
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recycle_cli.engine.adapted import Gate, ModuleComponents, concatenate, replaced, shapes_of
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.checkpointing import gradient_checkpointing
from recycle_cli.engine.device import Compute
from recycle_cli.engine.encoding import Example, encode_examples
from recycle_cli.engine.forward import answer_loss, collate
from recycle_cli.engine.products import (
    FORMS,
    Form,
    Reuse,
    attached,
    choose_form,
    choose_forms,
    frozen_product,
    trained_product,
)
from recycle_cli.lora.folder import read_adapter
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.settings import Settings

CPU = torch.device("cpu")
TOKENS = list(range(3, 43))
DTYPES = (torch.float32, torch.bfloat16)
# Ranks 4, 8, 2, 5 and 3; modules that some lack; rank and alpha patterns; rsLoRA.
POOL: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8, "target_modules": list(ATTENTION)},
    "patterned": {
        "target_modules": ["q_proj", *MLP],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"down_proj": 3},
    },
    "narrow": {"r": 3, "target_modules": ["o_proj"]},
}
# Two linear modules with a bias, one of them wide.
SIDES = {"first": (24, 16), "second": (8, 24)}
LORAS: dict[str, dict[str, Any]] = {
    "one": {"r": 3, "lora_alpha": 7, "target_modules": ["first", "second"]},
    "two": {"r": 11, "use_rslora": True, "target_modules": ["second"]},
    "three": {"r": 2, "target_modules": ["first", "second"], "alpha_pattern": {"first": 5}},
}


def relative(found: Tensor, expected: Tensor) -> float:
    """The distance as a share of what was expected."""
    difference = found.detach().double() - expected.detach().double()
    return float(difference.norm() / expected.detach().double().norm())


class Coefficients:
    """A number for each adapter and module, of random size and sign."""

    def __init__(self, updates: Sequence[ModelUpdate], dtype: torch.dtype = torch.float32) -> None:
        self.components = concatenate(updates)
        generator = torch.Generator().manual_seed(5)
        drawn = 0.2 * torch.randn(len(self.components), len(updates), generator=generator)
        self.rows = {
            path: row.to(dtype).requires_grad_()
            for path, row in zip(self.components, drawn, strict=True)
        }

    @property
    def gates(self) -> dict[str, Gate]:
        return {path: self.gate(path) for path in self.rows}

    def gate(self, path: str) -> Gate:
        return lambda: self.rows[path][self.components[path].owner]

    def forms(self, form: Form) -> dict[str, Form]:
        return dict.fromkeys(self.rows, form)

    def gradients(self, loss: Tensor) -> Tensor:
        """Of all of them, one after another; those of an adapter that lacks a module are zero."""
        found = torch.autograd.grad(loss, list(self.rows.values()))
        return torch.cat(found)


def put_on_by_peft(model: nn.Module, coefficients: Coefficients) -> None:
    """Makes PEFT scale each adapter in each module by a coefficient too."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for name, scale in module.scaling.items():
                assert isinstance(scale, int | float)
                module.scaling[name] = scale * coefficients.rows[path][int(name)]


def peft_mixture(model: Any, folders: Sequence[Path], coefficients: Coefficients) -> Any:
    """PEFT's model with all adapters on a copy of a transformers model; named 0, 1 and so on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = PeftModel.from_pretrained(copy.deepcopy(model), folders[0], adapter_name="0")
        for number, folder in enumerate(folders[1:], start=1):
            wrapped.load_adapter(folder, adapter_name=str(number))
    wrapped.base_model.set_adapter([str(number) for number in range(len(folders))])
    wrapped.to(next(model.parameters()).dtype).eval()
    put_on_by_peft(wrapped.base_model.model, coefficients)
    return wrapped.base_model.model


@pytest.fixture(scope="module")
def folders(pico_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("adapters")
    return [
        write_peft_adapter(place / name, pico_folder, seed, **config)
        for seed, (name, config) in enumerate(POOL.items())
    ]


@pytest.fixture(scope="module")
def updates(folders: list[Path]) -> list[ModelUpdate]:
    return [read_adapter(folder).update for folder in folders]


@pytest.fixture(scope="module")
def examples(pico_base: BaseModel) -> list[Example]:
    return encode_examples(pico_base, CLOSED_ROWS[1:4])


def in_dtype(base: BaseModel, dtype: torch.dtype) -> BaseModel:
    return dataclasses.replace(
        base, model=copy.deepcopy(base.model).to(dtype), compute=Compute(CPU, dtype, "")
    )


def wide(updates: Sequence[ModelUpdate]) -> list[ModelUpdate]:
    return [{m: piece.to(torch.float64) for m, piece in one.items()} for one in updates]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_outputs_and_gradients_are_those_of_peft(
    pico_base: BaseModel,
    folders: list[Path],
    updates: list[ModelUpdate],
    examples: list[Example],
    dtype: torch.dtype,
    form: Form,
) -> None:
    """In float64 the model's norms and angles stay in float32, and a rounding of theirs may fall
    the other way."""
    base = in_dtype(pico_base, dtype)
    ours = Coefficients(updates if dtype == torch.float32 else wide(updates), dtype)
    theirs = peft_mixture(base.model, folders, ours)
    expected = plain.logits(theirs, TOKENS)
    expected_gradients = ours.gradients(plain.loss(theirs, examples))
    with attached(base, ours.components, ours.gates, ours.forms(form)):
        found = plain.logits(base.model, TOKENS)
        gradients = ours.gradients(plain.loss(base.model, examples))
    assert relative(plain.logits(base.model, TOKENS), expected) > 0.1
    present = torch.cat(
        [torch.bincount(p.owner, minlength=len(POOL)) for p in ours.components.values()]
    )
    assert (gradients != 0).equal(present > 0)
    assert {0, 2, 3, 4, 5, 8} == set(present.tolist())
    tolerance = 2e-6 if dtype == torch.float32 else 1e-8
    assert relative(found, expected) < tolerance
    assert relative(gradients, expected_gradients) < tolerance


class TwoLayers(nn.Module):
    """Linear modules with a bias and something between them; all of it exact in float64."""

    def __init__(self) -> None:
        super().__init__()
        (hidden, width), (out, _) = SIDES.values()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.second(torch.tanh(self.first(x)))
        return output


def two_layers() -> BaseModel:
    torch.manual_seed(0)
    model = TwoLayers().double().requires_grad_(False)
    return BaseModel("two-layers", model, None, Compute(CPU, torch.float64, ""))


def peft_two_layers(base: BaseModel) -> tuple[nn.Module, list[ModelUpdate]]:
    """PEFT's wrapper with random factors, and the same factors as updates."""
    wrapped: Any = None
    for number, config in enumerate(LORAS.values()):
        lora = LoraConfig(**config)
        if wrapped is None:
            wrapped = get_peft_model(copy.deepcopy(base.model), lora, adapter_name="0")
        else:
            wrapped.add_adapter(str(number), lora)
    wrapped.base_model.set_adapter([str(number) for number in range(len(LORAS))])
    wrapped.double().eval().requires_grad_(False)
    updates: list[ModelUpdate] = [{} for _ in LORAS]
    generator = torch.Generator().manual_seed(1)
    for path, module in wrapped.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            for name, scale in module.scaling.items():
                a, b = module.lora_A[name].weight, module.lora_B[name].weight
                for factor in (a, b):
                    drawn = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                    factor.copy_(drawn)
                updates[int(name)][path] = LowRankUpdate(a.clone(), b.clone(), scale)
    return wrapped.base_model.model, updates


@pytest.mark.parametrize("forms", list(itertools.product(FORMS, FORMS)), ids=str)
def test_in_float64_they_agree_to_the_last_digits(forms: tuple[Form, Form]) -> None:
    base = two_layers()
    theirs, updates = peft_two_layers(base)
    assert [sorted(update) for update in updates] == [
        sorted(config["target_modules"]) for config in LORAS.values()
    ]
    ours = Coefficients(updates, torch.float64)
    put_on_by_peft(theirs, ours)
    # Rows and positions, and an input that wants a gradient.
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, 8, dtype=torch.float64)
    inputs = [x, *ours.rows.values()]
    expected = theirs(x)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    chosen = dict(zip(SIDES, forms, strict=True))
    with attached(base, ours.components, ours.gates, chosen):
        found = base.model(x)
        gradients = torch.autograd.grad((found * weights).sum(), inputs)
    assert found.shape == expected.shape
    assert relative(found, expected) < 1e-14
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert one.dtype == torch.float64
        assert relative(one, other) < 1e-13


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_differences(form: Form) -> None:
    piece = concatenate([{"m": random_piece(0, 3, (5, 4), -0.7).to(torch.float64)}])["m"]
    module = nn.Linear(4, 5).double().requires_grad_(False)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def output(x: Tensor, z: Tensor) -> Tensor:
        return frozen_product(piece, lambda: z, form)(module, x)

    assert torch.autograd.gradcheck(output, (x, z))


@pytest.fixture(scope="module")
def biased_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A Qwen2, whose q, k and v have a bias."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("qwen2")
    tokenizer = pico.make_tokenizer()
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.15,
            pad_token_id=0,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_base_model(str(folder), Settings(folder, True, "float32", "cpu"))


@pytest.mark.parametrize("form", FORMS)
def test_a_module_keeps_its_bias(
    biased_base: BaseModel, examples: list[Example], tmp_path: Path, form: Form
) -> None:
    configs = ({}, {"r": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True})
    model_folder = Path(biased_base.id)
    folders = [
        write_peft_adapter(tmp_path / str(seed), model_folder, seed, **config)
        for seed, config in enumerate(configs)
    ]
    base = in_dtype(biased_base, torch.float64)
    biases = [m.bias for m in base.model.modules() if isinstance(m, nn.Linear)]
    assert sum(bias is not None and bool(bias.any()) for bias in biases) == 6
    ours = Coefficients(wide([read_adapter(folder).update for folder in folders]), torch.float64)
    theirs = peft_mixture(base.model, folders, ours)
    expected = plain.logits(theirs, TOKENS)
    expected_gradients = ours.gradients(plain.loss(theirs, examples))
    with attached(base, ours.components, ours.gates, ours.forms(form)):
        found = plain.logits(base.model, TOKENS)
        gradients = ours.gradients(plain.loss(base.model, examples))
    assert relative(found, expected) < 1e-8
    assert relative(gradients, expected_gradients) < 1e-8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coefficients_of_zero_are_the_base_bit_for_bit(
    pico_base: BaseModel, updates: list[ModelUpdate], dtype: torch.dtype, form: Form
) -> None:
    base = in_dtype(pico_base, dtype)
    ours = Coefficients(updates)
    with torch.no_grad():
        before = plain.logits(base.model, TOKENS)
        for zero in (0.0, -0.0):
            for row in ours.rows.values():
                row.fill_(zero)
            with attached(base, ours.components, ours.gates, ours.forms(form)):
                assert torch.equal(plain.logits(base.model, TOKENS), before)


@pytest.mark.parametrize("form", FORMS)
def test_checkpointing_changes_no_gradient(
    pico_base: BaseModel, updates: list[ModelUpdate], examples: list[Example], form: Form
) -> None:
    ours = Coefficients(updates)
    batch = collate(pico_base, examples, 0)
    with attached(pico_base, ours.components, ours.gates, ours.forms(form)):
        expected = ours.gradients(answer_loss(pico_base, batch))
        passes = Passes(pico_base)
        with gradient_checkpointing(pico_base), passes:
            found = ours.gradients(answer_loss(pico_base, batch))
    assert passes.count == 2, "the layer ran again for the backward pass"
    assert relative(found, expected) < 1e-6
    assert not any(module.training for module in pico_base.model.modules())
    assert not any(module._forward_hooks for module in pico_base.model.modules())
    with passes:
        answer_loss(pico_base, batch)
    assert passes.count == 3


class Passes:
    """Counts the passes through the first MLP."""

    def __init__(self, base: BaseModel) -> None:
        self.module = base.model.model.layers[0].mlp
        self.count = 0

    def _counted(self, *_: object) -> None:
        self.count += 1

    def __enter__(self) -> None:
        self.handle = self.module.register_forward_pre_hook(self._counted)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("form", FORMS)
def test_on_a_bfloat16_base_it_rounds_no_more_than_peft(
    pico_base: BaseModel,
    folders: list[Path],
    updates: list[ModelUpdate],
    examples: list[Example],
    form: Form,
) -> None:
    """The same rounded weights and factors, once in bfloat16 and once in float32."""
    low = in_dtype(pico_base, torch.bfloat16)
    high = in_dtype(low, torch.float32)
    ours = Coefficients(updates)
    rounded = {
        path: ModuleComponents(p.A.bfloat16().float(), p.B.bfloat16().float(), p.owner)
        for path, p in ours.components.items()
    }
    with attached(high, rounded, ours.gates):
        exact = plain.logits(high.model, TOKENS)
        exact_gradients = ours.gradients(plain.loss(high.model, examples))
    with attached(low, ours.components, ours.gates, ours.forms(form)):
        found = plain.logits(low.model, TOKENS)
        gradients = ours.gradients(plain.loss(low.model, examples))
    theirs = peft_mixture(low.model, folders, ours)
    of_peft = relative(plain.logits(theirs, TOKENS), exact)
    of_peft_gradients = relative(ours.gradients(plain.loss(theirs, examples)), exact_gradients)
    assert gradients.dtype == torch.float32
    assert 1e-4 < relative(found, exact) < 1.5 * of_peft < 0.1
    assert relative(gradients, exact_gradients) < 1.5 * of_peft_gradients < 0.1


def test_a_small_update_is_not_rounded_away_by_a_coarse_weight() -> None:
    """W + dW is W in bfloat16, and W x is zero: what is left is dW x."""
    module = nn.Linear(64, 1, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    module.weight.fill_(1.0)
    signs = torch.tensor([1.0, -1.0] * 32, dtype=torch.bfloat16)
    piece = ModuleComponents(
        signs[None], torch.full((1, 1), 2.0**-10, dtype=torch.bfloat16), torch.zeros(1).long()
    )
    for form in FORMS:
        output = frozen_product(piece, lambda: torch.ones(1), form)(module, signs[None])
        assert output.item() == 64 * 2.0**-10


# --- the choice between the forms ----------------------------------------------------------------


class Multiplications(TorchDispatchMode):
    """Counts the operations of matrix products as they are carried out, 2 a multiplication."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.count += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        else:
            assert not any(word in name for word in ("mm", "linear", "einsum", "mv", "dot")), name
        return func(*args, **(kwargs or {}))


def operations(form: Form, tokens: int, rank: int, shape: tuple[int, int], dtype: Any) -> int:
    """Of a forward and a backward pass, beyond those of the frozen module."""
    (m, n), generator = shape, torch.Generator().manual_seed(0)
    module = nn.Linear(n, m, dtype=dtype).requires_grad_(False)
    piece = ModuleComponents(
        torch.randn(rank, n, generator=generator).to(dtype),
        torch.randn(m, rank, generator=generator).to(dtype),
        torch.zeros(rank).long(),
    )
    x = torch.randn(tokens, n, generator=generator).to(dtype).requires_grad_()
    z = torch.randn(rank, generator=generator, requires_grad=True)
    with Multiplications() as counted:
        frozen_product(piece, lambda: z, form)(module, x).sum().backward()
    assert x.grad is not None
    assert z.grad is not None
    return counted.count - 4 * tokens * m * n


SIZES = st.integers(1, 24)


@given(SIZES, SIZES, SIZES, SIZES, st.sampled_from(DTYPES))
def test_the_form_with_fewer_operations_is_chosen(
    tokens: int, rank: int, m: int, n: int, dtype: torch.dtype
) -> None:
    counts = {form: operations(form, tokens, rank, (m, n), dtype) for form in FORMS}
    assert counts[choose_form(tokens, rank, (m, n), dtype)] == min(counts.values())


@pytest.mark.parametrize(
    ("tokens", "rank", "shape", "dtype", "form"),
    [
        # 30 adapters of rank 16 in a module of 4096 x 4096; a step of 8 rows of 500 tokens.
        (4000, 480, (4096, 4096), torch.bfloat16, "side by side"),
        (4000, 480, (4096, 4096), torch.float32, "side by side"),
        # By hand: 8 T r against 4 r s + 2 T s and 4 r s + 6 T s, all of it times the side s.
        (4000, 2098, (4096, 4096), torch.float32, "side by side"),
        (4000, 2099, (4096, 4096), torch.float32, "dense"),
        (4000, 6295, (4096, 4096), torch.bfloat16, "side by side"),
        (4000, 6296, (4096, 4096), torch.bfloat16, "dense"),
        # One token never pays for a product of the weight's size.
        (1, 10**6, (4096, 4096), torch.float32, "side by side"),
        # SmolLM2's q with 30 adapters of rank 16.
        (1200, 480, (576, 576), torch.float32, "dense"),
        (1200, 64, (576, 576), torch.float32, "side by side"),
    ],
)
def test_what_is_chosen(
    tokens: int, rank: int, shape: tuple[int, int], dtype: torch.dtype, form: Form
) -> None:
    assert choose_form(tokens, rank, shape, dtype) == form


@given(SIZES, SIZES, SIZES, st.sampled_from(DTYPES), st.booleans())
def test_once_dense_always_dense(
    fixed: int, m: int, n: int, dtype: torch.dtype, of_rank: bool
) -> None:
    """As the rank grows, and as the tokens do."""
    sizes = range(1, 200)
    pairs = [(fixed, size) if of_rank else (size, fixed) for size in sizes]
    chosen = [choose_form(tokens, rank, (m, n), dtype) for tokens, rank in pairs]
    assert chosen == sorted(chosen, key=FORMS.index)


def test_every_module_has_a_choice_of_its_own(pico_base: BaseModel) -> None:
    ranks = {Q0: 9, Q1: 8, DOWN: 12}
    components = concatenate([plain.random_update(pico_base, ranks, seed=0)])
    # At many tokens the product of the factors counts for nothing: 2 m n against 4 r (m + n).
    many = choose_forms(components, 10**6, torch.float32)
    assert many == {Q0: "dense", Q1: "side by side", DOWN: "dense"}
    assert set(choose_forms(components, 10**6, torch.bfloat16).values()) == {"side by side"}
    assert set(choose_forms(components, 1, torch.float32).values()) == {"side by side"}
    # 4 r m n + 2 T m n < 4 T r (m + n) at r = 9, m = n = 32 from T > 144 on.
    assert choose_forms(components, 144.0, torch.float32)[Q0] == "side by side"
    assert choose_forms(components, 144.1, torch.float32)[Q0] == "dense"


# --- trained factors -----------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_trained_factors_have_the_gradients_of_dense_updates(
    pico_base: BaseModel, examples: list[Example], frozen: bool
) -> None:
    """The components of the last adapter are trained, alone or beside the others."""
    *others, last = wide(mixed_updates(pico_base))
    base = in_dtype(pico_base, torch.float64)
    beside = concatenate(others) if frozen else {}
    trained = concatenate([last])
    z = {
        path: torch.linspace(-1, 2, piece.A.shape[0]).double().requires_grad_()
        for path, piece in trained.items()
    }
    factors = [f.requires_grad_() for p in trained.values() for f in (p.A, p.B)]
    inputs = [*factors, *z.values()]

    def deltas() -> Iterator[tuple[str, Tensor]]:
        for path, piece in trained.items():
            delta = piece.B @ torch.diag(z[path]) @ piece.A
            if path in beside:
                delta = delta + 0.5 * beside[path].B @ beside[path].A
            yield path, delta

    expected = torch.autograd.grad(plain.loss(DenseModel(base, dict(deltas())), examples), inputs)
    forwards = {path: trained_forward(piece, z, path, beside) for path, piece in trained.items()}
    with replaced(base, forwards, shapes_of(trained)):
        found = torch.autograd.grad(plain.loss(base.model, examples), inputs)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 1e-6


def trained_forward(
    piece: ModuleComponents,
    z: Mapping[str, Tensor],
    path: str,
    beside: Mapping[str, ModuleComponents],
) -> Callable[[nn.Linear, Tensor], Tensor]:
    whole = None
    if path in beside:
        half = torch.full((len(beside[path].owner),), 0.5, dtype=torch.float64)
        whole = frozen_product(beside[path], lambda: half, "side by side")
    return trained_product(piece.A, piece.B, lambda: z[path], whole)


def test_what_is_reused_depends_on_no_coefficient_whatever_the_forms(pico_base: BaseModel) -> None:
    """With the first module multiplied out, the next one's input is another each time."""
    components = concatenate(mixed_updates(pico_base))
    first, *rest = sorted(components, key=lambda path: path != Q0)
    reuse, value = Reuse(), [1.0]

    def filled(count: int) -> torch.Tensor:
        return torch.full((count,), value[0])

    forwards = {
        path: frozen_product(
            piece,
            functools.partial(filled, len(piece.owner)),
            "dense" if path == first else "side by side",
            reuse,
        )
        for path, piece in components.items()
    }
    tokens = list(range(3, 20))
    with torch.no_grad(), replaced(pico_base, forwards, shapes_of(components)):
        for value[0] in (1.0, -1.0, 0.5):
            expected = plain.logits(pico_base.model, tokens)
            reuse.begin("rows")
            found = plain.logits(pico_base.model, tokens)
            reuse.pause()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert rest
