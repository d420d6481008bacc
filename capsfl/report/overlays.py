"""One slice as three panels: the scan, the truth over it, the prediction over it; inline SVG.

The scan is embedded once, as an 8-bit picture in the lung window, and shown three times; outlines are vector
paths, so they stay sharp at any size. Pixels keep the proportions of the tissue.
"""

import base64
import hashlib
import html
import io

import numpy as np
from contourpy import contour_generator
from numpy.typing import NDArray
from PIL import Image

from capsfl.report.study import Overlay

LUNG_WINDOW_HU = (-600.0, 1600.0)
"""Level and width in HU: the fixed window of the networks' input."""
EDGE = 0.5
"""Between the 0 and the 1 of a mask."""
MAX_SIDE = 512
"""Longest side of the embedded picture in pixels; larger slices are reduced."""
GAP = 0.02


def grey_levels(hu: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Map HU of any shape to grey in [0, 255] through the lung window."""
    level, width = LUNG_WINDOW_HU
    return np.round(np.clip((hu - level) / width + 0.5, 0, 1) * 255).astype(np.uint8)


def outline(field: NDArray[np.floating] | NDArray[np.bool_], level: float = EDGE) -> list[NDArray[np.float64]]:
    """Trace the lines where a `(height, width)` field crosses `level`.

    Returns:
        Closed lines of points `(x, y)` in pixels, the centre of the first pixel at (0.5, 0.5).
    """
    # A border below any level closes the lines of regions that touch the edge.
    padded = np.pad(np.asarray(field, dtype=np.float64), 1, constant_values=0.0)
    lines = contour_generator(z=padded).lines(level)
    height, width = field.shape
    return [np.clip(np.asarray(line) - 0.5, 0, (width, height)) for line in lines]


def triptych(overlay: Overlay) -> str:
    """Draw one slice as an `<svg>` of three panels; a mask that is absent leaves the scan bare."""
    height, width = overlay.hu.shape
    tall = height * overlay.aspect
    gap = GAP * width
    picture = _picture(overlay)
    # Two overlays of one slice share a picture, and then a name: both show the same scan.
    key = f"scan-{hashlib.sha256(picture.encode()).hexdigest()[:12]}"
    panels = (
        [],
        [("truth", overlay.truth)],
        [("truth faint", overlay.truth), ("prediction", overlay.prediction)],
    )
    parts = []
    for place, layers in enumerate(panels):
        if place == 0:
            scan = (
                f'<image id="{key}" width="{width}" height="{tall:.2f}" preserveAspectRatio="none" '
                f'href="data:image/png;base64,{picture}"/>'
            )
        else:
            scan = f'<use href="#{key}"/>'
        paths = "".join(
            f'<path class="{name}" d="{_path(mask, overlay, level_of(name, overlay))}"/>'
            for name, mask in layers
            if mask is not None
        )
        parts.append(f'<g transform="translate({place * (width + gap):.2f} 0)">{scan}{paths}</g>')
    label = html.escape(f"Slice {overlay.index} of {overlay.patient}: scan, truth, prediction")
    return (
        f'<svg class="triptych" role="img" aria-label="{label}" '
        f'viewBox="0 0 {3 * width + 2 * gap:.2f} {tall:.2f}">{"".join(parts)}</svg>'
    )


def _picture(overlay: Overlay) -> str:
    image = Image.fromarray(grey_levels(overlay.hu))
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def level_of(layer: str, overlay: Overlay) -> float:
    """The value whose outline is drawn: where the prediction marks, and the edge of a mask."""
    return overlay.decision if layer == "prediction" else EDGE


def _path(mask: NDArray[np.floating] | NDArray[np.bool_], overlay: Overlay, level: float) -> str:
    lines = outline(mask, level)
    return "".join("M" + "L".join(f"{x:.1f} {y * overlay.aspect:.1f}" for x, y in line) + "Z" for line in lines)
