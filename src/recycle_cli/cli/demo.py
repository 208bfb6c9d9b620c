"""`recycle demo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recycle_cli.cli.options import ForceOption, JsonOption, SeedOption, Session, load_base
from recycle_cli.cli.output import Output
from recycle_cli.lora.base_names import EMBEDDED_NAME, canonical_base_name

if TYPE_CHECKING:
    from recycle_cli.records import StudyDocument

ROW_TITLES = {
    "base": "base model",
    "target": "target LoRA",
    "average": "average",
    "recycled": "recycled",
    "recycled+target": "recycled + target",
    "control": "control: random adapters",
    "control+target": "control: random + target",
    "rescaled-target": "control: rescaled target",
}
FAST_NOTE = (
    "This was --fast: fewer rows, adapters and steps. It shows how things work; with trainings cut "
    "this short, neither figures nor verdict are to be relied on."
)


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="The folder for what it makes.")] = Path(
        "demo"
    ),
    task: Annotated[
        str,
        typer.Option("--task", help="An example task that no adapter of the pool was trained on."),
    ] = "hotel_reviews",
    fast: Annotated[
        bool, typer.Option("--fast", help="Fewer rows, adapters and steps: a few minutes.")
    ] = False,
    seed: SeedOption = 0,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Show it all on a small real model: crawl, index, select, merge, tune, eval, verdict."""
    from recycle_cli.workflows.demo import DemoRequest, check_demo
    from recycle_cli.workflows.demo import demo as run

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    request = DemoRequest(out, canonical_base_name(EMBEDDED_NAME), task, fast, seed, force)
    check_demo(request)
    base = load_base(EMBEDDED_NAME, session)
    with output.progress() as progress:
        document = run(request, session.settings, base, progress)
    if json:
        output.document(document)
    else:
        _show(output, document)


def _show(output: Output, document: "StudyDocument") -> None:
    figures = document.verdict.figures
    metric = next(iter(document.table[0].metrics))
    output.text()
    output.table(
        f"{document.table[0].task}: {metric} on {figures['rows']:.0f} test rows, "
        f"{document.rows} rows to learn from, seed {document.seed}",
        ["method", metric, "95 % interval", "p against target LoRA", "seconds"],
        [
            (
                ROW_TITLES[row.method],
                f"{100 * row.metrics[metric]:.1f} %",
                "{:.1f} to {:.1f} %".format(*(100 * end for end in row.interval)),
                "-" if row.p_value_against_target is None else f"{row.p_value_against_target:.2g}",
                f"{row.elapsed_s:.0f}",
            )
            for row in document.table
        ],
    )
    output.text(f"Verdict: {document.verdict.sentence}")
    if document.fast:
        output.text(FAST_NOTE)
    output.text(f"\nThe adapter with the lowest validation loss: {document.adapter}")
    output.text(f"All of them, and recycle.json with these figures: {document.path}")
    output.text(f"{document.elapsed_s / 60:.1f} minutes")
