"""Capsules as pictures: what a decoder draws as one dimension moves, and how a slice is routed; inline SVG.

Pictures are embedded as small PNGs and never smoothed: a layer at an eighth of the resolution looks like one.
"""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capsfl.report.overlays import EDGE, grey_levels, outline

CELL = 36
"""Side of a cell of the grid on the page."""
MAX_CELL = 72
"""Longest side of an embedded cell in pixels."""
WIDTH = 1024
"""Of the drawing of a slice."""
SCAN = 168
"""Width of the scan in it, and of the labels of the rows below."""
MAX_COLUMN = 150
MAX_PIXELS = 224
"""Longest side of an embedded map in pixels."""
MAX_PAIRS = 16
"""Maps of single couplings that are drawn of the last layer."""
DOUBLING = 1.0
"""Couplings are coloured by the logarithm to base 2 of share over equal share, up to twice and down to half."""


@dataclass(frozen=True)
class Grid:
    """An image, and what a decoder draws of its class capsule while one dimension of it moves."""

    image: NDArray[np.uint8]
    """The network's input, `(height, width)`, grey."""
    moved: NDArray[np.uint8]
    """`(dim, steps, height, width)`, grey; the middle step is the reconstruction itself."""
    tweaks: NDArray[np.floating]
    """What is added to a dimension, `(steps,)`."""
    capsule: NDArray[np.floating]
    """The capsule as the network gives it, `(dim,)`."""


