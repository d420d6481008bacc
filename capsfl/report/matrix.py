"""A table of figures as a picture: the stronger the colour of a cell, the higher its figure."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from capsfl.report.figures import LIGHT, canvas, plain, style, svg

STRONGEST = 0.5
"""Opacity of the highest figure: text in ink stays readable on it in both themes."""


@dataclass(frozen=True)
class Cell:
    """A figure and its interval; None where it is not defined."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Matrix:
    """Figures of rows against columns.

    Attributes:
        rows: names from top to bottom.
        columns: names from left to right.
        cells: a sequence of cells for each row.
        apart: the row that is set apart from those above it by a gap; None for none.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Cell]]
    apart: int | None = None


def matrix(table: Matrix, *, quantity: str, floor: float = 0.0) -> str:
    """Draw a matrix, every cell with its figure in words; where row and column have one name, the cell is framed.

    Args:
        table: the figures, in [0, 1].
        quantity: what they are.
        floor: the figure at which a cell has no colour: what chance gives.
    """
    gap = 0.35 if table.apart is not None else 0.0
    with style():
        figure, axes = canvas(110 + 62 * len(table.columns), 46 + 34 * (len(table.rows) + gap))
        heights = []
        for number, (name, cells) in enumerate(zip(table.rows, table.cells, strict=True)):
            top = number + (gap if table.apart is not None and number >= table.apart else 0)
            heights.append(top + 0.5)
            for place, (column, cell) in enumerate(zip(table.columns, cells, strict=True)):
                share = 0.0 if cell.value is None else max(0.0, min(1.0, (cell.value - floor) / (1 - floor)))
                box = (place + 0.03, top + 0.04), 0.94, 0.92
                axes.add_patch(Rectangle(*box, facecolor=LIGHT["accent"], alpha=STRONGEST * share, linewidth=0))
                if name == column:
                    axes.add_patch(Rectangle(*box, fill=False, edgecolor=LIGHT["ink"], linewidth=0.9))
                _write(axes, cell, place + 0.5, top + 0.5)
        axes.set_xlim(0, len(table.columns))
        axes.set_ylim(len(table.rows) + gap, 0)
        axes.set_xticks([place + 0.5 for place in range(len(table.columns))], [plain(name) for name in table.columns])
        axes.set_yticks(heights, [plain(name) for name in table.rows])
        axes.xaxis.tick_top()
        axes.tick_params(axis="both", labelcolor=LIGHT["ink"])
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return svg(figure, f"{quantity}, row against column")


def _write(axes: Axes, cell: Cell, x: float, y: float) -> None:
    known = cell.low is not None and cell.high is not None
    value = "–" if cell.value is None else f"{cell.value:.2f}"
    axes.text(x, y - (0.13 if known else 0), value, ha="center", va="center", fontsize=9)
    if known:
        axes.text(x, y + 0.24, f"{cell.low:.2f}–{cell.high:.2f}", ha="center", va="center", fontsize=6.5)
