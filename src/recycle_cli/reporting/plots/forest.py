"""A forest plot: differences with their intervals, one below the other, around zero."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from recycle_cli.records import StudyArm, StudyComparison
from recycle_cli.reporting.document import Figure
from recycle_cli.reporting.formatting import points, points_interval, shortened
from recycle_cli.reporting.index import StudyIndex
from recycle_cli.reporting.plots.canvas import (
    INK,
    PAPER,
    SMALL_SIZE,
    WIDTH,
    Drawing,
    named,
    span,
    style,
)
from recycle_cli.reporting.plots.marks import mark_of, words_of

ROW_HEIGHT, LEGEND_LINE, AXIS_ROOM, SIDE = 32.0, 16.0, 44.0, 14.0
HEADING_ROOM = 26.0
LABEL_LIMIT = 34


def forest_plot(
    index: StudyIndex, comparisons: Sequence[StudyComparison], name: str, title: str
) -> Figure:
    """The comparisons in their order, from above; each has its figures beside its name, so that
    the whole width is for the differences."""
    arms = [index.arms.get(comparison.method) for comparison in comparisons]
    kinds = {words_of(arm): arm for arm in arms}
    top = LEGEND_LINE * len(kinds) + HEADING_ROOM
    with style():
        drawing = Drawing(name, WIDTH, ROW_HEIGHT * len(comparisons) + top + AXIS_ROOM)
        axes = drawing.axes(SIDE, top, SIDE, AXIS_ROOM)
        for row, (comparison, arm) in enumerate(zip(comparisons, arms, strict=True)):
            _draw_row(axes, row, comparison, arm)
        _set_axes(axes, comparisons, index.metric)
        drawing.canvas.legend(
            handles=[_handle(arm, words) for words, arm in kinds.items()],
            loc="upper left",
            bbox_to_anchor=(0, 1),
            labelspacing=0.35,
        )
        return drawing.finished(title, _in_words(comparisons))


def _draw_row(axes: Axes, row: int, comparison: StudyComparison, arm: StudyArm | None) -> None:
    mark = mark_of(arm)
    low, high = (100 * end for end in comparison.interval)
    axes.plot([low, high], [row + 0.7] * 2, color=mark.colour, linewidth=2, zorder=3)
    axes.plot(
        [100 * comparison.difference],
        [row + 0.7],
        mark.shape,
        markersize=8,
        markerfacecolor=mark.fill,
        markeredgecolor=mark.colour,
        markeredgewidth=1.6,
        zorder=4,
    )
    label = shortened(named(comparison.method), LABEL_LIMIT)
    figures = f"{points(comparison.difference)}  ({points_interval(comparison.interval)})"
    _write(axes, 0, row + 0.26, label)
    _write(axes, 1, row + 0.26, figures)


def _write(axes: Axes, side: int, height: float, text: str) -> None:
    """Text at the left (0) or right (1) side, on paper of its own over the grid's lines."""
    axes.text(
        side,
        height,
        text,
        transform=axes.get_yaxis_transform(),
        va="center",
        ha="right" if side else "left",
        fontsize=SMALL_SIZE,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
    )


def _set_axes(axes: Axes, comparisons: Sequence[StudyComparison], metric: str) -> None:
    ends = [100 * value for c in comparisons for value in (*c.interval, c.difference)]
    axes.axvline(0, color=INK, linewidth=1.2, zorder=2)
    axes.set_xlim(*span([0.0, *ends]))
    axes.set_ylim(len(comparisons), 0)
    axes.set_yticks([])
    _write(axes, 0, -0.3, "\N{LEFTWARDS ARROW} worse")
    _write(axes, 1, -0.3, "better \N{RIGHTWARDS ARROW}")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"difference in {named(metric)}, percentage points")


def _handle(arm: StudyArm | None, words: str) -> Line2D:
    mark = mark_of(arm)
    return Line2D(
        [],
        [],
        color=mark.colour,
        marker=mark.shape,
        markerfacecolor=mark.fill,
        markeredgewidth=1.6,
        linewidth=2,
        label=words,
    )


def _in_words(comparisons: Sequence[StudyComparison]) -> str:
    rows = [
        f"{c.method} against {c.baseline}: {points(c.difference)} points, "
        f"95 % interval {points_interval(c.interval)}"
        for c in comparisons
    ]
    return f"{'; '.join(rows)}."