@dataclass(frozen=True)
class Layer:
    """How one layer routes a slice."""

    name: str
    sources: tuple[int, ...]
    """Child types from the layer below, and after them those of the skip where there is one."""
    couplings: NDArray[np.float32]
    """`(children, parents, height, width)`; the shares of a child sum to one."""
    lengths: NDArray[np.float32]
    """Lengths of the parents, `(parents, height, width)`, in [0, 1]."""

    def decision(self) -> NDArray[np.float32]:
        """How far the children's couplings are from equal shares, `(height, width)` in [0, 1], mean over children.

        One minus the entropy of a child's couplings over that of equal ones: 0 where routing says nothing, 1 where
        every child gives its whole vote to one parent.
        """
        shares = np.clip(self.couplings, 1e-12, 1)
        entropy = -np.sum(shares * np.log(shares), axis=1) / np.log(shares.shape[1])
        return np.clip(1 - entropy.mean(axis=0), 0, 1).astype(np.float32)

    def within(self, body: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which positions of the layer, `(height, width)`, have a voxel of the body; all where there is none."""
        height, width = self.lengths.shape[1:]
        blocks = body.reshape(height, body.shape[0] // height, width, body.shape[1] // width)
        found = np.asarray(blocks.any(axis=(1, 3)))
        return found if found.any() else np.ones_like(found)

    def mean_couplings(self, body: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Couplings averaged over the positions within the body, `(children, parents)`."""
        return self.couplings[:, :, self.within(body)].mean(axis=-1)


@dataclass(frozen=True)
class Slice:
    """A slice of a scan and the layers that route it, from the image on."""

    hu: NDArray[np.float32]
    body: NDArray[np.bool_]
    truth: NDArray[np.bool_]
    prediction: NDArray[np.float32]
    aspect: float
    """Height of a pixel over its width."""
    decision: float
    """Probability above which the prediction marks."""
    layers: tuple[Layer, ...]

    def peak(self) -> float:
        """The largest decision of any layer anywhere."""
        return max(float(layer.decision().max()) for layer in self.layers)


def draw_grid(grid: Grid, *, label: str) -> str:
    """Draw the input, the reconstruction, one row for each dimension and how much the image changes along it."""
    dim, steps, height, width = grid.moved.shape
    tall = CELL * height / width
    left, top, side = 2 * CELL + 58, 20, 2 * CELL
    end = left + steps * CELL
    cells = np.stack([_reduced(cell, MAX_CELL) for cell in grid.moved.reshape(-1, height, width)])
    mosaic = cells.reshape(dim, steps, *cells.shape[1:]).transpose(0, 2, 1, 3).reshape(dim * cells.shape[1], -1)
    change = np.abs(grid.moved[:, -1].astype(np.int16) - grid.moved[:, 0].astype(np.int16))
    scale, brightest = max(int(change.max()), 1), max(int(grid.image.max()), int(grid.moved.max()), 1)

    def lit(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return _levels(levels / brightest)

    parts = [
        _text(0, 12, "input"),
        _picture(lit(grid.image), 0, top, side, 2 * tall),
        _text(0, top + 2 * tall + 24, "drawn"),
        _picture(lit(grid.moved[0, steps // 2]), 0, top + 2 * tall + 32, side, 2 * tall),
        _picture(lit(mosaic), left, top, steps * CELL, dim * tall),
        _text(end + 10, 12, "change"),
    ]
    for place, tweak in enumerate(grid.tweaks):
        if place % 5 == 0 or place == steps - 1:
            parts.append(_text(left + (place + 0.5) * CELL, 12, _signed(float(tweak)), anchor="middle"))
    for row in range(dim):
        middle = top + (row + 0.5) * tall + 3
        parts.append(_text(left - 40, middle, str(row + 1), anchor="end"))
        parts.append(_text(left - 6, middle, _signed(float(grid.capsule[row])), anchor="end"))
        seen = np.round(change[row] * (255 / scale)).astype(np.uint8)
        parts.append(_picture(seen, end + 10, top + row * tall, CELL, tall, colours="magma"))
    for column in range(1, steps):
        parts.append(_line(left + column * CELL, top, left + column * CELL, top + dim * tall))
    for row in range(1, dim):
        parts.append(_line(left, top + row * tall, end + 10 + CELL, top + row * tall))
    parts.append(_frame(left + steps // 2 * CELL, top, CELL, dim * tall, name="here"))
    parts.append(_text(end + 10, top + dim * tall + 14, f"to {scale / 255:.2f}"))
    about = f"What the decoder draws of {label} as one dimension moves"
    return _svg(parts, end + 12 + CELL, top + dim * tall + 18, about)


def draw_couplings(found: Slice, *, label: str) -> str:
    """Draw the scan and, for every layer, where it decides, its mean couplings, the lengths, and the last couplings."""
    step = min(MAX_COLUMN, (WIDTH - SCAN) / len(found.layers))
    columns = [(SCAN + 8 + place * step, layer) for place, layer in enumerate(found.layers)]
    ratio = min(1.5, found.aspect * found.hu.shape[0] / found.hu.shape[1])
    parts, y = [], 0.0
    for row in (_decisions, _mean_couplings, _lengths, _last_couplings):
        drawn, tall = row(found, columns, step - 8, ratio, y)
        parts += drawn
        y += tall
    return _svg(parts, WIDTH, y, f"How SegCaps routes a slice of {label}")


Columns = Sequence[tuple[float, Layer]]
"""The left edge of each layer, and the layer."""
Row = tuple[list[str], float]
"""A row's drawing, and its height with the space below."""


def _decisions(found: Slice, columns: Columns, wide: float, ratio: float, y: float) -> Row:
    top, scan, peak = y + 16, SCAN - 14, max(found.peak(), 1e-6)
    parts = [_text(0, y + 10, "scan"), _scan(found, 0, top, scan, scan * ratio)]
    for x, layer in columns:
        decided = layer.decision()
        parts.append(_text(x, y + 10, layer.name))
        parts.append(_picture(_levels(decided / peak), x, top, wide, wide * ratio, colours="magma"))
        mean = float(decided[layer.within(found.body)].mean())
        parts.append(_text(x, top + wide * ratio + 12, f"mean {mean:.3f}"))
    return parts, 16 + max(wide * ratio + 16, scan * ratio) + 22


def _mean_couplings(found: Slice, columns: Columns, wide: float, ratio: float, y: float) -> Row:
    cell = min(11.0, wide / 8)
    thick = 0.7 * cell
    words = ("mean share of each", "child (row) for each", "parent (column)")
    parts = [_text(0, y + 10 + 13 * line, each) for line, each in enumerate(words)]
    for x, layer in columns:
        means = layer.mean_couplings(found.body)
        children, parents = means.shape
        parts.append(_picture(_shares(means, parents), x, y, parents * cell, children * thick, colours="PuOr_r"))
        parts.append(_frame(x, y, parents * cell, children * thick))
        for seam in np.cumsum(layer.sources)[:-1]:
            parts.append(_line(x - 3, y + seam * thick, x + parents * cell + 3, y + seam * thick, name="skip"))
    return parts, max(max(len(layer.couplings) for _, layer in columns) * thick, 36) + 18


def _lengths(found: Slice, columns: Columns, wide: float, ratio: float, y: float) -> Row:
    parts, small = [_text(0, y + 10, "lengths of the parents")], (wide - 3) / 2
    for x, layer in columns:
        for place, lengths in enumerate(layer.lengths):
            corner = (x + place % 2 * (small + 3), y + place // 2 * (small * ratio + 3))
            parts.append(_picture(_levels(lengths), *corner, small, small * ratio, colours="magma"))
    return parts, max((len(layer.lengths) + 1) // 2 for _, layer in columns) * (small * ratio + 3) + 16


def _last_couplings(found: Slice, columns: Columns, wide: float, ratio: float, y: float) -> Row:
    layer = found.layers[-1]
    children, parents = layer.couplings.shape[:2]
    # Of two parents the second has what the first leaves.
    pairs = [(child, parent) for child in range(children) for parent in range(parents - (parents == 2))][:MAX_PAIRS]
    parts = [_text(0, y + 22, "share of a child for a parent"), _text(0, y + 35, f"in {layer.name}")]
    across = min(len(pairs), 8)
    pitch = min((WIDTH - SCAN - 8) / across, MAX_COLUMN + 16)
    size = pitch - 8
    for place, (child, parent) in enumerate(pairs):
        x, top = SCAN + 8 + place % across * pitch, y + place // across * (size * ratio + 18)
        parts.append(_text(x, top + 8, f"{child + 1} for {parent + 1}"))
        levels = _shares(layer.couplings[child, parent], parents)
        parts.append(_picture(levels, x, top + 12, size, size * ratio, colours="PuOr_r"))
        parts.append(_frame(x, top + 12, size, size * ratio))
    return parts, -(-len(pairs) // across) * (size * ratio + 18)


def _scan(found: Slice, x: float, y: float, wide: float, tall: float) -> str:
    height, width = found.hu.shape
    layers = (("truth", found.truth, EDGE), ("prediction", found.prediction, found.decision))
    paths = "".join(
        f'<path class="{name}" d="'
        + "".join(
            "M" + "L".join(f"{x + a * wide / width:.1f} {y + b * tall / height:.1f}" for a, b in line) + "Z"
            for line in outline(field, level)
        )
        + '"/>'
        for name, field, level in layers
    )
    return _picture(grey_levels(found.hu), x, y, wide, tall) + paths


def _levels(field: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.round(np.clip(field, 0, 1) * 255).astype(np.uint8)


def _shares(couplings: NDArray[np.floating], parents: int) -> NDArray[np.uint8]:
    """Shares by how often they hold an equal share: 0 for half of it or less, 255 for twice or more."""
    return _levels(np.log2(np.maximum(couplings * parents, 1e-6)) / (2 * DOUBLING) + 0.5)


def _reduced(levels: NDArray[np.uint8], longest: int) -> NDArray[np.uint8]:
    if max(levels.shape) <= longest:
        return levels
    image = Image.fromarray(levels)
    image.thumbnail((longest, longest), Image.Resampling.BOX)
    return np.asarray(image)


def _picture(
    levels: NDArray[np.uint8], x: float, y: float, wide: float, tall: float, *, colours: str | None = None
) -> str:
    # The grid is one picture of many cells, which have been reduced one by one.
    image = Image.fromarray(levels if colours is None else _reduced(levels, MAX_PIXELS))
    if colours is not None:
        image.putpalette(_palette(colours))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<image x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{tall:.2f}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{data}"/>'
    )


@cache
def _palette(name: str) -> bytes:
    return np.round(matplotlib.colormaps[name](np.arange(256))[:, :3] * 255).astype(np.uint8).tobytes()


def palette_css(name: str) -> str:
    """A colour map as a CSS gradient from low to high, for a legend."""
    colours = np.frombuffer(_palette(name), np.uint8).reshape(256, 3)[:: 255 // 5]
    return "linear-gradient(90deg," + ",".join(f"rgb({r},{g},{b})" for r, g, b in colours) + ")"


def _signed(value: float) -> str:
    return "0" if abs(value) < 0.005 else f"{value:+.2f}".replace("-", "−").replace("0.", ".")


def _text(x: float, y: float, words: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, *, name: str = "seam") -> str:
    return f'<path class="{name}" d="M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"/>'


def _frame(x: float, y: float, wide: float, tall: float, *, name: str = "frame") -> str:
    return f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{tall:.1f}"/>'


def _svg(parts: Sequence[str], width: float, height: float, label: str) -> str:
    return (
        f'<svg class="capsules" role="img" aria-label="{html.escape(label)}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">{"".join(parts)}</svg>'
    )
