"""`recycle demo`."""

from pathlib import Path
from typing import Annotated

import typer

from recycle_cli.cli.options import ForceOption, JsonOption, SeedOption, Session
from recycle_cli.cli.output import Output
from recycle_cli.cli.study_show import show_study
from recycle_cli.lora.base_names import EMBEDDED_NAME, canonical_base_name


def demo(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", help="The folder for what it makes; one begun goes on.")
    ] = Path("demo"),
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
    """Show it all on a small real model: crawl, index, and a small study with its report."""
    from recycle_cli.workflows.demo import DemoRequest, check_demo
    from recycle_cli.workflows.demo import demo as run

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    request = DemoRequest(out, canonical_base_name(EMBEDDED_NAME), task, fast, seed, force)
    check_demo(request)
    with output.progress() as progress:
        document = run(request, session.settings, progress)
    show_study(output, document)
