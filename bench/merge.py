"""Merging, at the shapes of SmolLM2-135M and of Llama-3.1-8B, beside PEFT and dense references.

Adapters are random, of rank 16. What is compared is given the same factors in the same process.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import merge_utils
from torch import Tensor, nn

from bench.timing import Comparison, compare, measure
from recycle_cli.lora.draws import generator_for
from recycle_cli.lora.folder import open_adapter, write_adapter
from recycle_cli.lora.truncation import parse_rank_policy, truncate_module
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.merging.aligned import knots_ties
from recycle_cli.merging.catalog import METHODS
from recycle_cli.merging.elementwise import ties
from recycle_cli.merging.group import Group
from recycle_cli.merging.merger import Contribution, Merger
from recycle_cli.merging.spectral import tsv

RANK, ALPHA = 16, 32
DENSITY = 0.2
Shapes = Mapping[str, tuple[int, int]]


def block(hidden: int, kv: int, ffn: int) -> Shapes:
    """The linear modules of one Llama layer, (out, in)."""
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (kv, hidden),
        "v_proj": (kv, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }


SMALL_BLOCK, LARGE_BLOCK = block(576, 192, 1536), block(4096, 1024, 14336)
SMALL = {f"{layer}_{name}": s for layer in range(30) for name, s in SMALL_BLOCK.items()}
SMALL_NAME, LARGE_NAME = "SmolLM2-135M, 30 layers", "one Llama-3.1-8B layer"


def comparisons() -> Iterator[Comparison]:
    """Truncated sums, ties, rules in factor space, a whole 8B merge, lazy reading."""
    for adapters in (4, 8, 30):
        yield _truncated_sum(SMALL_NAME, SMALL, adapters)
    for adapters in (4, 8, 30):
        yield _streamed_ties("4096 x 4096", (4096, 4096), adapters)
    yield _streamed_ties("14336 x 4096", (14336, 4096), 4)
    yield from _factor_space("4096 x 4096", (4096, 4096), 4)
    yield _whole_model(30, 64)
    yield _lazy_reading(30)
    for adapters in (4, 8):
        yield _truncated_sum(LARGE_NAME, LARGE_BLOCK, adapters)
    # PEFT would hold thirty dense matrices of 235 MB, three times over.
    thirty = _merger(LARGE_BLOCK, 30, "linear")
    run = [measure(lambda: _truncated(thirty, RANK))]
    yield Comparison(f"linear to rank {RANK}, 30 adapters, {LARGE_NAME}", run)


def _truncated_sum(name: str, shapes: Shapes, adapters: int) -> Comparison:
    """The weighted sum at rank 16, beside PEFT's combination_type="svd"."""
    merger = _merger(shapes, adapters, "linear")
    peft_model = _peft_model(shapes, merger)
    names = [one.key for one in merger.contributions]

    def theirs() -> None:
        peft_model.base_model.add_weighted_adapter(
            names, [1 / adapters] * adapters, "merged", combination_type="svd", svd_rank=RANK
        )
        peft_model.base_model.delete_adapter("merged")

    _truncated(merger, RANK)
    return compare(
        f"linear to rank {RANK}, {adapters} adapters, {name}",
        lambda: _truncated(merger, RANK),
        "PEFT svd",
        theirs,
        turns=1,
        warm_up=0,
    )


def _streamed_ties(name: str, shape: tuple[int, int], adapters: int) -> Comparison:
    """TIES in dW space, beside what PEFT's ties_svd does before its SVD."""
    group = _group(shape, adapters)
    weights = torch.full((adapters,), 1.0)
    return compare(
        f"ties, {adapters} adapters, {name}",
        lambda: ties(group, DENSITY, "count"),
        "PEFT ties_svd without its SVD",
        lambda: merge_utils.ties([piece.dense() for piece in group.pieces], weights, DENSITY),
        turns=3 if adapters < 30 else 1,
        warm_up=1 if adapters < 30 else 0,
    )


def _factor_space(name: str, shape: tuple[int, int], adapters: int) -> Iterator[Comparison]:
    """TSV and KnOTS-TIES from factors, beside the same on dense matrices."""
    group = _group(shape, adapters)
    rules: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "tsv": (lambda: tsv(group, None), lambda: _dense_tsv(group)),
        "knots-ties": (
            lambda: knots_ties(group, DENSITY, "count"),
            lambda: _dense_knots(group),
        ),
    }
    for rule, (ours, theirs) in rules.items():
        ours()
        yield compare(
            f"{rule}, {adapters} adapters, {name}", ours, "dense SVDs", theirs, turns=1, warm_up=0
        )


