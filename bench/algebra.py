"""Truncating a merge of the example pool, beside the dense way."""

from collections.abc import Iterator

import torch

from bench.timing import Comparison, compare
from recycle_cli.lora.folder import read_adapter
from recycle_cli.lora.truncation import parse_rank_policy, truncate
from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
from recycle_cli.merging.linear import average
from recycle_cli.merging.merger import Contribution, Merger
from recycle_cli.workflows.demo import examples_folder

RANK = 8


def comparisons() -> Iterator[Comparison]:
    """The average of all adapters of the pool, at rank 8."""
    folders = sorted((examples_folder() / "pool").glob("*/*/adapter_config.json"))
    updates = [read_adapter(path.parent).update for path in folders]
    merger = Merger(average, [Contribution.of(u, 1.0, str(i)) for i, u in enumerate(updates)])
    yield compare(
        f"average of {len(updates)} adapters at rank {RANK}",
        lambda: truncate(_merged(merger), parse_rank_policy(str(RANK))),
        "SVD of the dense sum, float32",
        lambda: _dense(_merged(merger)),
        turns=3,
    )


def _merged(merger: Merger) -> ModelUpdate:
    found = {module: merger.merge(module) for module in merger.shapes}
    return {m: piece for m, piece in found.items() if isinstance(piece, LowRankUpdate)}


def _dense(update: ModelUpdate) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    factors = {}
    for module, piece in update.items():
        u, s, vh = torch.linalg.svd(piece.dense().float(), full_matrices=False)
        factors[module] = (u[:, :RANK] * s[:RANK], vh[:RANK])
    return factors
