"""A step of adaptive merging beside PEFT's own loop over adapters, an einsum with a loop, and a
step of an ordinary LoRA, on the embedded model with random adapters of rank 16 in every linear
module.

A step is the forward and the backward pass and AdamW's update, over 8 rows of 128 tokens.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from bench.timing import Comparison, compare
from recycle_cli.engine.adapted import Forward, ModuleComponents, replaced, shapes_of
from recycle_cli.engine.base_model import BaseModel, load_base_model
from recycle_cli.engine.encoding import Example
from recycle_cli.engine.forward import Batch, answer_loss, collate
from recycle_cli.engine.products import on_device
from recycle_cli.lora.base_names import EMBEDDED_NAME
from recycle_cli.lora.draws import generator_for
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.settings import read_settings
from recycle_cli.tuning.mixture import Mixture, MixtureRecipe
from recycle_cli.tuning.target_lora import LoraRecipe, target_lora

RANK, ALPHA = 16, 32
ROWS, PROMPT, ANSWER = 8, 120, 8
# PEFT keeps a copy of every output for each adapter: with thirty of them, thirty layers would take
# over 50 GB.
FEW_LAYERS = 5


def comparisons() -> Iterator[Comparison]:
    """With 30, 8 and 4 adapters."""
    for adapters in (30, 8, 4):
        yield _against_lora(adapters)
        yield _against_einsum(adapters)
        yield _against_peft(adapters, None if adapters < 30 else FEW_LAYERS)
    yield _compiled(8, FEW_LAYERS)


def _compiled(adapters: int, layers: int) -> Comparison:
    """The same step with the model's forward pass compiled by torch, for rows of one length."""
    ours, theirs = _bases(layers)
    mixture = _mixture(theirs, adapters)
    with mixture.attached(theirs, ROWS * (PROMPT + ANSWER)):
        theirs.model.model.forward = torch.compile(theirs.model.model.forward, dynamic=False)
        step = _step(theirs, list(mixture.parameters()))
        start = time.perf_counter()
        step()
        against = f"torch.compile, {time.perf_counter() - start:.0f} s to compile"
        return _compare(ours, adapters, against, step)


def _against_lora(adapters: int) -> Comparison:
    """The floor: what training a LoRA of one's own takes."""
    ours, theirs = _bases(None)
    with target_lora(theirs, LoraRecipe(rank=RANK, alpha=ALPHA, dropout=0.0), 0) as peft_model:
        trained = [p for p in peft_model.parameters() if p.requires_grad]
        step = _step(theirs, trained)
        return _compare(ours, adapters, f"a LoRA of rank {RANK}, by PEFT", step)


def _against_peft(adapters: int, layers: int | None) -> Comparison:
    """All adapters active in PEFT, with trained numbers in the place of their scales."""
    ours, theirs = _bases(layers)
    updates = _updates(theirs, adapters)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    names = [f"a{number}" for number in range(adapters)]
    peft_model: Any = get_peft_model(theirs.model, config, adapter_name=names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, config)
    peft_model.base_model.set_adapter(names)
    peft_model.requires_grad_(False)
    coefficients = {}
    for path, name, update in ((p, n, u) for n, u in zip(names, updates, strict=True) for p in u):
        layer = theirs.model.get_submodule(path)
        layer.lora_A[name].weight.data.copy_(update[path].A)
        layer.lora_B[name].weight.data.copy_(update[path].B)
        coefficients[layer, name] = nn.Parameter(torch.tensor(adapters**-0.5))

    def scale() -> None:
        for (layer, name), coefficient in coefficients.items():
            layer.scaling[name] = coefficient * (ALPHA / RANK)

    step = _step(theirs, list(coefficients.values()), scale)
    return _compare(ours, adapters, "PEFT, its loop over active adapters", step, turns=3)


def _against_einsum(adapters: int, layers: int | None = None) -> Comparison:
    """One einsum of x, A, the numbers and B, which a loop over the adapters writes in place: the
    formula of arXiv 2602.12323 as its authors' code has it."""
    ours, theirs = _bases(layers)
    mixture = _mixture(theirs, adapters)
    components = on_device(mixture.components, theirs)
    coefficients = {
        path: [nn.Parameter(torch.tensor(adapters**-0.5)) for _ in range(adapters)]
        for path in components
    }
    forwards = {path: _einsum(piece, coefficients[path]) for path, piece in components.items()}
    trained = [c for row in coefficients.values() for c in row]
    with replaced(theirs, forwards, shapes_of(components)):
        step = _step(theirs, trained)
        return _compare(ours, adapters, "einsum, a loop over the adapters", step, turns=3)


def _einsum(piece: ModuleComponents, coefficients: Sequence[Tensor]) -> Forward:
    def forward(module: nn.Linear, x: Tensor) -> Tensor:
        z = x.new_zeros(len(piece.owner))
        for number, coefficient in enumerate(coefficients):
            z[number * RANK : (number + 1) * RANK] = coefficient
        low = torch.einsum("...i,ri,r,or->...o", x, piece.A, z, piece.B)
        return functional.linear(x, module.weight, module.bias) + low

    return forward


def _compare(
    base: BaseModel, adapters: int, against: str, theirs: Callable[[], None], turns: int = 5
) -> Comparison:
    mixture = _mixture(base, adapters)
    layers = base.model.config.num_hidden_layers
    with mixture.attached(base, ROWS * (PROMPT + ANSWER)):
        ours = _step(base, list(mixture.parameters()))
        what = f"{adapters} adapters, {layers} layers, {str(base.dtype).removeprefix('torch.')}"
        return compare(what, ours, against, theirs, turns)


def _step(
    base: BaseModel, trained: Sequence[nn.Parameter], before: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """The forward and the backward pass, and AdamW's update."""
    batch, optimizer = _batch(base), torch.optim.AdamW(trained, lr=1e-6)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        before()
        answer_loss(base, batch).backward()
        optimizer.step()

    return step


def _batch(base: BaseModel) -> Batch:
    """Rows of random tokens that share no beginning."""
    generator = generator_for("bench", "rows")
    tokens = torch.randint(5, 40_000, (ROWS, PROMPT + ANSWER), generator=generator).tolist()
    return collate(base, [Example(tuple(row[:PROMPT]), tuple(row[PROMPT:])) for row in tokens], 0)


def _bases(layers: int | None) -> tuple[BaseModel, BaseModel]:
    """Two copies of the embedded model, or of its first layers."""
    bases = tuple(load_base_model(EMBEDDED_NAME, read_settings()) for _ in range(2))
    for base in bases:
        if layers:
            base.model.model.layers = base.model.model.layers[:layers]
            base.model.config.num_hidden_layers = layers
    return bases[0], bases[1]


def _mixture(base: BaseModel, adapters: int) -> Mixture:
    recipe = MixtureRecipe("linear", "equal")
    return Mixture(_updates(base, adapters), recipe, base.compute.device, dtype=base.dtype)


def _updates(base: BaseModel, adapters: int) -> list[ModelUpdate]:
    shapes = {path: shape for path, shape in base.shapes.items() if path != "lm_head"}
    return [
        {path: _piece(shape, f"{adapter}.{path}") for path, shape in shapes.items()}
        for adapter in range(adapters)
    ]


def _piece(shape: tuple[int, int], name: str) -> LowRankUpdate:
    generator = generator_for("bench", name)
    a = torch.randn(RANK, shape[1], generator=generator) / math.sqrt(shape[1])
    return LowRankUpdate(a, 0.01 * torch.randn(shape[0], RANK, generator=generator), ALPHA / RANK)