def _whole_model(adapters: int, rank: int) -> Comparison:
    """All 32 layers of an 8B model, factors made on the fly."""
    shapes = {f"{layer}.{name}": s for layer in range(32) for name, s in LARGE_BLOCK.items()}
    policy = parse_rank_policy(str(rank))
    rule = METHODS["linear"].load({})

    def piece(adapter: int) -> Callable[[str], LowRankUpdate]:
        return lambda module: _piece(shapes[module], adapter, module)

    merger = Merger(
        rule, [Contribution(f"{i:02}", 1 / adapters, shapes, piece(i)) for i in range(adapters)]
    )

    def run() -> None:
        for module in merger.shapes:
            truncate_module(merger.merge(module), policy)

    return Comparison(
        f"linear to rank {rank}, {adapters} adapters, Llama-3.1-8B, 32 layers, drawing the factors "
        "included",
        [measure(run)],
    )


def _lazy_reading(adapters: int) -> Comparison:
    """Opening adapters and reading one module of each."""
    shapes = {f"{layer}.{name}": s for layer in range(32) for name, s in LARGE_BLOCK.items()}
    with TemporaryDirectory() as place:
        folders = [Path(place) / str(number) for number in range(adapters)]
        update = {module: _piece(shape, 0, module) for module, shape in shapes.items()}
        folders[0].mkdir()
        write_adapter(folders[0], update, "base")
        for folder in folders[1:]:
            # The same bytes under other names: what counts is how many of them are touched.
            folder.symlink_to(folders[0])
        size = sum(path.stat().st_size for path in folders[0].iterdir())
        return Comparison(
            f"one module of each of {adapters} adapters of {size / 1e6:,.0f} MB",
            [measure(lambda: [_read_one(folder) for folder in folders])],
        )


def _read_one(folder: Path) -> LowRankUpdate:
    with open_adapter(folder) as file:
        return file.read("0.down_proj")


def _merger(shapes: Shapes, adapters: int, method: str) -> Merger:
    updates = [_update(shapes, number) for number in range(adapters)]
    contributions = [
        Contribution.of(update, 1 / adapters, f"a{number:02}")
        for number, update in enumerate(updates)
    ]
    return Merger(METHODS[method].load({}), contributions)


def _truncated(merger: Merger, rank: int) -> None:
    policy = parse_rank_policy(str(rank))
    for module in merger.shapes:
        truncate_module(merger.merge(module), policy)


def _update(shapes: Shapes, adapter: int) -> ModelUpdate:
    return {module: _piece(shape, adapter, module) for module, shape in shapes.items()}


def _piece(shape: tuple[int, int], adapter: int, module: str) -> LowRankUpdate:
    generator = generator_for("bench", adapter, module)
    a = torch.randn(RANK, shape[1], generator=generator) / math.sqrt(shape[1])
    return LowRankUpdate(a, torch.randn(shape[0], RANK, generator=generator), ALPHA / RANK)


def _group(shape: tuple[int, int], adapters: int) -> Group:
    pieces = tuple(_piece(shape, number, "m") for number in range(adapters))
    return Group(pieces, (1.0,) * adapters, tuple(map(str, range(adapters))))


def _peft_model(shapes: Shapes, merger: Merger) -> Any:
    """A model of these linear modules, whose weights are never touched, with the adapters on."""
    base = nn.Module()
    for module, (rows, columns) in shapes.items():
        linear = nn.Linear(columns, rows, bias=False, device="meta").to_empty(device="cpu")
        base.add_module(module, linear)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(shapes))
    names = [one.key for one in merger.contributions]
    peft_model: Any = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, config)
    for one in merger.contributions:
        for module in shapes:
            layer, piece = peft_model.base_model.model.get_submodule(module), one.read(module)
            layer.lora_A[one.key].weight.data.copy_(piece.A)
            layer.lora_B[one.key].weight.data.copy_(piece.B)
    return peft_model


def _dense_tsv(group: Group) -> Tensor:
    share = min(RANK, min(group.shape) // len(group.pieces))
    parts = [torch.linalg.svd(piece.dense(), full_matrices=False) for piece in group.pieces]
    values = torch.cat([s[:share] for _, s, _ in parts])
    left = _polar(torch.cat([u[:, :share] for u, _, _ in parts], dim=1))
    right = _polar(torch.cat([vh[:share] for _, _, vh in parts]))
    return left * values @ right


def _polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    polar: Tensor = left @ right
    return polar


def _dense_knots(group: Group) -> Tensor:
    columns = group.shape[1]
    left, values, right = torch.linalg.svd(
        torch.cat([piece.dense() for piece in group.pieces], dim=1), full_matrices=False
    )
    there = values > 1e-5
    aligned = (values[there, None] * right[there]).split(columns, dim=1)
    weights = torch.ones(len(group.pieces))
    merged: Tensor = left[:, there] @ merge_utils.ties(list(aligned), weights, DENSITY)
    return merged
