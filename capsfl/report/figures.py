"""Charts of a study as inline SVG: pure functions of values, drawn in the colours of the page around them.

Every colour comes from `LIGHT`; in the SVG each becomes a CSS variable of the same name, so that one drawing
serves light, dark and printed pages. Text stays text, in the font of the page.
"""

import hashlib
import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LIGHT = {
    "ink": "#1d232a",
    "muted": "#646f7b",
    "rule": "#d8dde3",
    "accent": "#0e6b85",
    "positive": "#c4541a",
    "negative": "#5f7f9e",
    "series-0": "#2467a8",
    "series-1": "#d07a0a",
    "series-2": "#25855a",
    "series-3": "#8c4fa3",
    "series-4": "#bf3a4d",
    "series-5": "#6d7a12",
    "series-6": "#17899b",
    "series-7": "#8a5a3c",
}
DARK = {
    "ink": "#e6e9ec",
    "muted": "#97a3af",
    "rule": "#343c45",
    "accent": "#5bb7cf",
    "positive": "#f0905a",
    "negative": "#8fb0d0",
    "series-0": "#73acea",
    "series-1": "#f0a94a",
    "series-2": "#66c296",
    "series-3": "#c495d8",
    "series-4": "#ee8291",
    "series-5": "#b9c455",
    "series-6": "#5fcbdb",
    "series-7": "#cf9f82",
}
MAX_LINES = 8
"""Above this many hospitals single lines cannot be read: curves show the median and the 10-90 % band."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Estimate:
    """One row of a comparison: a value, its interval if there is one, and how to draw it."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: str = "accent"


@dataclass(frozen=True)
class RocCurve:
    """A receiver operating characteristic: rates in [0, 1], and the operating point if it is known."""

    false_positive_rate: Sequence[float]
    true_positive_rate: Sequence[float]
    colour: str = "accent"
    operating_point: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scores:
    """The scores of one hospital's patients, split by their true label."""

    hospital: str
    positives: Sequence[float]
    negatives: Sequence[float]


@contextmanager
def style() -> Iterator[None]:
    """The look of every chart; names from data are never read as formulas."""
    settings: dict[Any, Any] = {
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "capsfl",
        "font.family": "DejaVu Sans",
        "font.size": 8.0,
        "text.color": LIGHT["ink"],
        "axes.labelcolor": LIGHT["muted"],
        "axes.edgecolor": LIGHT["rule"],
        "axes.titlecolor": LIGHT["ink"],
        "axes.titlesize": 9.0,
        "axes.titlelocation": "left",
        "axes.titlepad": 8.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LIGHT["rule"],
        "grid.linewidth": 0.5,
        "xtick.color": LIGHT["muted"],
        "ytick.color": LIGHT["muted"],
        "xtick.major.size": 0.0,
        "ytick.major.size": 0.0,
        "lines.solid_capstyle": "round",
        "lines.solid_joinstyle": "round",
    }
    with warnings.catch_warnings(), matplotlib.rc_context(settings):
        # The browser has fonts for the scripts that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from")
        yield


def curves(
    series: Mapping[str, Points],
    *,
    title: str,
    colours: Mapping[str, str],
    overall: Points = (),
    unit_interval: bool = False,
) -> str:
    """Draw one quantity per round, a line a series.

    Args:
        series: points `(round, value)` under the name of each hospital or arm.
        title: what the vertical axis shows.
        colours: the colour of each series, a key of `LIGHT`.
        overall: points of the whole cohort, drawn in ink over the series.
        unit_interval: whether the quantity lies in [0, 1] and the axis must show all of it.
    """
    with style():
        figure, axes = canvas(258, 176)
        draw_curves(axes, series, colours=colours, overall=overall, unit_interval=unit_interval)
        axes.set_title(title)
        axes.set_xlabel("round")
        return svg(figure, f"{title} per round")


