"""Charts of a sweep: utility against epsilon, against a swept field, and per round."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from capsfl.report.figures import LIGHT, canvas, style, svg
from capsfl.report.studies import Summary, frontier, private

SPREAD = 10.0
"""An axis whose values span more than this factor is drawn in the logarithm."""


def frontier_svg(groups: Mapping[str, Sequence[Summary]], colours: Mapping[str, str], *, utility: str) -> str:
    """Draw `draw_frontier` for the page."""
    with style():
        figure, axes = canvas(560, 300)
        draw_frontier(axes, groups, colours, utility=utility)
        return svg(figure, f"{utility} against epsilon")


def write_pictures(
    folder: Path, groups: Mapping[str, Sequence[Summary]], colours: Mapping[str, str], *, utility: str
) -> None:
    """Write `frontier.png` and `frontier.svg`, for papers and slides: colours fixed, a legend inside."""
    with style():
        figure = Figure(figsize=(7.2, 4.2), dpi=200, facecolor="white", layout="constrained")
        axes = figure.subplots()
        draw_frontier(axes, groups, colours, utility=utility)
        if len(groups) > 1 and axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower right", frameon=False, fontsize=7.5)
        for name in ("frontier.png", "frontier.svg"):
            partial = folder / f".{name}"
            metadata: Any = {"Software": None} if name.endswith("png") else {"Date": None}
            FigureCanvasAgg(figure)
            figure.savefig(partial, format=name[-3:], metadata=metadata)
            partial.replace(folder / name)


def draw_frontier(
    axes: Axes, groups: Mapping[str, Sequence[Summary]], colours: Mapping[str, str], *, utility: str
) -> None:
    """Draw every private setting as a dot, and through the best within each epsilon a line with seed intervals.

    The best setting without noise is a dashed line at its height, with its interval as a band.
    """
    epsilons = [row.epsilon for rows in groups.values() for row in rows if row.epsilon is not None]
    for group, rows in groups.items():
        colour = LIGHT[colours[group]]
        for row in private(rows):
            axes.plot(_epsilon(row), _mean(row), "o", color=colour, markersize=2.6, alpha=0.4, markeredgewidth=0)
        best = frontier(rows)
        if best:
            x, y = [_epsilon(row) for row in best], [_mean(row) for row in best]
            axes.plot(x, y, color=colour, linewidth=1.5, drawstyle="steps-post", label=group or "studies")
            for row in best:
                if row.low is not None and row.high is not None:
                    axes.plot([_epsilon(row)] * 2, [row.low, row.high], color=colour, linewidth=1.0, alpha=0.75)
                axes.plot(_epsilon(row), _mean(row), "o", color=colour, markersize=4.2)
        bare = max((row for row in rows if row.noiseless and row.mean is not None), key=_mean, default=None)
        if bare is not None:
            axes.axhline(_mean(bare), color=colour, linewidth=0.9, linestyle=(0, (4, 3)))
            if bare.low is not None and bare.high is not None:
                axes.axhspan(bare.low, bare.high, color=colour, alpha=0.08, linewidth=0)
    _scale(axes, epsilons)
    axes.set_xlabel("ε")
    axes.set_title(utility)
    axes.yaxis.set_major_locator(MaxNLocator(6))


def effect_svg(field: str, groups: Mapping[str, Sequence[Summary]], colours: Mapping[str, str], *, utility: str) -> str:
    """Draw the utility of every setting against one numeric field, and through the best at each value a line."""
    with style():
        figure, axes = canvas(258, 176)
        seen: list[float] = []
        for group, rows in groups.items():
            points = [(float(row.setting[field]), _mean(row)) for row in rows if row.mean is not None]
            points = [(value, mean) for value, mean in points if math.isfinite(value)]
            seen += [value for value, _ in points]
            colour = LIGHT[colours[group]]
            axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=2.8, alpha=0.5) if points else None
            best: dict[float, float] = {}
            for value, mean in points:
                best[value] = max(mean, best.get(value, mean))
            if 1 < len(best) <= 12:
                axes.plot(*zip(*sorted(best.items()), strict=True), color=colour, linewidth=1.2)
        _scale(axes, seen)
        axes.set_title(utility)
        axes.set_xlabel(field)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return svg(figure, f"{utility} against {field}")


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where positive values span more than `SPREAD`, labelled with plain numbers."""
    if not values or min(values) <= 0 or max(values) / min(values) <= SPREAD:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if max(values) / min(values) < 200 else (1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _mean(row: Summary) -> float:
    return -math.inf if row.mean is None else row.mean


def _epsilon(row: Summary) -> float:
    return math.inf if row.epsilon is None else row.epsilon
