import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.adapters import write_peft_adapter
from support.pico import ATTENTION, MLP
from support.plain import (
    DOWN,
    HEAD,
    Q0,
    DenseModel,
    gated_logits,
    logits,
    mixed_updates,
    random_update,
    weighted_sum,
)

from recycle_cli.engine.adapted import (
    Gate,
    check_modules,
    concatenate,
    fold,
    with_adapter,
)
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.products import attached
from recycle_cli.lora.config import AdapterProblem
from recycle_cli.lora.folder import read_adapter
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.settings import Settings

TOKENS = list(range(3, 43))
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"r": 6, "use_rslora": True},
    "patterns": {
        "target_modules": [*ATTENTION, *MLP],
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7},
        "alpha_pattern": {"layers.0.mlp.up_proj": 3, "v_proj": 5},
    },
    "rslora patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "all-linear": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
}


def of_peft(base: BaseModel, folder: Path) -> torch.Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return logits(PeftModel.from_pretrained(copy.deepcopy(base.model), folder).eval(), TOKENS)


def plain(base: BaseModel) -> torch.Tensor:
    with torch.no_grad():
        return logits(base.model, TOKENS)


def random_gates(updates: list[ModelUpdate], seed: int = 0) -> dict[str, Gate]:
    """One number a component, some of them zero, a negative one among them."""
    generator = torch.Generator().manual_seed(seed)
    gates: dict[str, Gate] = {}
    for path, piece in concatenate(updates).items():
        z = torch.randn(piece.A.shape[0], generator=generator)
        z[0] = 0
        gates[path] = z.clone
    return gates


@pytest.fixture
def updates(pico_base: BaseModel) -> list[ModelUpdate]:
    return mixed_updates(pico_base)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
