"""A heat map: how large the coefficients of each adapter are in each group of modules."""

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from recycle_cli.records import StudyCoefficients
from recycle_cli.reporting.document import Figure
from recycle_cli.reporting.formatting import shortened
from recycle_cli.reporting.plots.canvas import (
    HEAT,
    SMALL_SIZE,
    WIDTH,
    Drawing,
    named,
    style,
)

LABEL_LIMIT, LETTER = 24, 5.9
ROW_HEIGHT, COLUMN_WIDTH, RIGHT = 21.0, 30.0, 10.0
SCALE_ROOM, AXIS_TITLE = 42.0, 20.0
FAINTEST = 0.04
# More columns than this leave no room for a number in each.
NUMBERED = 10
SCALE_STEPS = 24


def heat_map(cell: StudyCoefficients, what: str, name: str) -> Figure:
    """Adapters from above, groups from the left; the deeper the colour, the larger the
    coefficients. `what` is what the groups are, as in "layer"."""
    adapters = [shortened(named(adapter), LABEL_LIMIT) for adapter in cell.adapters]
    groups = [shortened(named(group), LABEL_LIMIT) for group in cell.groups]
    left = LETTER * max(len(label) for label in adapters) + 14
    bottom = LETTER * max(len(label) for label in groups) + 14 + AXIS_TITLE
    # Few columns are spread over a phone's width; many keep a least width and are scrolled.
    least = COLUMN_WIDTH if len(groups) <= NUMBERED else 13.0
    width = max(WIDTH, left + least * len(groups) + RIGHT)
    with style():
        drawing = Drawing(name, width, SCALE_ROOM + ROW_HEIGHT * len(adapters) + bottom)
        axes = drawing.axes(left, SCALE_ROOM, RIGHT, bottom)
        largest = max((value for row in cell.values for value in row), default=0.0)
        _draw_cells(axes, cell, largest)
        _set_axes(axes, adapters, groups, what)
        _draw_scale(drawing, largest)
        return drawing.finished(_title(cell, what), _in_words(cell))


def _draw_cells(axes: Axes, cell: StudyCoefficients, largest: float) -> None:
    numbered = len(cell.groups) <= NUMBERED
    for column, row_of_group in enumerate(cell.values):
        for row, value in enumerate(row_of_group):
            depth = value / largest if largest > 0 else 0.0
            axes.add_patch(_square(column, row, 1, depth))
            if numbered:
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8.5,
                )


def _square(x: float, y: float, width: float, depth: float) -> Rectangle:
    alpha = FAINTEST + (1 - FAINTEST) * depth
    # Smoothed edges would show as lines between neighbours.
    return Rectangle((x, y), width, 1, facecolor=HEAT, alpha=alpha, linewidth=0, antialiased=False)


def _set_axes(axes: Axes, adapters: list[str], groups: list[str], what: str) -> None:
    axes.grid(False)
    axes.set_xlim(0, len(groups))
    axes.set_ylim(len(adapters), 0)
    axes.set_xticks([i + 0.5 for i in range(len(groups))], groups, rotation=90)
    axes.set_yticks([i + 0.5 for i in range(len(adapters))], adapters)
    axes.tick_params(length=0)
    axes.set_xlabel(what)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_scale(drawing: Drawing, largest: float) -> None:
    """The key: what a colour's depth means."""
    axes = drawing.axes(10, 20, drawing.width - 130, drawing.height - 32)
    for step in range(SCALE_STEPS):
        axes.add_patch(_square(step, 0, 1, step / (SCALE_STEPS - 1)))
    axes.set_xlim(0, SCALE_STEPS)
    axes.set_ylim(0, 1)
    axes.set_axis_off()
    axes.text(0, 1.5, "mean absolute coefficient", fontsize=SMALL_SIZE)
    axes.text(SCALE_STEPS + 1, 0.5, f"0 to {largest:.3g}", fontsize=SMALL_SIZE, va="center")


def _title(cell: StudyCoefficients, what: str) -> str:
    return f"Mean absolute coefficients by {what}: {cell.method} on {cell.task}, seed {cell.seed}"


def _in_words(cell: StudyCoefficients) -> str:
    groups = max(1, len(cell.groups))
    means = [
        f"{adapter} {sum(row[i] for row in cell.values) / groups:.3g}"
        for i, adapter in enumerate(cell.adapters)
    ]
    return f"Mean over all groups of modules: {', '.join(means)}."
