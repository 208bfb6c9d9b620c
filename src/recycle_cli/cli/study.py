"""`recycle study`: the grid and its verdict."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recycle_cli.cli.options import MAX_SEED, JsonOption, Session
from recycle_cli.cli.output import Output
from recycle_cli.cli.study_show import show_study
from recycle_cli.errors import InputError

if TYPE_CHECKING:
    from recycle_cli.records import StudyPlanDocument
    from recycle_cli.workflows.study_config import StudyConfig

Guard = Callable[[Callable[..., None]], Callable[..., None]]
CONTROLS = ("random", "rescale", "single")
TARGETS = {"both": [False, True], "with": [True], "without": [False]}
KEEPS = ("best", "target", "all", "none")


def make_app(guarded: Guard) -> typer.Typer:
    """The command group; `guarded` turns known failures into two lines and an exit code."""
    app = typer.Typer(
        invoke_without_command=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        help="Compare methods with their controls over tasks and seeds, and hear whether recycling "
        "helped; or write the report of a finished study again (report).",
    )
    app.callback()(guarded(study))
    app.command("report")(guarded(report))
    return app


def study(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="A YAML file with the study's fields."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The folder of the study; one that was begun goes on."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="PATH", help="A task; may be given several times."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Of tune or merge; may be given several times."),
    ] = None,
    selection: Annotated[
        list[str] | None,
        typer.Option("--selection", help="How adapters are chosen, as select's --method."),
    ] = None,
    k: Annotated[
        list[int] | None, typer.Option("-k", min=1, help="How many adapters; may be repeated.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", help=f"Beside the target LoRA or not: {', '.join(TARGETS)}. Default: both."
        ),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option("--control", help=f"Of {', '.join(CONTROLS)}; default: all; or none."),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", min=0, max=MAX_SEED, help="May be given several times."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model", metavar="NAME", help="smollm2 (the default), a Hub id, a folder."
        ),
    ] = None,
    ids_from: Annotated[
        Path | None,
        typer.Option("--ids-from", help="Choose from the adapters that this file lists alone."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=5, help="Training rows of each task. Default: 100.")
    ] = None,
    test_rows: Annotated[
        int | None, typer.Option("--test-rows", min=1, help="Test rows of each task.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=0, help="Of all training, that of the target LoRA too."),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option("--margin", help="How many points apart still counts as equal. Default: 1."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option("--keep", help=f"Adapters to keep: {', '.join(KEEPS)}. Default: best."),
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Accept test rows that are training rows too.")
    ] = False,
    reuse: Annotated[
        list[Path] | None,
        typer.Option("--reuse", metavar="DIR", help="Take finished runs of this study too."),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, max=64, help="Processes, each with the base model.")
    ] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Cores of each; default: its share.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Run on a Ray cluster: host:port or local."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what it would take, and do nothing.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Run a study, or what is missing of it."""
    if context.invoked_subcommand is not None:
        return
    from recycle_cli.workflows.study import StudyRequest, check_study
    from recycle_cli.workflows.study import study as run
    from recycle_cli.workflows.study_estimate import estimate

    session: Session = context.obj
    output = Output(json, session.quiet, session.verbose)
    block: dict[str, Any] = {
        "methods": method,
        "selection": selection,
        "k": k,
        "with_target": _targets(target),
        "controls": _controls(control),
    }
    given: dict[str, Any] = {
        "base_model": base_model,
        "tasks": task,
        "seeds": seed,
        "rows": rows,
        "test_rows": test_rows,
        "margin": margin,
        "keep": keep,
        "allow_overlap": allow_overlap or None,
    }
    fields = {name: value for name, value in given.items() if value is not None}
    grid = {name: value for name, value in block.items() if value is not None}
    settled = _config(config, fields, grid, ids_from, steps)
    if out is None and not dry_run:
        raise InputError("a study needs a folder", "name it with --out DIR")
    request = StudyRequest(settled, out or Path("study"), tuple(reuse or ()), jobs, threads, ray)
    with output.progress() as progress:
        if dry_run:
            plan = estimate(request, session.settings, progress)
        else:
            material = check_study(request, session.settings)
            document = run(request, material, session.settings, progress).study
    if dry_run:
        _show_plan(output, plan)
    else:
        show_study(output, document)


def report(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The folder of a study.")],
    json: JsonOption = False,
) -> None:
    """Write the report of a finished study again, without running anything."""
    from recycle_cli.workflows.study import report as run

    session: Session = context.obj
    show_study(Output(json, session.quiet, session.verbose), run(folder).study)


def _config(
    file: Path | None,
    fields: dict[str, Any],
    grid: dict[str, Any],
    ids_from: Path | None,
    steps: int | None,
) -> "StudyConfig":
    """The study, from its file and the flags, which win."""
    from recycle_cli.workflows.study_config import anchored, config_of, read_config

    if file is not None and grid:
        option = {"methods": "--method", "with_target": "--target", "controls": "--control"}
        name = next(iter(grid))
        raise InputError(
            f"{option.get(name, '--selection' if name == 'selection' else '-k')} is about the "
            f"grid, which {file} describes",
            "change the file, or leave out --config",
        )
    if ids_from is not None:
        fields["pool"] = {"ids_from": str(ids_from)}
    if steps is not None:
        fields["pace"] = fields["target"] = {"steps": steps}
    fields = anchored(fields, Path.cwd())
    if file is not None:
        return read_config(file, fields)
    if "tasks" not in fields:
        raise InputError("a study needs tasks", "name them with --task, or give --config FILE")
    return config_of({**fields, "grid": [{"methods": ["recycle"], **grid}]}, "the options")


def _targets(text: str | None) -> list[bool] | None:
    if text is not None and text not in TARGETS:
        raise InputError(f"--target is {text!r}", f"use one of: {', '.join(TARGETS)}")
    return TARGETS[text] if text else None


def _controls(names: list[str] | None) -> list[str] | None:
    for name in names or ():
        if name not in (*CONTROLS, "none"):
            raise InputError(f"--control is {name!r}", f"use {', '.join(CONTROLS)} or none")
    if names and "none" in names and len(names) > 1:
        raise InputError(f"--control is {' and '.join(names)}", "name controls, or none alone")
    return [] if names == ["none"] else names


def _show_plan(output: Output, plan: "StudyPlanDocument") -> None:
    if output.json:
        output.document(plan)
        return
    output.text(
        f"{plan.name}: {len(plan.tasks)} tasks x {len(plan.arms)} arms x {len(plan.seeds)} seeds: "
        f"{plan.cells} cells, at most {plan.runs} runs"
    )
    for name, reason in plan.missing_tasks.items():
        output.text(f"missing: {name}: {reason}")
    if plan.reused is not None:
        output.text(f"{plan.reused} runs are there already")
    if plan.elapsed_s is not None:
        minutes = plan.elapsed_s / 60
        long = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.1f} minutes"
        output.text(f"about {long} for the rest")
    if plan.disk_bytes is not None:
        output.text(f"about {plan.disk_bytes / 1e9:.2f} GB on the disk")
    for note in plan.notes:
        output.text(note)
