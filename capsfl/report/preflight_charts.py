"""Charts of a preflight: what the values of scans and pictures say about whoever made them."""

from collections.abc import Sequence
from typing import Any

from capsfl.ct.preflight_scan import GREY_EDGES, HU_EDGES, SeriesFinding
from capsfl.report import figures

MAX_SCANNERS = 8
HU_SHOWN = (-1104, 400)
"""Beyond lies bone, too little of it to be seen."""


def hu_chart(volumes: Sequence[SeriesFinding], scanners: Sequence[str]) -> str:
    """Share of voxels over HU, a line a scanner."""
    with figures.style():
        figure, axes = figures.canvas(360, 200)
        centres = (HU_EDGES[:-1] + HU_EDGES[1:]) / 2
        for place, name in reversed(list(enumerate(scanners[:MAX_SCANNERS]))):
            counts = [row.histogram for row in volumes if (row.scanner or "unknown") == name]
            total = [sum(column) for column in zip(*counts, strict=True)]
            shares = [100 * count / max(1, sum(total)) for count in total]
            axes.plot(centres, shares, color=figures.LIGHT[colour_of(place)], linewidth=1.3)
        axes.set_xlim(*HU_SHOWN)
        axes.set_ylim(0, _ceiling(axes))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("HU")
        axes.set_title("% of valid voxels")
        return figures.svg(figure, "Share of voxels over Hounsfield units, by scanner")


def lung_chart(volumes: Sequence[SeriesFinding], scanners: Sequence[str]) -> str:
    """Lung volume over slice spacing, a dot a series."""
    with figures.style():
        figure, axes = figures.canvas(258, 200)
        for place, name in enumerate(scanners):
            rows = [row for row in volumes if (row.scanner or "unknown") == name and row.spacing_mm]
            axes.plot(
                [row.spacing_mm[0] for row in rows if row.spacing_mm],
                [(row.lung_ml or 0) / 1000 for row in rows],
                "o",
                markersize=4,
                color=figures.LIGHT[colour_of(place)],
                alpha=0.8,
            )
        axes.set_ylim(bottom=0)
        axes.margins(x=0.15)
        axes.set_xlabel("mm between slices")
        axes.set_title("lung volume, L")
        return figures.svg(figure, "Lung volume of every series over its slice spacing")


def grey_chart(pictures: Sequence[SeriesFinding], classes: Sequence[str]) -> str:
    """Share of pixels over grey, a line a class."""
    with figures.style():
        figure, axes = figures.canvas(360, 200)
        centres = (GREY_EDGES[:-1] + GREY_EDGES[1:]) / 2
        for place, label in enumerate(sorted({row.label for row in pictures}, key=str)):
            counts = [row.histogram for row in pictures if row.label == label]
            total = [sum(column) for column in zip(*counts, strict=True)]
            shares = [100 * count / max(1, sum(total)) for count in total]
            axes.plot(centres, shares, color=figures.LIGHT[colour_of(place)], linewidth=1.3)
        axes.set_xlim(0, 256)
        axes.set_ylim(0, _ceiling(axes))
        axes.grid(visible=False, axis="x")
        axes.set_xlabel("grey")
        axes.set_title("% of pixels")
        return figures.svg(figure, f"Share of pixels over grey, by class: {', '.join(classes)}")


def _ceiling(axes: Any) -> float:
    """Room for all but a spike at the edge: a field of view full of air would flatten the rest."""
    inner = [value for line in axes.lines for value in list(line.get_ydata())[1:-1]]
    return 1.1 * max(sorted(inner)[-max(1, len(inner) // 100)], 0.1)


def colour_of(place: int) -> str:
    """Colour of the scanner or class at a place."""
    return f"series-{place}" if place < MAX_SCANNERS else "muted"
