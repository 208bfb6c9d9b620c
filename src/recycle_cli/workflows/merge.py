"""`recycle merge`: several adapters in, one adapter out, without data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError
from recycle_cli.merging.catalog import find_merge_method
from recycle_cli.progress import Progress
from recycle_cli.records import MergeDocument, WeightedAdapter
from recycle_cli.workflows.adapters import Source, load_updates
from recycle_cli.workflows.model_card import (
    Card,
    CardSource,
    license_of_sources,
    license_warnings,
    render_card,
)
from recycle_cli.workflows.output_folder import RECORD_FILE, check_output, write_record, writing
from recycle_cli.workflows.provenance import Clock, shown

if TYPE_CHECKING:
    from recycle_cli.lora.truncation import Truncated

LOW_ENERGY = 0.9


@dataclass(frozen=True)
class MergeRequest:
    """What to merge.

    Args:
        base_model: the canonical name of the base model.
        out: the folder to write.
        method: a name in the merging catalog.
        weights: one for each adapter, or None for 1 each.
        rank: `full`, `N` or `energy:E`.
        seed: kept in the document; these methods draw nothing.
        force: replace `out` where it exists.
    """

    base_model: str
    out: Path
    method: str = "average"
    weights: tuple[float, ...] | None = None
    rank: str = "full"
    seed: int = 0
    force: bool = False

    def command(self, sources: Sequence[Source]) -> list[str]:
        """The command line that asks for the same."""
        words = ["recycle", "merge", *(source.word for source in sources)]
        words += ["--base-model", self.base_model, "--method", self.method, "--rank", self.rank]
        if self.weights is not None:
            words += ["--weights=" + ",".join(f"{weight:g}" for weight in self.weights)]
        return [*words, "--out", shown(self.out)]


def merge(request: MergeRequest, sources: Sequence[Source], progress: Progress) -> MergeDocument:
    """Merges adapters and writes the result as a PEFT folder.

    Raises:
        InputError: the method is unknown, the weights do not fit, an adapter cannot be used with
            this base model or with the others, or `out` exists.
        RecycleError: the disk refused.
    """
    from recycle_cli.lora.truncation import parse_rank_policy, truncate

    clock = Clock()
    method = find_merge_method(request.method)
    weights = _weights(request, sources)
    policy = parse_rank_policy(request.rank)
    check_output(request.out, request.force, [source.ref.path for source in sources])
    progress.stage(f"merging {len(sources)} adapters")
    updates = load_updates(sources, request.base_model)
    _check_shapes(sources, updates)
    merged = truncate(method.load()(updates, weights), policy)
    return _write(request, sources, weights, merged, clock)


def _weights(request: MergeRequest, sources: Sequence[Source]) -> list[float]:
    if request.weights is None:
        return [1.0] * len(sources)
    if len(request.weights) != len(sources):
        raise InputError(
            f"--weights has {len(request.weights)} numbers for {len(sources)} adapters",
            "give one number for each adapter, in their order",
        )
    method = find_merge_method(request.method)
    if sum(request.weights) == 0 and not method.weights_may_sum_to_zero:
        raise InputError(
            f"--weights sums to 0, which --method {method.name} divides by",
            "use other weights, or --method linear",
        )
    return list(request.weights)


def _check_shapes(sources: Sequence[Source], updates: Sequence[object]) -> None:
    """All adapters must agree on the shape of every module that two of them change."""
    seen: dict[str, tuple[tuple[int, int], str]] = {}
    for source, update in zip(sources, updates, strict=True):
        for module, piece in update.items():  # type: ignore[attr-defined]
            shape, owner = seen.setdefault(module, (piece.shape, source.ref.id))
            if shape != piece.shape:
                raise InputError(
                    f"{module} is {shape} in {owner!r} and {piece.shape} in {source.ref.id!r}",
                    "merge adapters of one base model only",
                )


def _write(
    request: MergeRequest,
    sources: Sequence[Source],
    weights: Sequence[float],
    merged: "Truncated",
    clock: Clock,
) -> MergeDocument:
    from recycle_cli.lora.folder import weights_sha256, write_adapter
    from recycle_cli.lora.update import largest_rank

    licenses = [source.license for source in sources]
    warnings = license_warnings(licenses)
    if merged.energy_kept < LOW_ENERGY:
        warnings.append(
            f"The rank limit keeps only {merged.energy_kept:.1%} of the merged update's energy."
        )
    with writing(request.out, request.force) as folder:
        write_adapter(folder, merged.update, request.base_model)
        document = MergeDocument(
            method=request.method,
            params={"weights": list(weights), "rank": request.rank},
            base_model=request.base_model,
            adapters=[
                WeightedAdapter(**source.ref.model_dump(), weight=weight, license=source.license)
                for source, weight in zip(sources, weights, strict=True)
            ],
            rank=largest_rank(merged.update),
            energy_kept=merged.energy_kept,
            path=str(request.out.absolute()),
            sha256=weights_sha256(folder),
            warnings=warnings,
            **clock.fields(request.seed, request.command(sources)),
        )
        (folder / "README.md").write_text(render_card(_card(document)), encoding="utf-8")
        write_record(folder / RECORD_FILE, document)
    return document


def _card(document: MergeDocument) -> Card:
    method = find_merge_method(document.method)
    return Card(
        title=Path(document.path).name,
        summary=f"{len(document.adapters)} adapters merged by {method.summary} ({method.paper}).",
        base_model=document.base_model,
        sources=[
            CardSource(a.id, a.revision, a.sha256, a.weight, a.license) for a in document.adapters
        ],
        facts=[
            f"Largest rank {document.rank}; `--rank {document.params['rank']}` kept "
            f"{document.energy_kept:.4%} of the squared norm.",
        ],
        command=" ".join(document.command),
        warnings=document.warnings,
        license=license_of_sources([a.license for a in document.adapters]),
    )
