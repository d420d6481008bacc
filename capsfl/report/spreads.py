"""Lines of values that carry an interval each: over rounds, or over the number of hospitals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from capsfl.report.figures import LIGHT, canvas, style, svg

MAX_BARS = 12
"""Up to so many points every interval is a bar of its own; above that they make one band."""


@dataclass(frozen=True)
class Spread:
    """A value at a place, and the interval around it where there is one."""

    place: float
    value: float
    low: float | None = None
    high: float | None = None


def spreads(
    lines: Mapping[str, Sequence[Spread]],
    *,
    title: str,
    label: str,
    colours: Mapping[str, str],
    unit_interval: bool = False,
    doubling: bool = False,
    size: tuple[float, float] = (258, 190),
) -> str:
    """Draw a line a series, with its intervals as bars or as a band.

    Args:
        lines: points of every series, by rising place.
        title: what the vertical axis shows.
        label: what the horizontal axis shows.
        colours: the colour of each series, a key of `LIGHT`.
        unit_interval: whether the quantity lies in [0, 1] and the axis must show all of it.
        doubling: whether places are powers of two, drawn at equal distances.
        size: width and height in points.
    """
    with style():
        figure, axes = canvas(*size)
        for number, (name, points) in enumerate(lines.items()):
            # Bars of several lines at one place stand beside each other.
            aside = 1 + 0.04 * (number - (len(lines) - 1) / 2) if doubling else 1.0
            _draw_line(axes, points, LIGHT[colours.get(name, "accent")], aside=aside)
        every = [point for points in lines.values() for point in points]
        if doubling and every:
            places = sorted({point.place for point in every})
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(places))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_xlim(places[0] / 1.25, places[-1] * 1.25)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(visible=False, axis="x")
        if unit_interval:
            axes.set_ylim(0, 1.02)
        elif every and min(point.value if point.low is None else point.low for point in every) >= 0:
            axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.set_xlabel(label)
        return svg(figure, f"{title} against {label}")


def _draw_line(axes: Axes, points: Sequence[Spread], colour: str, *, aside: float) -> None:
    places, values = [point.place * aside for point in points], [point.value for point in points]
    known = [
        (place, point.low, point.high)
        for place, point in zip(places, points, strict=True)
        if point.low is not None and point.high is not None
    ]
    if len(points) > MAX_BARS and known:
        along, low, high = zip(*known, strict=True)
        axes.fill_between(along, low, high, color=colour, alpha=0.15, linewidth=0)
    else:
        for place, low, high in known:
            axes.plot([place, place], [low, high], color=colour, linewidth=1.6, alpha=0.55)
    marker = "o" if len(points) <= MAX_BARS else ""
    axes.plot(places, values, color=colour, linewidth=1.4, marker=marker, markersize=3.6)
