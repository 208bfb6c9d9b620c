"""Truncating a merge of the example pool, beside the dense way."""

from collections.abc import Iterator

import torch

from bench.timing import Comparison, compare
from recycle_cli.lora.folder import read_adapter
from recycle_cli.lora.truncation import parse_rank_policy, truncate
from recycle_cli.lora.update import ModelUpdate
from recycle_cli.merging.linear import average
from recycle_cli.workflows.demo import examples_folder

RANK = 8


def comparisons() -> Iterator[Comparison]:
    """The average of all adapters of the pool, at rank 8."""
    folders = sorted((examples_folder() / "pool").glob("*/*/adapter_config.json"))
    updates = [read_adapter(path.parent).update for path in folders]
    weights = [1.0] * len(updates)
    yield compare(
        f"average of {len(updates)} adapters at rank {RANK}",
        lambda: truncate(average(updates, weights), parse_rank_policy(str(RANK))),
        "SVD of the dense sum, float32",
        lambda: _dense(average(updates, weights)),
        turns=3,
    )


def _dense(update: ModelUpdate) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    factors = {}
    for module, piece in update.items():
        u, s, vh = torch.linalg.svd(piece.dense().float(), full_matrices=False)
        factors[module] = (u[:, :RANK] * s[:RANK], vh[:RANK])
    return factors
