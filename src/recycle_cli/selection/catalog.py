"""The selection methods there are. A new one is a file beside this one and a row here."""

from collections.abc import Mapping
from dataclasses import dataclass

from recycle_cli.errors import unknown_name


@dataclass(frozen=True)
class SelectionMethod:
    """A way to score adapters.

    Args:
        name: what `--method` takes.
        summary: one line for the help.
        paper: its source.
        needs_task: whether it runs the model on the task's rows.
    """

    name: str
    summary: str
    paper: str
    needs_task: bool


METHODS: Mapping[str, SelectionMethod] = {
    method.name: method
    for method in (
        SelectionMethod(
            "random",
            "a seeded shuffle: what the others are compared with",
            "arXiv 2602.12323",
            False,
        ),
        SelectionMethod(
            "evaluation",
            "the adapter's own metric on the task's training rows; ties by mean log-likelihood",
            "arXiv 2602.12323",
            True,
        ),
    )
}


def find_selection_method(name: str) -> SelectionMethod:
    """The method of that name.

    Raises:
        InputError: there is none; the hint names the nearest.
    """
    if name not in METHODS:
        raise unknown_name("selection method", name, METHODS)
    return METHODS[name]
