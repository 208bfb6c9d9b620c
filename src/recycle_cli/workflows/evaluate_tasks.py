"""What `recycle eval` scores on: tasks of one's own, and lm-eval's by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recycle_cli.errors import InputError
from recycle_cli.evaluation.tasks import Task, load_task
from recycle_cli.progress import Progress
from recycle_cli.workflows.evaluate_named import LmEvalTask
from recycle_cli.workflows.evaluate_own import OwnTask
from recycle_cli.workflows.evaluate_results import AskedTask, TaskOptions

if TYPE_CHECKING:
    from recycle_cli.evaluation.lm_eval_names import NamedTask


def find_task(
    source: str,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> "Task | NamedTask":
    """The task that a name or path means: a file or a folder, else one of lm-eval's.

    Args:
        source: the name or path.
        include_path: a folder with more tasks in lm-eval's form.
        num_fewshot: examples before each prompt of a task of lm-eval's.
        offline: read its data from this machine's cache alone.
        progress: told when it is looked up, which can take a while.

    Raises:
        InputError: it is neither, or cannot be loaded.
    """
    from recycle_cli.evaluation.lm_eval_names import load_named_task

    path = Path(source).expanduser()
    if path.exists() or path.suffix in {".jsonl", ".yaml", ".yml"} or "/" in source:
        return load_task(source)
    if progress:
        progress.stage(f"loading lm-eval's task {source}")
    return load_named_task(source, include_path, num_fewshot, offline)


def ask(task: "Task | NamedTask", options: TaskOptions) -> AskedTask:
    """The task with the way that it is asked.

    Raises:
        InputError: it has no test rows or leaks them, or the metric does not fit.
    """
    return OwnTask(task, options) if isinstance(task, Task) else LmEvalTask(task, options)


def check_no_task_twice(tasks: "Sequence[Task | NamedTask]") -> None:
    """Checks that no rows are counted twice, as more than there are.

    Raises:
        InputError: two tasks are the same, under one name or two.
    """
    first: dict[str, Task | NamedTask] = {}
    for task in tasks:
        same = first.setdefault(task.sha256 if isinstance(task, Task) else task.name, task)
        if same is not task:
            names = f"{_place(same)} and {_place(task)}"
            raise InputError(
                f"the tasks {names} are the same rows, which would count twice",
                "name each task once",
            )


def _place(task: "Task | NamedTask") -> str:
    return str(task.path) if isinstance(task, Task) else task.name
