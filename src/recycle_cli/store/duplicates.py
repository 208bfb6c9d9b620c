"""Adapters that are the same or nearly so, told by their weights' sha256 and by projections.

Nothing here reads an adapter. All pairs are compared, in blocks of rows, so that what is held at
once are the projections, 32 bytes a module and adapter, and the cosines of one block.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from recycle_cli.store.details import StoredProjections

Relation = Literal["identical", "same_update", "near"]
Numbers = NDArray[np.float32]
Places = NDArray[np.int64]
BLOCK_ROWS = 1024
ROUNDING = 1e-5
"""What float32 may take off a cosine."""
SAME_DISTANCE = 0.005
"""The relative distance |x - y| / |x| up to which two updates are the same: twice what saving their
factors in bfloat16 costs."""
SAME_COSINE = 1.0 - SAME_DISTANCE**2 / 2


@dataclass(frozen=True)
class Group:
    """Adapters that belong together: their numbers, the first leading, and for each the cosine
    of its update with that of the first."""

    relation: Relation
    places: list[int]
    cosines: list[float]


def identical_groups(sha256: Sequence[str | None]) -> list[Group]:
    """Groups of adapters with the same weights file, the largest first.

    Args:
        sha256: of each adapter, the one to lead its group before the others.
    """
    found: dict[str, list[int]] = {}
    for place, digest in enumerate(sha256):
        if digest is not None:
            found.setdefault(digest, []).append(place)
    groups = [places for places in found.values() if len(places) > 1]
    return [Group("identical", one, [1.0] * len(one)) for one in sorted(groups, key=_largest_first)]


def similar_groups(
    adapters: Mapping[int, StoredProjections],
    paths: Mapping[int, Sequence[str]],
    threshold: float,
) -> list[Group]:
    """Groups of adapters with the same update, and of those with nearly the same, the largest
    first. Groups of near ones hold the leaders of the others.

    Args:
        adapters: by their numbers, the one to lead its group before the others. Those whose
            projections are all zero, or no numbers, are left out.
        paths: the module paths of every set of modules that adapters name.
        threshold: the least cosine of near ones, in (0, 1].
    """
    places, units, sizes = _units(adapters, paths)
    ranks = _numbered((adapters[place].modules, adapters[place].ranks) for place in places)
    same = near = np.arange(len(places))
    for one, other, cosines in _pairs(units, min(threshold - ROUNDING, SAME_COSINE)):
        alike = (
            (cosines >= SAME_COSINE)
            & (np.abs(sizes[one] / sizes[other] - 1) <= SAME_DISTANCE)
            & (ranks[one] == ranks[other])
        )
        same = _joined(same, one[alike], other[alike])
        near = _joined(near, one, other)
    twins = _members(same, np.arange(len(places)))
    leaders = np.unique(same, return_index=True)[1]
    groups: tuple[tuple[Relation, list[Places]], ...] = (
        ("same_update", twins),
        ("near", _members(near, np.sort(leaders))),
    )
    return [
        Group(
            relation,
            [places[member] for member in members],
            np.minimum(units[members] @ units[members[0]], 1.0).tolist(),
        )
        for relation, found in groups
        for members in sorted(found, key=_largest_first)
    ]


def _units(
    adapters: Mapping[int, StoredProjections], paths: Mapping[int, Sequence[str]]
) -> tuple[list[int], Numbers, Numbers]:
    """The adapters that can be compared, their projections as rows of length 1 over the union of
    their modules, and the lengths before."""
    sets = {adapter.modules for adapter in adapters.values()}
    columns = {path: n for n, path in enumerate(sorted({p for key in sets for p in paths[key]}))}
    columns_of = {key: [columns[path] for path in paths[key]] for key in sets}
    size = max((one.size(paths[one.modules]) for one in adapters.values()), default=0)
    rows = np.zeros((len(adapters), len(columns), size), np.float32)
    for row, adapter in zip(rows, adapters.values(), strict=True):
        numbers = np.frombuffer(adapter.numbers, "<f4")
        row[columns_of[adapter.modules]] = numbers.reshape(-1, size)
    units = rows.reshape(len(adapters), len(columns) * size)
    with np.errstate(over="ignore", invalid="ignore"):
        sizes = np.linalg.norm(units, axis=1)
    usable = np.isfinite(sizes) & (sizes > 0)
    if not usable.all():
        units, sizes = units[usable], sizes[usable]
    units /= sizes[:, None]
    return [place for place, good in zip(adapters, usable, strict=True) if good], units, sizes


def _pairs(units: Numbers, least: float) -> Iterator[tuple[Places, Places, Numbers]]:
    """All pairs of rows with at least this cosine, each once: the rows and the cosines."""
    for start in range(0, len(units), BLOCK_ROWS):
        cosines = units[start : start + BLOCK_ROWS] @ units[start:].T
        one, other = np.nonzero(np.triu(cosines >= least, 1))
        yield one + start, other + start, cosines[one, other]


def _joined(labels: Places, one: Places, other: Places) -> Places:
    """Labels of groups, with the groups of each of these pairs made one."""
    ours, theirs = labels[one], labels[other]
    differ = ours != theirs
    if not differ.any():
        return labels
    count = len(labels)
    edges = np.divmod(np.unique(ours[differ] * count + theirs[differ]), count)
    graph = coo_array((np.ones(len(edges[0]), bool), edges), shape=(count, count))
    joined: Places = connected_components(graph, directed=False)[1].astype(np.int64)[labels]
    return joined


def _members(labels: Places, rows: Places) -> list[Places]:
    """Of these rows, in order, those that have a label in common with another one, together."""
    by_label = rows[np.argsort(labels[rows], kind="stable")]
    groups = np.split(by_label, np.flatnonzero(np.diff(labels[by_label])) + 1)
    return [group for group in groups if len(group) > 1]


def _numbered(values: Iterable[Hashable]) -> Places:
    """A number for each value, the same for equal ones."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], np.int64)


def _largest_first(members: Sequence[int] | Places) -> tuple[int, int]:
    return -len(members), int(members[0])