def draw_curves(
    axes: Axes,
    series: Mapping[str, Points],
    *,
    colours: Mapping[str, str],
    overall: Points = (),
    unit_interval: bool = False,
) -> None:
    """Draw `curves` on given axes."""
    drawn = [list(points) for points in (*series.values(), overall) if points]
    if len(series) > MAX_LINES:
        rounds, low, middle, high = _band(series)
        axes.fill_between(rounds, low, high, color=LIGHT["accent"], alpha=0.18, linewidth=0)
        axes.plot(rounds, middle, color=LIGHT["accent"], linewidth=1.4)
    else:
        for name, points in series.items():
            _line(axes, points, LIGHT[colours.get(name, "accent")], width=1.3)
    if overall:
        _line(axes, overall, LIGHT["ink"], width=1.8 if len(series) > 1 else 1.4)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(visible=False, axis="x")
    if unit_interval:
        axes.set_ylim(0, 1.02)
    elif drawn and min(value for points in drawn for _, value in points) >= 0:
        axes.set_ylim(bottom=0)


def roc(lines: Sequence[RocCurve]) -> str:
    """Draw receiver operating characteristics over the diagonal of chance, the first one strongest."""
    with style():
        figure, axes = canvas(252, 252)
        draw_roc(axes, lines)
        return svg(figure, "Receiver operating characteristic")


def draw_roc(axes: Axes, lines: Sequence[RocCurve]) -> None:
    """Draw `roc` on given axes."""
    axes.plot([0, 1], [0, 1], color=LIGHT["muted"], linewidth=0.8, linestyle=(0, (2, 3)))
    for place, line in reversed(list(enumerate(lines))):
        colour = LIGHT[line.colour]
        axes.plot(
            line.false_positive_rate,
            line.true_positive_rate,
            color=colour,
            linewidth=1.9 if place == 0 else 1.0,
            zorder=3 if place == 0 else 2,
        )
        if line.operating_point:
            axes.plot(*line.operating_point, "o", color=colour, markersize=5.5, zorder=4)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_xlabel("false positive rate (1 − specificity)")
    axes.set_ylabel("true positive rate (sensitivity)")


def forest(rows: Sequence[Estimate], *, quantity: str, reference: float | None = None) -> str:
    """Draw a comparison from top to bottom: a dot a row, its interval, a dashed line at `reference`."""
    with style():
        figure, axes = canvas(288, 40 + 19 * len(rows))
        draw_forest(axes, rows, reference=reference)
        axes.set_xlabel(quantity)
        return svg(figure, f"{quantity} of every arm and control")


def differences(rows: Sequence[Estimate], *, quantity: str, title: str) -> str:
    """Draw signed differences from top to bottom around a dashed zero, with their intervals."""
    reach = max((abs(end) for row in rows for end in (row.value, row.low, row.high) if end is not None), default=0.0)
    reach = max(1.1 * reach, 0.05)
    with style():
        figure, axes = canvas(288, 40 + 19 * len(rows))
        draw_forest(axes, rows, reference=0.0, written="{:+.3f}")
        axes.set_xlim(-reach, reach)
        axes.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
        axes.set_xlabel(quantity)
        return svg(figure, title)