def test_an_adapter_does_what_peft_does_with_it(
    pico_base: BaseModel, pico_folder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = write_peft_adapter(tmp_path / "adapter", pico_folder, **config)
    expected, before = of_peft(pico_base, folder), plain(pico_base)
    with with_adapter(pico_base, read_adapter(folder).update):
        found = plain(pico_base)
    assert (expected - before).abs().mean() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_on_a_bfloat16_base_too(pico_folder: Path, tmp_path: Path) -> None:
    base = load_base_model(str(pico_folder), Settings(tmp_path, True, "bfloat16", "cpu"))
    folder = write_peft_adapter(tmp_path / "adapter", pico_folder)
    with with_adapter(base, read_adapter(folder).update):
        found = plain(base)
    # The scale is a power of two, so it rounds nothing wherever it is multiplied in.
    assert torch.equal(found, of_peft(base, folder))


def test_without_an_adapter_the_base_is_as_it_is(pico_base: BaseModel) -> None:
    before = plain(pico_base)
    with with_adapter(pico_base, None):
        assert torch.equal(plain(pico_base), before)


def test_gated_adapters_are_the_gated_sum_of_dense_updates(
    pico_base: BaseModel, updates: list[ModelUpdate]
) -> None:
    weights = torch.linspace(-1.5, 2, 12).view(4, 3)
    components = concatenate(updates)
    rows = dict(zip(sorted(components), weights, strict=True))
    gates = {path: rows[path][piece.owner].clone for path, piece in components.items()}
    found = gated_logits(pico_base, updates, gates, TOKENS)
    with torch.no_grad():
        expected = logits(DenseModel(pico_base, weighted_sum(updates, weights)), TOKENS)
    assert (expected - plain(pico_base)).abs().mean() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_every_component_has_its_own_gate(pico_base: BaseModel, updates: list[ModelUpdate]) -> None:
    """In float64, where an error of the arithmetic is not mistaken for rounding."""
    double = dataclasses.replace(pico_base, model=copy.deepcopy(pico_base.model).double())
    wide = [{path: piece.to(torch.float64) for path, piece in u.items()} for u in updates]
    components, gates = concatenate(wide), random_gates(updates)
    deltas = {
        path: piece.B @ torch.diag(gates[path]().double()) @ piece.A
        for path, piece in components.items()
    }
    found = gated_logits(
        double, wide, {path: (lambda z=gates[path]: z().double()) for path in gates}, TOKENS
    )
    with torch.no_grad():
        expected = logits(DenseModel(double, deltas), TOKENS)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_components_know_their_owner(updates: list[ModelUpdate]) -> None:
    components = concatenate(updates)
    assert list(components) == sorted(components)
    assert components[Q0].owner.tolist() == [0] * 3 + [1] * 5
    assert components[DOWN].owner.tolist() == [0] + [2] * 7
    for path, piece in components.items():
        for index, update in enumerate(updates):
            own = piece.owner == index
            assert int(own.sum()) == (update[path].rank if path in update else 0)
            if own.any():
                product = piece.B[:, own] @ piece.A[own]
                torch.testing.assert_close(product, update[path].dense(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_the_base_is_left_exactly_as_it_was(
    pico_base: BaseModel, updates: list[ModelUpdate], fails: bool
) -> None:
    weights = copy.deepcopy(pico_base.model.state_dict())
    before = plain(pico_base)
    try:
        with attached(pico_base, concatenate(updates), random_gates(updates)):
            assert not torch.equal(plain(pico_base), before)
            if fails:
                raise KeyError("within")
    except KeyError:
        assert fails
    assert torch.equal(plain(pico_base), before)
    assert all(torch.equal(weights[key], now) for key, now in pico_base.model.state_dict().items())


@pytest.mark.parametrize(
    ("path", "shape", "code"),
    [
        ("model.layers.2.self_attn.q_proj", (32, 32), "no_such_module"),
        ("model.layers.0.self_attn", (32, 32), "no_such_module"),
        ("model.embed_tokens", (259, 32), "no_such_module"),
        ("q_proj", (32, 32), "no_such_module"),
        ("model.layers.0.self_attn.k_proj", (32, 32), "shape_mismatch"),
        ("model.layers.0.mlp.down_proj", (64, 32), "shape_mismatch"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    pico_base: BaseModel, path: str, shape: tuple[int, int], code: str
) -> None:
    good = {Q0: (32, 32), "model.layers.0.self_attn.k_proj": (16, 32), HEAD: (259, 32)}
    check_modules(pico_base, good)
    with pytest.raises(AdapterProblem) as caught:
        check_modules(pico_base, {**good, path: shape})
    assert caught.value.code == code
    assert path in caught.value.message
    assert pico_base.id in caught.value.message
    # Nothing of such an adapter is put on, not even the modules that would fit.
    fitting = random_update(pico_base, {Q0: 2}, seed=0)
    foreign = {path: LowRankUpdate(torch.ones(1, shape[1]), torch.ones(shape[0], 1), 1.0)}
    before = plain(pico_base)
    with pytest.raises(AdapterProblem), with_adapter(pico_base, {**fitting, **foreign}):
        pass
    assert torch.equal(plain(pico_base), before)


def test_folding_gives_one_adapter_that_does_the_same(
    pico_base: BaseModel, updates: list[ModelUpdate]
) -> None:
    components, gates = concatenate(updates), random_gates(updates)
    folded = fold(components, gates)
    ranks = {path: piece.rank for path, piece in folded.items()}
    assert ranks == {path: piece.A.shape[0] - 1 for path, piece in components.items()}
    with with_adapter(pico_base, folded):
        found = plain(pico_base)
    expected = gated_logits(pico_base, updates, gates, TOKENS)
    assert (expected - plain(pico_base)).abs().mean() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)


def test_folding_leaves_out_modules_without_a_component(updates: list[ModelUpdate]) -> None:
    gates = random_gates(updates)
    gates[DOWN] = torch.zeros(8).clone
    assert set(fold(concatenate(updates), gates)) == set(gates) - {DOWN}


def test_gates_that_are_all_zero_are_the_base(
    pico_base: BaseModel, updates: list[ModelUpdate]
) -> None:
    components = concatenate(updates)
    gates = {path: torch.zeros(piece.A.shape[0]).clone for path, piece in components.items()}
    before = plain(pico_base)
    assert torch.equal(gated_logits(pico_base, updates, gates, TOKENS), before)
    folded = fold(components, gates)
    assert [piece.rank for piece in folded.values()] == [1]
    with with_adapter(pico_base, folded):
        assert torch.equal(plain(pico_base), before)
