"""`recycle eval`."""

import dataclasses
import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recycle_cli.cli.options import (
    AdaptersArgument,
    BaseModelOption,
    ForceOption,
    JsonOption,
    Session,
    load_base,
    read_inputs,
)
from recycle_cli.cli.output import Output

if TYPE_CHECKING:
    from recycle_cli.records import EvaluationDocument
    from recycle_cli.workflows.evaluate import Sample


def evaluate(
    context: typer.Context,
    adapters: AdaptersArgument = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="PATH",
            help="A folder with test.jsonl, or a task.yaml; may be given several times. "
            "Default: the task of the piped input.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", help="acc or exact_match. Default: acc where rows have choices."),
    ] = None,
    baseline: Annotated[
        str, typer.Option("--baseline", help="What to test against: base, or one of the adapters.")
    ] = "base",
    base_model: BaseModelOption = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Score only this many test rows.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer for exact_match.")
    ] = 30,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-under", metavar="METRIC=VALUE", help="Exit 3 when an adapter is below this."
        ),
    ] = None,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="Write every row's outcome to this JSONL file.")
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Accept test rows that are training rows too.")
    ] = False,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Score the base model and adapters on test rows, with paired tests."""
    from recycle_cli.evaluation.tasks import load_task
    from recycle_cli.workflows.evaluate import EvalRequest, check_gates, check_request
    from recycle_cli.workflows.evaluate import evaluate as run

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    inputs = read_inputs(adapters)
    if samples is not None:
        _check_samples(samples, force)
    request = EvalRequest(
        tasks=tuple(load_task(source) for source in task or [inputs.task_source(None)]),
        base_model=inputs.base_model(base_model),
        metric=metric,
        baseline=baseline,
        rows=rows,
        max_new_tokens=max_new_tokens,
        allow_overlap=allow_overlap,
    )
    sources = inputs.sources(session.settings)
    check_request(request, sources, fail_under or ())
    base = load_base(request.base_model, session)
    with output.progress() as progress:
        evaluated = run(request, sources, base, progress)
    if samples is not None:
        _write_samples(samples, evaluated.samples)
    if json:
        for document in evaluated.documents:
            output.document(document)
    else:
        _show(output, evaluated.documents)
    check_gates(evaluated.documents, fail_under or ())


def _check_samples(path: Path, force: bool) -> None:
    from recycle_cli.errors import InputError

    if path.exists() and not force:
        raise InputError(f"{path} exists", "name another file, or replace it: --force")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path.absolute().parent} does not exist", "make the folder first")


def _write_samples(path: Path, samples: "list[Sample]") -> None:
    beside = path.with_name(f".{path.name}.part")
    lines = (jsonlib.dumps(dataclasses.asdict(sample), ensure_ascii=False) for sample in samples)
    beside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    beside.replace(path)


def _show(output: Output, documents: "list[EvaluationDocument]") -> None:
    rows = []
    for document in documents:
        metric, value = next(iter(document.metrics.items()))
        low, high = document.interval[metric]
        paired = document.paired
        rows.append(
            (
                document.adapter if isinstance(document.adapter, str) else document.adapter.id,
                document.task.name,
                metric,
                f"{value:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{paired.difference:+.3f}" if paired else "-",
                f"{paired.p_value:.3g}" if paired else "-",
                document.task.rows,
            )
        )
    against = next((d.paired.baseline for d in documents if d.paired), "base")
    output.table(
        f"Test rows, compared with {against}",
        ["adapter", "task", "metric", "value", "95 % interval", "difference", "p", "rows"],
        rows,
    )
    for warning in sorted({warning for document in documents for warning in document.warnings}):
        output.message(f"warning: {warning}")
