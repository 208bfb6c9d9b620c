"""Writing a merge: as an adapter, as an adapter with a residual, or into a model's weights."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recycle_cli.errors import InputError
from recycle_cli.progress import Progress
from recycle_cli.settings import Settings
from recycle_cli.workflows.merge_request import MergeRequest
from recycle_cli.workflows.output_folder import dtype_named

if TYPE_CHECKING:
    from torch import Tensor

    from recycle_cli.lora.truncation import RankPolicy, TruncatedModule
    from recycle_cli.lora.update import LowRankUpdate, ModelUpdate
    from recycle_cli.merging.merger import Merger
    from recycle_cli.store.checkpoint import Checkpoint

Form = Literal["adapter", "adapter+residual", "model"]
MODEL: Form = "model"
RESIDUAL_FOLDER = "residual"


@dataclass(frozen=True)
class Cut:
    """What a rank limit left of one module: its rank, and the squared Frobenius norms of what is
    left and of the whole, both 0 where nothing was cut."""

    rank: int
    kept: float = 0.0
    whole: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What was written.

    Args:
        form: `adapter`, `adapter+residual` or `model`.
        cuts: by module path; of the residual, where there is one.
        rank: the largest among the modules of what was written, the residual apart.
        sha256: of the weights.
        max_logit_deviation: of a model, where it was asked for.
    """

    form: Form
    cuts: Mapping[str, Cut]
    rank: int
    sha256: str
    max_logit_deviation: float | None = None

    @property
    def energy_kept(self) -> float:
        """The share of the squared norm that is left, over all modules."""
        whole = sum(cut.whole for cut in self.cuts.values())
        return sum(cut.kept for cut in self.cuts.values()) / whole if whole > 0 else 1.0

    @property
    def energy_by_module(self) -> dict[str, float]:
        """The same for each module that was cut."""
        cuts = self.cuts.items()
        return {module: cut.kept / cut.whole for module, cut in cuts if cut.kept < cut.whole}


def merge_modules(
    merger: "Merger", policy: "RankPolicy", save_dtype: str, progress: Progress
) -> "dict[str, TruncatedModule]":
    """All modules merged and truncated, in the dtype in which they are to be saved."""
    from recycle_cli.lora.truncation import truncate_module

    dtype = dtype_named(save_dtype)
    merged = {}
    for module in merger.shapes:
        cut = truncate_module(checked(module, merger.merge(module), save_dtype), policy)
        merged[module] = replace(cut, update=cut.update.to(dtype))
        progress.advance(module)
    return merged


def checked(module: str, update: "LowRankUpdate | Tensor", dtype: str) -> "LowRankUpdate | Tensor":
    """The merged update of a module.

    Raises:
        InputError: it holds numbers that the dtype has not.
    """
    from recycle_cli.lora.update import LowRankUpdate

    parts = (update.A, update.B) if isinstance(update, LowRankUpdate) else (update,)
    if not all(part.to(dtype_named(dtype)).isfinite().all() for part in parts):
        raise InputError(
            f"the merged {module} holds numbers too large for {dtype}",
            "use smaller weights, or leave out the adapter at fault",
        )
    return update


def write_merged_adapter(
    request: MergeRequest,
    adapter: "dict[str, TruncatedModule]",
    residual: "dict[str, TruncatedModule] | None",
    folder: Path,
) -> Outcome:
    """Writes an adapter, and a residual beside it where there is one."""
    from recycle_cli.lora.folder import weights_sha256

    rank = _write(request, adapter, folder)
    if residual is not None:
        beside = folder / RESIDUAL_FOLDER
        beside.mkdir()
        _write(request, residual, beside)
    return Outcome(
        form="adapter" if residual is None else "adapter+residual",
        cuts={m: _cut(module) for m, module in (residual or adapter).items()},
        rank=rank,
        sha256=weights_sha256(folder),
    )


@dataclass(frozen=True)
class Target:
    """The model that a merge is written into.

    Args:
        name: what the user calls it.
        checkpoint: its files.
        tensors: the names of the tensors that the merge changes, by module path.
    """

    name: str
    checkpoint: "Checkpoint"
    tensors: Mapping[str, str]


