"""Coefficients put together into groups that a plot has room for, and which cells are shown."""

import re
from collections.abc import Callable, Sequence
from statistics import fmean

from recycle_cli.records import StudyCoefficients

FEW = 12
LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


def readable_groups(cell: StudyCoefficients) -> list[tuple[str, StudyCoefficients]]:
    """The coefficients as they are, where there are few groups; else their means by kind of module
    and by layer, as far as the modules' paths tell them. Each with what its groups are."""
    if len(cell.groups) <= FEW:
        return [("group of modules", cell)]
    wanted = [("kind of module", _kind), ("layer", _layer)]
    summed = [(what, _grouped(cell, group_of)) for what, group_of in wanted]
    smaller = [(what, small) for what, small in summed if 1 < len(small.groups) < len(cell.groups)]
    return smaller or [("group of modules", cell)]


def shown_cells(cells: Sequence[StudyCoefficients], most: int) -> list[StudyCoefficients]:
    """Some of the cells: the first of each arm, then the second of each, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for cell in cells:
        seen[cell.method] = seen.get(cell.method, 0) + 1
        ranked.append((seen[cell.method], cell))
    return [cell for _, cell in sorted(ranked, key=lambda pair: pair[0])][:most]


def _kind(path: str) -> str:
    return path.rpartition(".")[2]


def _layer(path: str) -> str:
    found = LAYER.search(path)
    return found[1] if found else "other"


def _grouped(cell: StudyCoefficients, group_of: Callable[[str], str]) -> StudyCoefficients:
    """The mean over the members of each group; groups in the order of their first members."""
    members: dict[str, list[list[float]]] = {}
    for path, values in zip(cell.groups, cell.values, strict=True):
        members.setdefault(group_of(path), []).append(values)
    means = [[fmean(column) for column in zip(*rows, strict=True)] for rows in members.values()]
    return cell.model_copy(update={"groups": list(members), "values": means})
