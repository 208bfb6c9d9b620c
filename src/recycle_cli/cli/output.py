"""The only writer of stdout and stderr.

stdout carries results: tables and sentences for people, or with `--json` one JSON document a line.
stderr is for people alone: errors, hints, and progress where it is a terminal.
"""

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from recycle_cli.errors import RecycleError

if TYPE_CHECKING:
    from recycle_cli.records import Document

LOG_EVERY_S = 15.0


class Output:
    """Where a command writes.

    Args:
        json: print documents, not tables.
        quiet: no progress and no messages, only results and errors.
        verbose: messages about what is used and why.
    """

    def __init__(self, json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.verbose = verbose

    def document(self, document: "Document") -> None:
        """One line of JSON on stdout."""
        print(document.to_line(), flush=True)

    def text(self, text: str = "") -> None:
        """A line for people on stdout."""
        print(text)

    def table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table for people on stdout. Columns whose cells are all numbers align right."""
        from rich import box
        from rich.table import Table

        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for position, header in enumerate(headers):
            numeric = all(isinstance(row[position], int | float) for row in rows)
            table.add_column(header, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_cell(value) for value in row))
        _console(sys.stdout).print(table)

    def message(self, text: str) -> None:
        """A line for people on stderr, unless quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """A line for people on stderr, when verbose."""
        if self.verbose:
            print(text, file=sys.stderr, flush=True)

    def progress(self) -> "TerminalProgress":
        """A progress to hand to a workflow, as a context manager."""
        return TerminalProgress(self)


def print_error(error: RecycleError) -> None:
    """The two lines that every failure is shown as."""
    print(f"error: {error.message}", file=sys.stderr)
    print(f"hint: {error.hint}", file=sys.stderr, flush=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _console(stream: Any) -> Any:
    from rich.console import Console

    # A pipe or a file has no width of its own; folding at 80 would cut ids and paths.
    return Console(
        file=stream,
        width=None if stream.isatty() else 160,
        highlight=False,
        markup=False,
        emoji=False,
    )


class TerminalProgress:
    """Progress on stderr: a bar on a terminal, else a line a stage and now and then one between.

    Satisfies `recycle_cli.progress.Progress`.
    """

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bar: Any = None
        self._task: Any = None
        self._title = ""
        self._total: int | None = None
        self._done = 0
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and not self._output.quiet:
            self._bar = _make_bar()
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, title: str, total: int | None = None) -> None:
        """A new stage begins."""
        self._title, self._total, self._done = title, total, 0
        self._started = self._said = time.monotonic()
        if self._bar is None:
            self._output.message(f"{title} ...")
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(title, total=total, note="")

    def advance(self, note: str = "") -> None:
        """One more step is done."""
        self._done += 1
        if self._bar is not None:
            if self._task is not None:
                self._bar.update(self._task, advance=1, note=note)
            return
        now = time.monotonic()
        if now - self._said >= LOG_EVERY_S:
            self._said = now
            self._output.message(f"  {self._title}: {self._counted()}{self._left(now)}  {note}")

    def message(self, text: str) -> None:
        """Something worth saying that is no step."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            self._output.message(text)

    def detail(self, text: str) -> None:
        """Something for those who want to know more."""
        if self._output.verbose:
            self.message(text)

    def _counted(self) -> str:
        return f"{self._done}/{self._total}" if self._total else str(self._done)

    def _left(self, now: float) -> str:
        if not self._total or not self._done:
            return ""
        left = (now - self._started) / self._done * (self._total - self._done)
        return f", {left:.0f} s left"


def _make_bar() -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )

    class RateColumn(ProgressColumn):
        """Steps a second, or seconds a step."""

        def render(self, task: Task) -> str:
            if not task.speed:
                return ""
            return f"{task.speed:.1f}/s" if task.speed >= 1 else f"{1 / task.speed:.1f} s each"

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=_console(sys.stderr),
        transient=True,
    )
