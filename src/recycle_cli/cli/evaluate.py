"""`recycle eval`."""

import dataclasses
import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recycle_cli.cli.options import (
    MAX_SEED,
    AdaptersArgument,
    BaseModelOption,
    ForceOption,
    Inputs,
    JsonOption,
    Session,
    load_base,
    read_inputs,
)
from recycle_cli.cli.output import Output

if TYPE_CHECKING:
    from recycle_cli.records import EvaluationDocument, PairedTest
    from recycle_cli.settings import Settings
    from recycle_cli.workflows.adapters import Source
    from recycle_cli.workflows.evaluate import Sample
    from recycle_cli.workflows.evaluate_models import MergedModel


def evaluate(
    context: typer.Context,
    adapters: AdaptersArgument = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="PATH|NAME",
            help="A folder with test.jsonl, a task.yaml, or the name of one of lm-eval's tasks; "
            "may be given several times. Default: the task of the piped input.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="acc, exact_match, f1, rouge_l or perplexity, or a metric of the lm-eval task. "
            "Default: the task's own; acc where rows have choices.",
        ),
    ] = None,
    baseline: Annotated[
        str, typer.Option("--baseline", help="What to test against: base, or one of the adapters.")
    ] = "base",
    base_model: BaseModelOption = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", min=1, help="Score only this many test rows of each task."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer that is generated.")
    ] = 30,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", min=0, help="Examples before each prompt of lm-eval's."),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template", help="Put lm-eval's prompts into the model's chat template."
        ),
    ] = False,
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", help="A folder with more tasks in lm-eval's YAML form."),
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-under",
            metavar="METRIC=VALUE",
            help="Exit 3 when an adapter is worse than this on a task.",
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            metavar="better-than=NAME",
            help="Exit 3 unless every other adapter is shown to be better than this one: base, "
            "target, or one of the adapters.",
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option("--alpha", help="The largest p-value that --require takes for shown.")
    ] = 0.05,
    samples: Annotated[
        Path | None, typer.Option("--samples", help="Write every row's outcome to this JSONL file.")
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Accept test rows that are training rows too.")
    ] = False,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=MAX_SEED, help="Seed of bootstrap resamples.")
    ] = 0,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Score the base model, adapters and merged models on test rows, with paired tests."""
    from recycle_cli.workflows.adapters import target_of_documents
    from recycle_cli.workflows.evaluate import EvalRequest, check_request
    from recycle_cli.workflows.evaluate import evaluate as run
    from recycle_cli.workflows.evaluate_gates import (
        check_gates,
        check_gates_make_sense,
        parse_gates,
    )
    from recycle_cli.workflows.evaluate_tasks import find_task

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    inputs = read_inputs(adapters)
    if samples is not None:
        _check_samples(samples, force)
    gates = parse_gates(
        fail_under or (), require or (), alpha, target_of_documents(inputs.documents)
    )
    named = task or [inputs.task_source(None)]
    sources, models = _parted(inputs, session.settings)
    with output.progress() as progress:
        tasks = tuple(
            find_task(source, include_path, num_fewshot, session.settings.offline, progress)
            for source in named
        )
    request = EvalRequest(
        tasks=tasks,
        base_model=inputs.base_model(base_model),
        metric=metric,
        baseline=baseline,
        rows=rows,
        max_new_tokens=max_new_tokens,
        allow_overlap=allow_overlap,
        seed=seed,
        models=tuple(models),
        likelihoods=samples is not None,
        apply_chat_template=apply_chat_template,
        num_fewshot=num_fewshot,
        include_path=str(include_path) if include_path else None,
    )
    check_gates_make_sense(gates, request, sources, check_request(request, sources))
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
    check_gates(evaluated, gates, seed)


def _parted(
    inputs: Inputs, settings: "Settings"
) -> "tuple[Sequence[Source], Sequence[MergedModel]]":
    """The adapters, and the folders with whole models among what was named or piped."""
    from recycle_cli.workflows.evaluate_models import part_documents, part_names

    names, named = part_names(inputs.names, settings)
    documents, piped = part_documents(inputs.documents, settings)
    rest = Inputs(tuple(names), tuple(documents))
    only_models = bool(piped) and not documents
    return [] if only_models else rest.sources(settings), [*named, *piped]


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
    against = next((d.paired.baseline for d in documents if d.paired), "base")
    output.table(
        f"Test rows, compared with {against}",
        ["adapter", "task", "metric", "value", "95 % interval", "difference", "p", "rows"],
        [row for document in documents for row in _rows(document)],
    )
    if sum(document.paired is not None for document in documents) > 1:
        output.message("p allows for the number of comparisons (Holm)")
    for warning in sorted({warning for document in documents for warning in document.warnings}):
        output.message(f"warning: {warning}")


def _rows(document: "EvaluationDocument") -> list[tuple[object, ...]]:
    """A line for the metric that adapters are compared by, and one for each other of lm-eval's."""
    own = document.task.origin == "file"
    others = [] if own else [name for name in document.metrics if name != document.metric]
    rows: list[tuple[object, ...]] = []
    for metric in [document.metric, *others]:
        if metric not in document.metrics:
            continue
        paired = document.paired if metric == document.metric else None
        arrow = "" if document.higher_is_better.get(metric, True) else " (less is better)"
        interval = document.interval.get(metric)
        rows.append(
            (
                document.adapter if isinstance(document.adapter, str) else document.adapter.id,
                document.task.name,
                f"{metric}{arrow}",
                f"{document.metrics[metric]:.3f}",
                f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "-",
                f"{paired.difference:+.3f}" if paired else "-",
                _p_value(paired) if paired else "-",
                document.task.rows,
            )
        )
    return rows


def _p_value(paired: "PairedTest") -> str:
    value = paired.p_value if paired.adjusted_p_value is None else paired.adjusted_p_value
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
