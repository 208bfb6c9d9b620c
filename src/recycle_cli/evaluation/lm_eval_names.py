"""lm-eval's tasks by name: found, loaded with their data, or refused in plain words."""

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from recycle_cli.errors import InputError, RecycleError
from recycle_cli.evaluation.lm_eval_run import metric_name, without_chatter

NEAREST = 3
SHOWN_DATA_SETS = 3
# What a task is compared by where nothing is asked for: the first of these that it reports.
USUAL = ("acc_norm", "acc", "exact_match")


@dataclass(frozen=True)
class NamedTask:
    """A task or a group of tasks of lm-eval, loaded.

    Args:
        name: as lm-eval calls it.
        loaded: what lm-eval's `TaskManager.load` gave.
    """

    name: str
    loaded: Any

    def metrics(self) -> dict[str, set[str]]:
        """Task -> the metrics that it reports, as `lm_eval_run.Figures` names them."""
        return {name: _metrics_of(task) for name, task in self.loaded["tasks"].items()}


def _metrics_of(task: Any) -> set[str]:
    chosen = [ensemble.name for ensemble in getattr(task, "_filters", [])] or ["none"]
    return {metric_name(metric, one) for metric in task.aggregation() for one in chosen}


def main_metric(reported: Iterable[str], asked: str | None) -> str | None:
    """The metric that adapters are compared by.

    Args:
        reported: the names of a task's metrics; of several filters the first in order of name.
        asked: what the user wants, with or without its filter; None for the usual one.

    Returns:
        None where what is asked for is not reported.
    """
    names = sorted(reported)
    for wanted in [asked] if asked else USUAL:
        for name in names:
            if wanted in (name, name.partition(",")[0]):
                return name
    return None if asked else next(iter(names), None)


def load_named_task(
    name: str,
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    offline: bool = False,
) -> NamedTask:
    """Finds and loads a task, a group or a tag of lm-eval, with its data.

    Args:
        name: as lm-eval calls it.
        include_path: a folder with more tasks in lm-eval's YAML form.
        num_fewshot: examples in front of each prompt; None for the task's own number. As in lm-eval
            itself, a task that says 0 keeps it.
        offline: read data sets from this machine's cache alone.

    Raises:
        InputError: there is no such task, it cannot be had, or it needs what we do not offer.
    """
    if offline:
        _stay_offline()
    manager = _manager_with(name, include_path)
    with without_chatter():
        try:
            loaded = manager.load([name])
        except RecycleError:
            raise
        # lm-eval lets through whatever `datasets`, the Hub's client and the task's own code raise.
        except Exception as error:
            raise _unavailable(name, manager, error, offline) from error
    for task in loaded["tasks"].values():
        _check_supported(name, task)
        _set_fewshot(task, num_fewshot)
    return NamedTask(name, loaded)


def _stay_offline() -> None:
    """Both libraries read these when they are first imported, which may be behind us."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    for module, names in (
        ("huggingface_hub.constants", ("HF_HUB_OFFLINE",)),
        ("datasets.config", ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")),
    ):
        if module in sys.modules:
            for name in names:
                if hasattr(sys.modules[module], name):
                    setattr(sys.modules[module], name, True)


def _manager_with(name: str, include_path: Path | None) -> Any:
    """The index of lm-eval's tasks that has this one.

    Reading the index of its own 14,000 takes seconds, so the user's folder is asked first.

    Raises:
        InputError: none has.
    """
    import datasets  # noqa: F401
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise InputError(
            f"--include-path is {str(include_path)!r}, which is no folder",
            "name a folder with lm-eval task files, NAME.yaml",
        )
    folder = str(include_path) if include_path else None
    if folder is not None:
        with without_chatter():
            manager = TaskManager(include_path=folder, include_defaults=False)
        if name in manager.all_tasks:
            return manager
    manager = _whole_index(folder)
    if name not in manager.all_tasks:
        raise _unknown(name, manager.all_tasks)
    return manager


@cache
def _whole_index(include_path: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    with without_chatter():
        return TaskManager(include_path=include_path)


def _unknown(name: str, known: list[str]) -> InputError:
    near = difflib.get_close_matches(name, known, n=NEAREST, cutoff=0.6)
    if not near:
        near = [one for one in known if name.lower() in one.lower()][:NEAREST]
    return InputError(
        f"there is no task {name!r}: no such file or folder here, and lm-eval has no task of that "
        "name",
        f"did you mean {' or '.join(near)}?"
        if near
        else "name a FILE.jsonl, a folder, a task.yaml, or one of `lm-eval ls tasks`",
    )


def _unavailable(name: str, manager: Any, error: Exception, offline: bool) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, ImportError):
        return InputError(
            f"lm-eval's task {name!r} needs a package that is not installed: {reason}",
            "install it, or name another task",
        )
    data_sets = sorted(set(_data_sets(manager, name)))
    named = [one for one in data_sets if one in str(error)] or data_sets
    shown = ", ".join(map(repr, named[:SHOWN_DATA_SETS]))
    more = f" and {len(named) - SHOWN_DATA_SETS} more" if len(named) > SHOWN_DATA_SETS else ""
    what = f"the data set {shown}{more}" if named else "its data"
    if offline:
        return InputError(
            f"lm-eval's task {name!r} needs {what}, which is not in this machine's cache",
            "run it once without --offline where the Hub can be reached, or copy the cache "
            f"(HF_HOME) from a machine that has it ({reason})",
        )
    return InputError(
        f"lm-eval's task {name!r} cannot be loaded: {what} cannot be had: {reason}",
        "check the network, or a gated data set's terms and your HF_TOKEN",
    )


def _data_sets(manager: Any, name: str) -> Iterator[str]:
    """The names of the data sets of a task, or of those of a group or tag."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    config = entry.cfg
    if config is None:  # a tag, which knows the tasks that bear it
        members: list[Any] = sorted(entry.tags)
    else:
        members = config["task"] if isinstance(config.get("task"), list) else []
        if isinstance(config.get("dataset_path"), str):
            files = (config.get("dataset_kwargs") or {}).get("data_files")
            yield str(files or config["dataset_path"])
    for member in members:
        child = member.get("task") if isinstance(member, dict) else member
        if isinstance(child, str) and child != name:
            yield from _data_sets(manager, child)


def _check_supported(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"lm-eval's task {name!r} runs code that the model writes",
            "run it with lm-eval itself, in a place where it can do no harm",
        )
    if getattr(task, "MULTIMODAL", False):
        raise InputError(
            f"lm-eval's task {name!r} shows pictures or sounds to the model", "use a task of text"
        )


def _set_fewshot(task: Any, asked: int | None) -> None:
    """As `lm_eval.simple_evaluate` does."""
    own = task.get_config("num_fewshot")
    if asked is not None and own != 0:
        task.set_config(key="num_fewshot", value=asked)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
