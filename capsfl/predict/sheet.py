"""The pictures of one patient beside what the network saw of them, on one sheet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from capsfl.ct.export import NOTICE, write_atomically
from capsfl.ct.picture_files import read_picture

MOST = 8
"""Pictures on a sheet: those that look least healthy."""
SHOWN_SIDE = 600
"""Longest side in pixels of a picture on a sheet."""
ABOVE_EACH_OTHER = 2
"""Up to so many pictures are drawn large; more stand two by two."""


def write_picture_sheet(path: Path, files: Sequence[Path], seen: np.ndarray, probability: Sequence[float]) -> None:
    """Draw a patient's pictures, each beside the square that the network saw, with its number and probability.

    File names are left out: they may name the patient, and the sheet may be passed on without its record.

    Args:
        path: a .png file.
        files: the pictures.
        seen: `(n, side, side, 1)` in [0, 1], what the network saw of each.
        probability: of disease in [0, 1], of each.

    Raises:
        StorageError: the place is read-only or full; nothing half-written is left.
    """
    shown = np.sort(np.argsort(-np.asarray(probability), kind="stable")[:MOST])
    pairs = 1 if len(shown) <= ABOVE_EACH_OTHER else 2
    rows = -(-len(shown) // pairs)
    figure = Figure(figsize=(7, 3.6 * rows + 0.4) if pairs == 1 else (9, 2.5 * rows + 0.4))
    figure.set(facecolor="black", layout_engine="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, 2 * pairs, squeeze=False).reshape(-1, 2)
    for panel in panels.flat:
        panel.set_axis_off()
    for index, (left, right) in zip(shown, panels, strict=False):
        side = seen.shape[1]
        picture = Image.fromarray(read_picture(files[index]))
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
        left.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=255)
        left.set_title(f"picture {index + 1}: {probability[index]:.3f}", color="white", fontsize=9)
        right.imshow(seen[index, ..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        right.set_title(f"seen: {side} x {side}", color="white", fontsize=9)
    title = f"{len(shown)} of {len(files)} pictures · {NOTICE}" if len(shown) < len(files) else NOTICE
    figure.suptitle(title, color="white", fontsize=10)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
