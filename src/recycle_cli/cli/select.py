"""`recycle select`."""

from typing import Annotated

import typer

from recycle_cli.cli.options import (
    AdaptersArgument,
    BaseModelOption,
    JsonOption,
    RowsOption,
    SeedOption,
    Session,
    TaskOption,
    load_base,
    read_inputs,
)
from recycle_cli.cli.output import Output
from recycle_cli.errors import InputError
from recycle_cli.selection.catalog import METHODS, find_selection_method

HELP = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())


def select(
    context: typer.Context,
    adapters: AdaptersArgument = None,
    task: TaskOption = None,
    method: Annotated[str, typer.Option("--method", help=HELP)] = "evaluation",
    k: Annotated[int, typer.Option("-k", min=1, help="How many adapters to take.")] = 10,
    base_model: BaseModelOption = None,
    rows: RowsOption = None,
    score_on: Annotated[
        str,
        typer.Option(
            "--score-on",
            help="train: the rows that tune trains on. all: the validation rows too, as the paper "
            "does.",
        ),
    ] = "train",
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Rank the pool (or the adapters given) for a task, and take the best."""
    from recycle_cli.evaluation.tasks import load_task
    from recycle_cli.workflows.select import SelectRequest, check_request, pool_of
    from recycle_cli.workflows.select import select as run

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    inputs = read_inputs(adapters)
    needs_task = find_selection_method(method).needs_task
    if score_on not in ("train", "all"):
        raise InputError(f"--score-on is {score_on!r}", "use train or all")
    loaded = load_task(inputs.task_source(task)) if needs_task or task else None
    named = bool(inputs.names or inputs.documents)
    request = SelectRequest(
        task=loaded,
        base_model=inputs.base_model(base_model),
        method=method,
        k=k,
        seed=seed,
        rows=rows,
        score_on=score_on,  # type: ignore[arg-type]  # checked above
        named=named,
    )
    pool = (
        inputs.sources(session.settings) if named else pool_of(request.base_model, session.settings)
    )
    check_request(request, pool)
    base = load_base(request.base_model, session) if needs_task else None
    with output.progress() as progress:
        document = run(request, pool, base, progress)
    if json:
        output.document(document)
        return
    output.table(
        f"{len(document.adapters)} of {len(pool)} adapters by {method}",
        ["adapter", "sha256", "score", "log-likelihood"],
        [(a.id, a.sha256[:8], a.score, a.log_likelihood) for a in document.adapters],
    )
    if document.tied_at_cut:
        output.text(f"{document.tied_at_cut} adapters left out score the same as the last taken")
    for left in document.left_out:
        output.text(f"left out: {left.id}: {left.reason}")
