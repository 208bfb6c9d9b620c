"""Lines over k: how the score changes with the number of adapters taken."""

import json
from collections.abc import Sequence
from itertools import groupby

from matplotlib.axes import Axes

from recycle_cli.records import StudyArm
from recycle_cli.reporting.document import Figure
from recycle_cli.reporting.formatting import percent, shortened
from recycle_cli.reporting.index import StudyIndex
from recycle_cli.reporting.plots.canvas import INK, WIDTH, Drawing, named, span, style
from recycle_cli.reporting.plots.marks import mark_of, words_of

HEIGHT, LEGEND_LINE = 250.0, 16.0
LEFT, RIGHT, BOTTOM = 48.0, 12.0, 44.0

Series = list[StudyArm]


def plots_against_k(index: StudyIndex) -> list[Figure]:
    """One plot for each method and selection that was run with several k."""
    return [
        _plot(index, series, f"against-k-{number}")
        for number, series in enumerate(_families(index), start=1)
    ]


def _families(index: StudyIndex) -> list[list[Series]]:
    """The arms that differ in k alone are a line; lines of one method and selection, a plot."""
    scored = [arm for arm in index.arms.values() if arm.k is not None and index.mean(arm.name)]
    plots = []
    for _, family in groupby(sorted(scored, key=_family), key=_family):
        lines = [
            sorted(line, key=lambda arm: arm.k or 0)
            for _, line in groupby(sorted(family, key=_line), key=_line)
        ]
        several = [line for line in lines if len({arm.k for arm in line}) > 1]
        if several:
            plots.append(several)
    return plots


def _family(arm: StudyArm) -> tuple[str, str, str]:
    return arm.method or "", arm.selection or "", json.dumps(arm.settings, sort_keys=True)


def _line(arm: StudyArm) -> tuple[str, bool]:
    return arm.role, arm.with_target


def _plot(index: StudyIndex, series: Sequence[Series], name: str) -> Figure:
    levels = [arm for arm in index.arms.values() if _is_level(index, arm)]
    top = LEGEND_LINE * (len(series) + len(levels)) + 8
    with style():
        drawing = Drawing(name, WIDTH, HEIGHT + top)
        axes = drawing.axes(LEFT, top, RIGHT, BOTTOM)
        for number, line in enumerate(series):
            # Lines are set beside each other a little, so that their intervals do not overlap.
            _draw_line(index, axes, line, shift=number - (len(series) - 1) / 2)
        for arm in levels:
            _draw_level(index, axes, arm)
        _set_axes(axes, index, [arm for line in series for arm in line])
        drawing.canvas.legend(loc="upper left", bbox_to_anchor=(0, 1), labelspacing=0.35)
        return drawing.finished(_title(index, series[0][0]), _in_words(index, series))


def _is_level(index: StudyIndex, arm: StudyArm) -> bool:
    return arm.role in ("base", "target") and index.mean(arm.name) is not None


def _draw_line(index: StudyIndex, axes: Axes, line: Series, shift: float) -> None:
    mark = mark_of(line[0])
    step = 0.012 * (max(arm.k or 0 for arm in line) or 1)
    found = [(arm.k or 0, mean) for arm in line if (mean := index.mean(arm.name))]
    values = [100 * mean.value for _, mean in found]
    axes.errorbar(
        [k + shift * step for k, _ in found],
        values,
        yerr=[
            [max(0.0, 100 * (mean.value - mean.interval[0])) for _, mean in found],
            [max(0.0, 100 * (mean.interval[1] - mean.value)) for _, mean in found],
        ],
        color=mark.colour,
        marker=mark.shape,
        markersize=7,
        markerfacecolor=mark.fill,
        markeredgewidth=1.6,
        linewidth=1.8,
        linestyle="--" if mark.hollow else "-",
        elinewidth=1,
        label=words_of(line[0]),
    )


def _draw_level(index: StudyIndex, axes: Axes, arm: StudyArm) -> None:
    mean = index.mean(arm.name)
    assert mean is not None
    axes.axhline(
        100 * mean.value,
        color=mark_of(arm).colour,
        linestyle=":" if arm.role == "base" else "-.",
        linewidth=1.6,
        label=f"{words_of(arm)} ({percent(mean.value)})",
    )


def _set_axes(axes: Axes, index: StudyIndex, arms: Sequence[StudyArm]) -> None:
    counts = sorted({arm.k for arm in arms if arm.k is not None})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlim(*span(counts))
    axes.tick_params(axis="x", color=INK)
    axes.set_xlabel("k, number of adapters taken from the pool")
    axes.set_ylabel(f"mean {named(index.metric)}, %")


def _title(index: StudyIndex, arm: StudyArm) -> str:
    by = f", adapters chosen by {arm.selection}" if arm.selection else ""
    return f"Mean {index.metric} against k: {shortened(arm.method or arm.name, 40)}{by}"


def _in_words(index: StudyIndex, series: Sequence[Series]) -> str:
    lines = []
    for line in series:
        values = [
            f"{percent(mean.value)} at k = {arm.k}"
            for arm in line
            if (mean := index.mean(arm.name))
        ]
        lines.append(f"{words_of(line[0])}: {', '.join(values)}")
    return f"{'; '.join(lines)}."