def find_target(name: str, shapes: Mapping[str, tuple[int, int]], settings: Settings) -> Target:
    """Checks that a model can take a merge of modules of these shapes. Reads no weights.

    Raises:
        InputError: the model is not there, is quantised, or lacks a module of the merge.
    """
    from recycle_cli.engine.base_model import base_model_folder, linear_shapes
    from recycle_cli.store.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(base_model_folder(name, settings))
    _check_linear(name, shapes, linear_shapes(name, settings))
    return Target(name, checkpoint, checkpoint.locate(shapes))


def write_merged_model(
    request: MergeRequest,
    target: Target,
    merger: "Merger",
    policy: "RankPolicy",
    settings: Settings,
    folder: Path,
    progress: Progress,
) -> Outcome:
    """Writes the model with the merge in its weights, shard by shard."""
    from recycle_cli.lora.truncation import truncate_module
    from recycle_cli.store.checkpoint import write_merged

    cuts: dict[str, Cut] = {}

    def delta(module: str) -> "LowRankUpdate | Tensor":
        whole = checked(module, merger.merge(module), "float32")
        if policy.count is None:
            cuts[module] = Cut(_rank(whole))
            return whole
        truncated = truncate_module(whole, policy)
        cuts[module] = _cut(truncated)
        return truncated.update

    files = write_merged(target.checkpoint, target.tensors, folder, delta, progress.advance)
    deviation = None
    if request.check:
        progress.stage("comparing logits")
        update = {module: _as_factors(delta(module)) for module in merger.shapes}
        deviation = _deviation(target.name, update, folder, settings)
    return Outcome(
        form=MODEL,
        cuts=dict(sorted(cuts.items())),
        rank=max(cut.rank for cut in cuts.values()),
        sha256=model_sha256(folder, files),
        max_logit_deviation=deviation,
    )


def _write(request: MergeRequest, modules: "dict[str, TruncatedModule]", folder: Path) -> int:
    """Writes an adapter; gives its largest rank."""
    from recycle_cli.lora.folder import write_adapter
    from recycle_cli.lora.update import largest_rank

    update = {module: truncated.update for module, truncated in modules.items()}
    rank = largest_rank(update)
    if request.uniform:
        update = {module: piece.padded(rank) for module, piece in update.items()}
    write_adapter(folder, update, request.base_model, dtype_named(request.save_dtype))
    return rank


def _cut(module: "TruncatedModule") -> Cut:
    return Cut(module.update.rank, module.kept, module.whole)


def _rank(update: "LowRankUpdate | Tensor") -> int:
    from recycle_cli.lora.update import LowRankUpdate

    return update.rank if isinstance(update, LowRankUpdate) else min(update.shape)


def _as_factors(update: "LowRankUpdate | Tensor") -> "LowRankUpdate":
    """A dense matrix as the product of itself and the identity."""
    import torch

    from recycle_cli.lora.update import LowRankUpdate

    if isinstance(update, LowRankUpdate):
        return update.to(torch.float32)
    rows, columns = update.shape
    if rows <= columns:
        return LowRankUpdate(update.float(), torch.eye(rows), 1.0)
    return LowRankUpdate(torch.eye(columns), update.float(), 1.0)


def _check_linear(
    name: str, shapes: Mapping[str, tuple[int, int]], there: Mapping[str, tuple[int, int]]
) -> None:
    for module, shape in shapes.items():
        if there.get(module) != shape:
            found = there.get(module, "not there")
            raise InputError(
                f"{module} is {shape} in the adapters and {found} in {name}",
                "name the base model of these adapters with --into-base",
            )


def _deviation(name: str, update: "ModelUpdate", folder: Path, settings: Settings) -> float:
    from recycle_cli.engine.base_model import load_base_model
    from recycle_cli.engine.comparison import sample_logits

    if settings.dtype == "auto":
        # In a coarser dtype the passes themselves would differ more than the weights do.
        settings = replace(settings, dtype="float32")
    apart = sample_logits(load_base_model(name, settings), update)
    merged = sample_logits(load_base_model(str(folder), settings), None)
    return float((apart - merged).abs().max())


def model_sha256(folder: Path, files: Sequence[str]) -> str:
    """The sha256 of a model: over those of its weights files, in the order given."""
    from recycle_cli.lora.folder import file_sha256

    whole = hashlib.sha256()
    for name in files:
        if name.endswith(".safetensors"):
            whole.update(file_sha256(folder / name).encode())
    return whole.hexdigest()
