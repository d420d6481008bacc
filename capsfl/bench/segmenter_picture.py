"""Slices side by side, after Figure 10 of Kumar et al. 2020: scan, truth, and what every network marks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from capsfl.ct.normalize import window
from capsfl.learning.masks import dice
from capsfl.learning.patients import Patient

NAMES = {"segcaps": "SegCaps, norm", "segcaps-published": "SegCaps", "unet": "U-Net", "unet++": "U-Net++"}
TRUTH, PREDICTION = "#19b5fe", "#ff8c1a"


class Shown(NamedTuple):
    """One slice.

    Attributes:
        title: the case and the slice.
        image: `(height, width)` intensities in [-0.5, 0.5].
        truth: `(height, width)` bool.
        marked: by network, `(height, width)` bool.
        aspect: height of a pixel over its width.
    """

    title: str
    image: np.ndarray
    truth: np.ndarray
    marked: Mapping[str, np.ndarray]
    aspect: float


def fullest_slices(case: Patient, marked: Mapping[str, np.ndarray]) -> list[Shown]:
    """Cuts the axial slice with most truth out of a case and its masks, and the coronal one of a volume."""
    assert case.truth is not None
    dz, dy, dx = case.spacing_mm
    shown = []
    for plane, axis, aspect in (("axial", 0, dy / dx), ("coronal", 1, dz / dx)):
        if plane == "coronal" and len(case.hu) == 1:
            continue
        others = tuple(other for other in range(3) if other != axis)
        index = int(np.argmax(case.truth.sum(axis=others)))

        def cut(volume: np.ndarray, axis: int = axis, index: int = index) -> np.ndarray:
            # Coronal slices are shown with the head up, which z points to.
            return np.take(volume, index, axis=axis)[:: -1 if axis else 1]

        title = case.name if len(case.hu) == 1 else f"{case.name}, {plane} {index}"
        masks = {name: cut(mask) for name, mask in marked.items()}
        shown.append(Shown(title, cut(window(case.hu)), cut(case.truth), masks, aspect))
    return shown


def choose_cases(cases: Sequence[Patient], count: int) -> list[int]:
    """Returns the places of `count` cases evenly spaced by the size of their truth, chosen before any is scored."""
    sizes = np.array([0 if case.truth is None else int(case.truth.sum()) for case in cases])
    ranked = [int(place) for place in np.argsort(sizes, kind="stable") if sizes[place]]
    if len(ranked) <= count:
        return ranked
    return [ranked[int(place)] for place in np.linspace(0, len(ranked) - 1, count + 2)[1:-1].round()]


def draw(shown: Sequence[Shown], path: Path) -> None:
    """Draws a row per slice and writes it as PNG; the outline of the truth is blue, of a prediction orange."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    networks = list(shown[0].marked)
    columns = 2 + len(networks)
    tall = sum(one.image.shape[0] * one.aspect / one.image.shape[1] for one in shown)
    figure = Figure(figsize=(2.1 * columns, 2.1 * tall + 0.45 * len(shown)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    ratios = [one.image.shape[0] * one.aspect / one.image.shape[1] for one in shown]
    panels = figure.subplots(len(shown), columns, squeeze=False, gridspec_kw={"height_ratios": ratios})
    for one, row in zip(shown, panels, strict=True):
        for panel in row:
            panel.imshow(one.image, cmap="gray", vmin=-0.5, vmax=0.5, aspect=one.aspect, interpolation="nearest")
            panel.set_axis_off()
        row[0].set_title(one.title, fontsize=8)
        row[1].set_title("truth", fontsize=8)
        for panel in row[1:]:
            _outline(panel, one.truth, TRUTH)
        for panel, name in zip(row[2:], networks, strict=True):
            _outline(panel, one.marked[name], PREDICTION)
            panel.set_title(f"{NAMES.get(name, name)}, Dice {dice(one.marked[name], one.truth):.2f}", fontsize=8)
    figure.savefig(path)


def _outline(panel: object, mask: np.ndarray, colour: str) -> None:
    # A mask of one value has no outline, and matplotlib warns of it.
    if mask.any() and not mask.all():
        panel.contour(mask, levels=[0.5], colors=[colour], linewidths=1.0)  # pyright: ignore[reportAttributeAccessIssue]
