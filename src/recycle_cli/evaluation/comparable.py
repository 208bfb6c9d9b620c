"""Which arms can be compared, and on which tasks, where some runs failed: means over other tasks
are no rivals."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Comparable(Generic[T]):
    """Arms that were all scored on the same tasks.

    Args:
        scores: arm -> task -> its scores.
        tasks_left_out: those that an arm in `scores` was not scored on.
    """

    scores: dict[str, dict[str, T]]
    tasks_left_out: tuple[str, ...]


def comparable(scores: Mapping[str, Mapping[str, T]], anchors: Collection[str]) -> Comparable[T]:
    """The arms that share at least half of the tasks, with their scores on those that they share.

    Of arms that share fewer, the one with the fewest tasks is left out, until the others do.

    Args:
        scores: arm -> task -> its scores; tasks that an arm was not scored on are missing.
        anchors: the arms that all others are compared with, which are never left out. The tasks are
            those that they share.
    """
    tasks = _shared({name: scores[name] for name in anchors if name in scores} or scores)
    kept = {name: by_task for name, by_task in scores.items() if tasks}
    while kept and 2 * len(_shared(kept)) < len(tasks):
        others = [name for name in kept if name not in anchors]
        del kept[min(others, key=lambda name: len(set(kept[name]) & set(tasks)))]
    shared = [task for task in _shared(kept) if task in tasks]
    known = dict.fromkeys(task for by_task in scores.values() for task in by_task)
    return Comparable(
        {name: {task: kept[name][task] for task in shared} for name in kept},
        tuple(task for task in known if task not in shared),
    )


def _shared(scores: Mapping[str, Mapping[str, T]]) -> list[str]:
    """The tasks of all arms, in the order of the first's."""
    arms = list(scores.values())
    return [task for task in arms[0] if all(task in arm for arm in arms)] if arms else []
