"""The `recycle` command: global options, the list of commands, and how failures end."""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from recycle_cli import __version__
from recycle_cli.cli import crawl, demo, evaluate, index, merge, select, study, tune
from recycle_cli.cli.options import Session
from recycle_cli.cli.output import print_error
from recycle_cli.errors import ExitCode, RecycleError
from recycle_cli.settings import read_settings

app = typer.Typer(
    name="recycle",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Recycle LoRA adapters: find, rank, merge and tune them for a task of your own, "
    "and hear whether it helped.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"recycle {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    home: Annotated[
        Path | None,
        typer.Option(
            "--home",
            envvar="RECYCLE_HOME",
            show_envvar=True,
            help="Where recycle keeps the index, the adapter cache and converted models.",
        ),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no messages.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say what is used, and why.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Global options; they stand before the command."""
    settings = read_settings(home, offline)
    if settings.offline:
        # The Hub's client reads this once, when it is first imported.
        os.environ["HF_HUB_OFFLINE"] = "1"
    context.obj = Session(settings, quiet, verbose)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Lets known failures end in two lines and their exit code instead of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except RecycleError as error:
            print_error(error)
            raise typer.Exit(int(error.exit_code)) from error
        except BrokenPipeError as error:
            # Whoever read our output has gone, as `head` does.
            _drop_stdout()
            raise typer.Exit(int(ExitCode.FAILED)) from error
        except OSError as error:
            # A full disk, a file that may not be read: the machine's trouble, no defect of ours.
            print_error(RecycleError(str(error), "mend that, and run it again"))
            _drop_stdout()
            raise typer.Exit(int(ExitCode.FAILED)) from error

    return run


def _drop_stdout() -> None:
    """Points stdout elsewhere: what it could not take, Python would flush again at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _end_on_sigterm(*_: object) -> None:
    # As an exception, so that what is half-written is removed on the way out.
    sys.exit(128 + signal.SIGTERM)


app.command("crawl")(guarded(crawl.crawl))
app.add_typer(index.make_app(guarded), name="index")
app.command("select")(guarded(select.select))
app.command("merge")(guarded(merge.merge))
app.command("tune")(guarded(tune.tune))
app.command("eval")(guarded(evaluate.evaluate))
app.add_typer(study.make_app(guarded), name="study")
app.command("demo")(guarded(demo.demo))


def main() -> None:
    """The console script."""
    # Waiting OpenMP threads would spin, which slows everything down many times over as soon as
    # another process wants the same cores. OpenMP reads this once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signal.signal(signal.SIGTERM, _end_on_sigterm)
    _answer_help(sys.argv[1:])
    app(prog_name="recycle")


def _answer_help(words: list[str]) -> None:
    """Goes straight to the command where only its help is asked for, and does not come back.

    The usual way reads the global options first, for which typer loads pydantic: half the time.
    """
    command: Any = typer.main.get_command(app)
    name = "recycle"
    while words and words[0] in getattr(command, "commands", {}):
        command, name, words = command.commands[words[0]], f"{name} {words[0]}", words[1:]
    if words == ["--help"]:
        command.main(args=words, prog_name=name)
