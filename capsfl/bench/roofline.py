"""A picture of where every implementation stands below the device's own roofs."""

import itertools
from pathlib import Path
from typing import Any

_COLOURS = {
    "reference": "#7a7a7a",
    "streamed": "#0b6e99",
    "mosaic_gpu": "#2a9d3a",
    "mosaic_tpu": "#8a5cc2",
    "torch eager": "#e07b39",
    "torch.compile": "#b3261e",
}
_NAMES = {"reference": "stored votes"}


def draw(result: dict[str, Any], path: Path) -> Any:
    """Draws rate over intensity, a panel per operator and pass, and writes it as PNG.

    Args:
        result: Of the routing benchmark.
        path: Where to.

    Returns:
        The figure.

    Raises:
        ImportError: matplotlib is not there.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["wall_s"] is not None]
    operators = list(dict.fromkeys(row["operator"] for row in rows))
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    figure = Figure(figsize=(5.2 * len(passes), 3.6 * len(operators) + 0.9), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(operators), len(passes), squeeze=False)
    roofs = result["roofs"]
    handles: dict[str, Any] = {}
    drawn = []
    for (operator, passed), panel in zip(itertools.product(operators, passes), axes.flat, strict=True):
        shown = [row for row in rows if (row["operator"], row["pass"]) == (operator, passed)]
        drawn.append((panel, *_draw_panel(panel, shown, roofs, handles)))
        panel.set_title(f"{operator}, {passed}", fontsize=10)
    for panel in axes[-1]:
        panel.set_xlabel("counted operations per byte")
    for panel in axes[:, 0]:
        panel.set_ylabel("GFLOP/s")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the panels stay where the labels are fitted to them
    for panel, labels, points in drawn:
        _place_labels(figure, panel, labels, points)
    figure.savefig(path)
    return figure


def _draw_panel(panel: Any, rows: list[dict[str, Any]], roofs: dict[str, Any], handles: dict[str, Any]) -> tuple:
    """Draws roofs and points; returns the labels, still on their points, and where the points are."""
    peak, copy = roofs["gemm_flops_per_s"] / 1e9, roofs["copy_bytes_per_s"] / 1e9
    points = [(row["flops"] / row["bytes"], row["flops"] / row["wall_s"]["median"] / 1e9, row) for row in rows]
    ridge = peak / copy
    left = min([ridge / 4, *(x / 2 for x, _, _ in points)])
    right = max([ridge * 4, *(x * 3 for x, _, _ in points)])
    bottom = min([peak / 100, *(y / 4 for _, y, _ in points)])
    panel.plot([left, ridge, right], [left * copy, peak, peak], color="black", linewidth=1.2, zorder=1)
    panel.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, peak * 3))
    panel.annotate(
        f"copy {copy:.0f} GB/s, product {peak:.0f} GFLOP/s",
        (0.98, 0.97),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize=7.5,
    )
    panel.grid(visible=True, which="major", color="#e5e5e5", linewidth=0.6)
    panel.tick_params(labelsize=8)
    columns: dict[tuple[str, float], tuple[float, float, str]] = {}
    for x, y, row in points:
        name = str(row["implementation"])
        colour = _COLOURS.get(name, "#444444")
        (mark,) = panel.plot([x], [y], "o", color=colour, markersize=5.5, zorder=3)
        handles.setdefault(_NAMES.get(name) or name, mark)
        # One label serves all implementations of a case that stand above each other.
        column = (row["case"], round(x, 6))
        if column not in columns or y > columns[column][1]:
            columns[column] = (x, y, row["case"])
    labels = [
        panel.annotate(case, (x, y), xytext=(0, 0), textcoords="offset points", va="bottom", fontsize=7.5, zorder=4)
        for x, y, case in columns.values()
    ]
    return labels, [(x, y) for x, y, _ in points]


def _place_labels(figure: Any, panel: Any, labels: list[Any], points: list[tuple[float, float]]) -> None:
    """Moves every label to the nearest free place around its point, with a line to it where it is far."""
    from matplotlib.transforms import Bbox

    renderer = figure.canvas.get_renderer()
    scale = figure.dpi / 72
    frame = panel.get_window_extent(renderer)
    taken = [panel.texts[0].get_window_extent(renderer)]
    for point in points:
        x, y = panel.transData.transform(point)
        taken.append(Bbox.from_bounds(x - 4 * scale, y - 4 * scale, 8 * scale, 8 * scale))
    for label in labels:
        size = label.get_window_extent(renderer)
        width, height = size.width / scale, size.height / scale
        x, y = panel.transData.transform(label.xy)
        for reach in range(5, 160, 5):
            places = [
                (dx, dy)
                for dx in (reach, -width - reach, -width / 2)
                for dy in (-height / 2, reach, -height - reach)
                if (dx, dy) != (-width / 2, -height / 2)
            ]
            boxes = [
                (place, Bbox.from_bounds(x + place[0] * scale, y + place[1] * scale, size.width, size.height).padded(1))
                for place in places
            ]
            free = [
                (place, box)
                for place, box in boxes
                if frame.contains(box.x0, box.y0)
                and frame.contains(box.x1, box.y1)
                and not any(box.overlaps(other) for other in taken)
            ]
            if free:
                place, box = free[0]
                label.set_position(place)
                taken.append(box)
                if reach > 10:
                    edge = tuple(min(max(0, low), low + side) for low, side in zip(place, (width, height), strict=True))
                    line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
                    panel.annotate("", label.xy, xytext=edge, textcoords="offset points", arrowprops=line, zorder=2)
                break
