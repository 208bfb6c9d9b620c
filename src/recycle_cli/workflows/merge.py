"""`recycle merge`: several adapters in, one adapter or one model out, without data."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError
from recycle_cli.merging.catalog import MergeMethod, load_rule
from recycle_cli.progress import Progress
from recycle_cli.records import MergeDocument, WeightedAdapter
from recycle_cli.settings import Settings
from recycle_cli.workflows.adapters import OpenSource, Source, counted
from recycle_cli.workflows.licenses import joined_licenses
from recycle_cli.workflows.merge_card import merge_card, merge_warnings
from recycle_cli.workflows.merge_request import WITH_RESIDUAL, MergeRequest, check_merge
from recycle_cli.workflows.merge_results import (
    Outcome,
    find_target,
    merge_modules,
    write_merged_adapter,
    write_merged_model,
)
from recycle_cli.workflows.model_card import render_card
from recycle_cli.workflows.output_folder import (
    RECORD_FILE,
    check_output,
    write_record,
    writing,
)
from recycle_cli.workflows.provenance import Clock

if TYPE_CHECKING:
    from recycle_cli.merging.group import MergeRule
    from recycle_cli.merging.merger import Merger


def merge(
    request: MergeRequest, sources: Sequence[Source], settings: Settings, progress: Progress
) -> MergeDocument:
    """Merges adapters and writes the result: a PEFT folder, or a model's.

    Adapters are read one module at a time, so memory holds the result and one module of each.

    Raises:
        InputError: the request cannot be met (`check_merge`), an adapter cannot be used with
            this base model or with the others, or `out` exists.
        RecycleError: the disk refused.
    """
    from recycle_cli.lora.truncation import parse_rank_policy

    clock = Clock()
    method = check_merge(request, sources)
    policy = parse_rank_policy(request.rank)
    read = [source.ref.path for source in sources] + [request.into_base or ""]
    check_output(request.out, request.force, [path for path in read if path])
    rule = method.load(method.settings(request.parameters))
    with _opened(sources, request.base_model) as opened:
        merger = _merger(request, opened, rule)
        progress.stage(f"merging {counted(sources)}", len(merger.shapes))
        if request.into_base is not None:
            target = find_target(request.into_base, merger.shapes, settings)
            with writing(request.out, request.force) as folder:
                outcome = write_merged_model(
                    request, target, merger, policy, settings, folder, progress
                )
                return _describe(request, method, sources, outcome, folder, clock)
        residual = None
        if request.form == WITH_RESIDUAL and method.split:
            first, rest = (_merger(request, opened, load_rule(part)) for part in method.split)
            adapter = merge_modules(first, parse_rank_policy("full"), request.save_dtype, progress)
            progress.stage("computing the residual", len(rest.shapes))
            residual = merge_modules(rest, policy, request.save_dtype, progress)
        else:
            adapter = merge_modules(merger, policy, request.save_dtype, progress)
    with writing(request.out, request.force) as folder:
        outcome = write_merged_adapter(request, adapter, residual, folder)
        return _describe(request, method, sources, outcome, folder, clock)


@contextlib.contextmanager
def _opened(sources: Sequence[Source], base_model: str) -> Iterator[list[OpenSource]]:
    """The adapters, open for reading; they agree on the shapes of the modules they share.

    Raises:
        InputError: they do not, or one cannot be used.
    """
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(source.open(base_model)) for source in sources]
        _check_shapes(opened)
        yield opened


def _check_shapes(opened: Sequence[OpenSource]) -> None:
    seen: dict[str, tuple[tuple[int, int], str]] = {}
    for one in opened:
        name = one.source.ref.id
        for module, shape in one.shapes.items():
            there, owner = seen.setdefault(module, (shape, name))
            if there != shape:
                raise InputError(
                    f"{module} is {there} in {owner!r} and {shape} in {name!r}",
                    "merge adapters of one base model only",
                )


def _merger(request: MergeRequest, opened: Sequence[OpenSource], rule: "MergeRule") -> "Merger":
    from recycle_cli.merging.merger import Contribution, Merger

    weights = request.weights or [1.0] * len(opened)
    contributions = [
        Contribution(one.source.ref.sha256, weight, one.shapes, one.read)
        for one, weight in zip(opened, weights, strict=True)
    ]
    return Merger(rule, contributions, request.seed, request.absent)


def _describe(
    request: MergeRequest,
    method: MergeMethod,
    sources: Sequence[Source],
    outcome: Outcome,
    folder: Path,
    clock: Clock,
) -> MergeDocument:
    """Writes the card and the record beside what was written."""
    weights = request.weights or [1.0] * len(sources)
    written = {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}
    document = MergeDocument(
        method=request.method,
        params={
            "weights": list(weights),
            "rank": request.rank,
            "absent": request.absent,
            **method.settings(request.parameters),
        },
        base_model=request.base_model,
        adapters=[
            WeightedAdapter(**source.ref.model_dump(), weight=weight, license=source.license)
            for source, weight in zip(sources, weights, strict=True)
        ],
        form=outcome.form,
        rank=outcome.rank,
        energy_kept=outcome.energy_kept,
        energy_by_module=outcome.energy_by_module,
        max_logit_deviation=outcome.max_logit_deviation,
        path=str(request.out.absolute()),
        files=sorted(written | {"README.md", RECORD_FILE}),
        sha256=outcome.sha256,
        licenses=joined_licenses([source.license for source in sources]),
        warnings=merge_warnings(request, sources, outcome),
        **clock.fields(request.seed, request.command(sources)),
    )
    (folder / "README.md").write_text(render_card(merge_card(document)), encoding="utf-8")
    write_record(folder / RECORD_FILE, document)
    return document