def draw_forest(
    axes: Axes, rows: Sequence[Estimate], *, reference: float | None = None, written: str = "{:.3f}"
) -> None:
    """Draw `forest` on given axes; `written` is the form of the values."""
    if reference is not None:
        axes.axvline(reference, color=LIGHT["muted"], linewidth=0.8, linestyle=(0, (2, 3)))
    for place, row in enumerate(rows):
        colour = LIGHT[row.colour]
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2.2, alpha=0.55)
        axes.plot(row.value, place, "o", color=colour, markersize=5)
        axes.text(1.02, place, written.format(row.value), transform=axes.get_yaxis_transform(), va="center")
    axes.set_yticks(range(len(rows)), [plain(row.name) for row in rows])
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(LIGHT["muted" if row.colour == "muted" else "ink"])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def strip(groups: Sequence[Scores], *, threshold: float | None) -> str:
    """Draw every patient's score by hospital: filled dots are positive patients, open ones negative."""
    with style():
        figure, axes = canvas(max(258, 60 + 66 * len(groups)), 252)
        for place, group in enumerate(groups):
            for scores, offset, colour, fill in (
                (group.negatives, -0.19, LIGHT["negative"], "none"),
                (group.positives, 0.19, LIGHT["positive"], LIGHT["positive"]),
            ):
                ordered = np.sort(np.asarray(scores, dtype=float))
                # Golden-ratio steps spread neighbours in score apart, and never depend on chance.
                jitter = ((np.arange(ordered.size) * 0.618034) % 1.0 - 0.5) * 0.26
                axes.plot(
                    place + offset + jitter,
                    ordered,
                    "o",
                    markersize=4,
                    markeredgecolor=colour,
                    markerfacecolor=fill,
                    markeredgewidth=0.9,
                    alpha=0.85,
                )
        if threshold is not None:
            axes.axhline(threshold, color=LIGHT["ink"], linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xticks(range(len(groups)), [plain(group.hospital) for group in groups])
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylabel("score")
        axes.grid(visible=False, axis="x")
        return svg(figure, "Score of every patient by hospital")


def bars(rows: Sequence[tuple[str, Sequence[float]]], *, quantity: str, colours: Sequence[str]) -> str:
    """Draw horizontal bars, one for each value of a row, in the order of `colours`."""
    with style():
        figure, axes = canvas(288, 40 + 20 * len(rows))
        thickness = 0.62 / max(1, len(colours))
        for place, (_, values) in enumerate(rows):
            for index, value in enumerate(values):
                offset = (index - (len(values) - 1) / 2) * thickness
                axes.barh(place + offset, value, height=thickness * 0.9, color=LIGHT[colours[index]])
            axes.annotate(
                " / ".join(_significant(value) for value in values),
                (max(values), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
        axes.set_yticks(range(len(rows)), [plain(name, limit=32) for name, _ in rows])
        axes.tick_params(axis="y", labelcolor=LIGHT["ink"])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.3 * max([value for _, values in rows for value in values] + [1e-9]))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(quantity)
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        return svg(figure, quantity)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many points, and its axes."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return figure, figure.subplots()


def _line(axes: Axes, points: Points, colour: str, *, width: float) -> None:
    rounds, values = zip(*points, strict=True)
    marker = "o" if len(points) <= 12 else ""
    axes.plot(rounds, values, color=colour, linewidth=width, marker=marker, markersize=2.6)


def _band(series: Mapping[str, Points]) -> tuple[list[float], list[float], list[float], list[float]]:
    values: dict[float, list[float]] = {}
    for points in series.values():
        for place, value in points:
            values.setdefault(place, []).append(value)
    rounds = sorted(values)
    low, middle, high = ([float(np.percentile(values[place], share)) for place in rounds] for share in (10, 50, 90))
    return rounds, low, middle, high


def plain(name: str, *, limit: int = 24) -> str:
    """A label on one line: control characters, which SVG cannot hold, become spaces."""
    line = "".join(letter if letter.isprintable() else " " for letter in name).strip()
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def _significant(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def svg(figure: Figure, label: str) -> str:
    """The figure as an `<svg>` element: no prologue, no metadata, no addresses, no fixed size, no colours."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", drawing, flags=re.DOTALL)
    body = re.sub(r"^<svg[^>]*>", "", drawing)
    body = body.replace("xlink:href=", "href=")
    # Only what is referred to keeps a name, and the name says whose it is: several drawings share one page.
    mark = hashlib.sha256(drawing.encode()).hexdigest()[:8]
    used = set(re.findall(r'(?:href="|url\()#([\w.-]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{mark}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(href="|url\()#', rf"\1#{mark}-", body)
    body = re.sub(r'style="[^"]*"', lambda found: _page_style(found[0]), body)
    body = re.sub(r">\s+<", "><", body)
    width, height = (round(72 * inches, 1) for inches in figure.get_size_inches())
    return (
        f'<svg class="chart" role="img" aria-label="{html.escape(label)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width:{width * 1.36:.0f}px">{body}'
    )


def _page_style(declarations: str) -> str:
    declarations = re.sub(r"font-family: [^;\"]*;? ?", "", declarations)
    for name, colour in LIGHT.items():
        declarations = declarations.replace(colour, f"var(--{name})")
    return declarations
