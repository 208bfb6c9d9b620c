"""`recycle select`."""

from typing import TYPE_CHECKING, Annotated

import typer

from recycle_cli.cli.options import (
    SOURCES,
    AdaptersArgument,
    BaseModelOption,
    JsonOption,
    RowsOption,
    SeedOption,
    Session,
    TaskOption,
    checked_source,
    load_base,
    read_inputs,
)
from recycle_cli.cli.output import Output
from recycle_cli.errors import InputError
from recycle_cli.selection.catalog import AGGREGATES, METHODS, find_selection_method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from recycle_cli.records import ScoredAdapter, SelectionDocument
    from recycle_cli.workflows.select_document import Selection

HELP = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
BELOW_SHOWN = 3
COMPARING = ", ".join(method.name for method in METHODS.values() if method.needs == "target")


def select(
    context: typer.Context,
    adapters: AdaptersArgument = None,
    task: TaskOption = None,
    method: Annotated[str, typer.Option("--method", help=HELP)] = "evaluation",
    k: Annotated[int, typer.Option("-k", min=1, help="How many adapters to take.")] = 10,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", metavar="ADAPTER", help=f"The target LoRA to compare with: {COMPARING}."
        ),
    ] = None,
    include_target: Annotated[
        bool,
        typer.Option(
            "--include-target", help="Put the target LoRA first, as one of the k, and mark it."
        ),
    ] = False,
    aggregate: Annotated[
        str,
        typer.Option(
            "--aggregate",
            help=f"How modules are put together: {', '.join(AGGREGATES)} (sums before the "
            "quotient, or the mean of the modules' quotients).",
        ),
    ] = "macro",
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
    license_: Annotated[
        str | None, typer.Option("--license", help="Of the index: with this licence.")
    ] = None,
    author: Annotated[
        str | None, typer.Option("--author", help="Of the index: by this author.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--source", help=f"Of the index: from one of: {', '.join(SOURCES)}."),
    ] = None,
    min_rank: Annotated[
        int | None, typer.Option("--min-rank", min=1, help="Of the index: of this rank on.")
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", min=1, help="Of the index: up to this rank.")
    ] = None,
    target_module: Annotated[
        str | None,
        typer.Option("--target-module", help="Of the index: that adapt this module."),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option("--search", help="Of the index: that this search finds, as in index list."),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            "--workers", min=1, max=64, help="Processes that score, each with the base model."
        ),
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="ADDRESS", help="Score on a Ray cluster: host:port, auto or local."
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Tell who is below the cut, what the scores mean, the cost."
        ),
    ] = False,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Rank the pool (or the adapters given) for a task, and take the best."""
    from recycle_cli.evaluation.tasks import load_task
    from recycle_cli.store.catalog import AdapterQuery
    from recycle_cli.workflows.adapters import resolve_names
    from recycle_cli.workflows.select import pool_of, rank_pool
    from recycle_cli.workflows.select_request import SelectRequest, check_request

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    inputs = read_inputs(adapters)
    chosen = find_selection_method(method)
    if score_on not in ("train", "all"):
        raise InputError(f"--score-on is {score_on!r}", "use train or all")
    if explain and json:
        raise InputError("--explain is for people, --json for programs", "leave out one of them")
    loaded = load_task(inputs.task_source(task)) if chosen.needs_task or task else None
    named = bool(inputs.names or inputs.documents)
    filters = {
        "--license": license_,
        "--author": author,
        "--source": source,
        "--min-rank": min_rank,
        "--max-rank": max_rank,
        "--target-module": target_module,
        "--search": search,
    }
    given = {option: str(value) for option, value in filters.items() if value is not None}
    if named and given:
        raise InputError(
            f"{next(iter(given))} is about the index, and adapters were given", "leave out either"
        )
    request = SelectRequest(
        task=loaded,
        base_model=inputs.base_model(base_model),
        method=method,
        k=k,
        seed=seed,
        rows=rows,
        score_on=score_on,  # type: ignore[arg-type]  # checked above
        aggregate=aggregate,  # type: ignore[arg-type]  # checked by check_request
        target=resolve_names([target], session.settings)[0] if target else None,
        include_target=include_target,
        named=named,
        filters=given,
        workers=workers,
        ray=ray,
    )
    query = AdapterQuery(
        license=license_,
        author=author,
        source=checked_source(source),
        min_rank=min_rank,
        max_rank=max_rank,
        target_module=target_module,
        search=search,
    )
    pool = (
        inputs.sources(session.settings)
        if named
        else pool_of(request.base_model, session.settings, query)
    )
    check_request(request, pool)
    base = load_base(request.base_model, session) if request.runs_model_here else None
    with output.progress() as progress:
        selection = rank_pool(request, pool, base, session.settings, progress)
    if json:
        output.document(selection.document)
    else:
        _tell(output, selection, len(pool), explain)


def _tell(output: Output, selection: "Selection", pool: int, explain: bool) -> None:
    """Prints a selection for people."""
    document, below = selection.document, selection.below
    taken = f"{len(document.adapters)} of {pool} adapters by {document.method}"
    _table(output, taken, document.adapters)
    if explain and below:
        _table(output, f"below the cut, the first of {len(below)}", below[:BELOW_SHOWN])
    if document.tied_at_cut:
        last = document.adapters[-1].score
        sharing = sum(adapter.score == last for adapter in document.adapters)
        output.text(
            f"{sharing + document.tied_at_cut} adapters share the last score that was taken; "
            f"{document.tied_at_cut} of them did not come in"
        )
    for left in document.left_out:
        output.text(f"left out: {left.id}: {left.reason}")
    if explain:
        _explain(output, document)


def _table(output: Output, title: str, adapters: "Sequence[ScoredAdapter]") -> None:
    output.table(
        title,
        ["adapter", "sha256", "role", "score", "log-likelihood"],
        [(a.id, a.sha256[:8], a.role, a.score, a.log_likelihood) for a in adapters],
    )


def _explain(output: Output, document: "SelectionDocument") -> None:
    method, cost = find_selection_method(document.method), document.cost
    output.text(f"{method.name}: {method.summary} ({method.paper or 'our own'}).")
    output.text(f"{method.detail} Score: {method.formula}. Higher is better.")
    passes = f"{cost.passes} pass{'es' * (cost.passes != 1)} of the model"
    output.text(f"{passes} over {cost.rows_scored} rows in all, {cost.elapsed_s:.1f} s")
    if cost.rows_of_full:
        output.text(f"every adapter on every row would be {cost.rows_of_full} rows")
    if cost.agreement is not None:
        output.text(f"{cost.agreement:.0%} of them are among the first of the full ranking too")
