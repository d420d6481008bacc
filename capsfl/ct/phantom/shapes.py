"""What the phantom is drawn with: pixel grids, soft-edged shapes, smooth random fields.

Shapes are signed distances, negative inside. Lengths are mm in the patient's frame: +x to the patient's left,
+y posterior, +z superior.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Float: TypeAlias = NDArray[np.floating]
Box: TypeAlias = tuple[slice, slice]

EDGE_MM = 0.7
"""Width of a shape's soft edge, about one pixel of a 512 matrix."""

_COARSE = 128

_UNTHREADED_PRODUCT = 1 << 18
"""Multiplications in a matrix product that OpenBLAS never shares among threads (interface/gemm.c)."""


def coverage(distance: Float, width: float = EDGE_MM) -> Float:
    """Fraction of a pixel inside a shape, a linear ramp of `width` mm across the edge."""
    inside = distance * np.float32(-1 / width)
    inside += np.float32(0.5)
    return np.clip(inside, 0, 1, out=inside)


def paint(hu: Float, cover: Float | float, value: Float | float) -> None:
    """Lay `value` over `hu` in place where `cover` is 1, mixed where it is between 0 and 1."""
    change = np.subtract(value, hu, dtype=np.float32)
    change *= cover
    hu += change


def superellipse(x: Float, y: Float, a: Float | float, b: Float | float, power: float = 2.0) -> Float:
    """Radial signed distance to |x/a|^p + |y/b|^p = 1; semi-axes `a` and `b` may vary from point to point."""
    radius = np.sqrt(x * x + y * y) + np.float32(1e-3)
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if power == 2.0:
        scale = np.sqrt((x / a) ** 2 + (y / b) ** 2)
    else:
        scale = np.abs(x / a) ** np.float32(power) + np.abs(y / b) ** np.float32(power)
        scale **= np.float32(1 / power)
    return radius * (1 - 1 / (scale + np.float32(1e-6)))


def smooth_minimum(a: Float, b: Float, width: float) -> Float:
    """Minimum of two distances whose crease is rounded over `width` mm (Quilez's polynomial blend)."""
    mix = np.clip(0.5 + 0.5 * (b - a) / np.float32(width), 0, 1)
    return b + mix * (a - b) - np.float32(width) * mix * (1 - mix)


def smoothstep(x: Float) -> Float:
    """Cubic step from 0 at x <= 0 to 1 at x >= 1."""
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def rotate(x: Float, y: Float, degrees: float) -> tuple[Float, Float]:
    """Coordinates in axes turned by `degrees`."""
    c, s = np.float32(np.cos(np.deg2rad(degrees))), np.float32(np.sin(np.deg2rad(degrees)))
    return c * x + s * y, c * y - s * x


def multiply(left: Float, right: Float) -> Float:
    """Matrix product whose bits do not depend on the number of threads.

    BLAS shares large products out among threads, and where it cuts them changes the last bits, which rounding
    would carry into the files. Blocks of rows below its threading threshold are never shared out.
    """
    rows = max(1, _UNTHREADED_PRODUCT // right.size)
    whole = len(left) // rows * rows
    product = (left[:whole].reshape(-1, rows, left.shape[1]) @ right).reshape(whole, right.shape[1])
    return product if whole == len(left) else np.concatenate([product, left[whole:] @ right])


def overlap(z: float, thickness: float, low: float, high: float) -> float:
    """Fraction of the slab of `thickness` mm centred on `z` that lies between `low` and `high`."""
    return float(np.clip(min(z + thickness / 2, high) - max(z - thickness / 2, low), 0, thickness) / thickness)


def slab_positions(z: float, thickness: float) -> NDArray[np.float64]:
    """Heights (mm) whose mean stands for the slab: one in about 1.7 mm, as fine structures need."""
    count = max(1, round(thickness / 1.67))
    return z + (np.arange(count) - (count - 1) / 2) * thickness / count


@dataclass(frozen=True)
class Grid:
    """The pixels of one axial slice, with the patient lying turned and off centre on the couch.

    Smooth shapes are evaluated on nodes every few pixels, at most 129 a side, and refined linearly: their
    curvature radii are tens of mm, so the error stays under .1 mm while the cost falls 16-fold at 512.
    """

    matrix: int
    field_of_view_mm: float
    center_x: float
    center_y: float
    tilt_degrees: float

    @property
    def pixel_mm(self) -> float:
        """Distance between neighbouring pixel centres (mm)."""
        return self.field_of_view_mm / self.matrix

    @property
    def stride(self) -> int:
        """Pixels between two nodes of the coarse grid."""
        return max(1, self.matrix // _COARSE)

    @cached_property
    def axis(self) -> Float:
        """Pixel centres along a row or a column (mm), `(matrix,)`."""
        return ((np.arange(self.matrix) - (self.matrix - 1) / 2) * self.pixel_mm).astype(np.float32)

    @cached_property
    def coarse_axis(self) -> Float:
        """Node positions (mm), one more than needed to enclose the last pixel."""
        nodes = np.arange(self.matrix // self.stride + 1) * self.stride
        return ((nodes - (self.matrix - 1) / 2) * self.pixel_mm).astype(np.float32)

    def _patient_frame(self, axis: Float) -> tuple[Float, Float]:
        x, y = axis[None, :] - np.float32(self.center_x), axis[:, None] - np.float32(self.center_y)
        return rotate(x, y, self.tilt_degrees)

    @cached_property
    def fine(self) -> tuple[Float, Float]:
        """Patient coordinates x, y of every pixel, each `(matrix, matrix)`."""
        return self._patient_frame(self.axis)

    @cached_property
    def coarse(self) -> tuple[Float, Float]:
        """Patient coordinates x, y of every node."""
        return self._patient_frame(self.coarse_axis)

    def refine(self, values: Float) -> Float:
        """Linear interpolation from the nodes to the pixels, `(matrix, matrix)`."""
        if self.stride == 1:
            return values[:-1, :-1].copy()
        fraction = np.arange(self.stride, dtype=np.float32) / np.float32(self.stride)
        rows = values[:, :-1, None] + np.diff(values, axis=1)[:, :, None] * fraction
        rows = rows.reshape(len(values), self.matrix)
        pixels = np.diff(rows, axis=0)[:, None, :] * fraction[:, None]
        pixels += rows[:-1, None, :]
        return pixels.reshape(self.matrix, self.matrix)

    def to_image(self, x: Float | float, y: Float | float) -> tuple[Float, Float]:
        """Image-plane coordinates (mm) of points given in the patient's frame."""
        u, v = rotate(np.asarray(x, np.float32), np.asarray(y, np.float32), -self.tilt_degrees)
        return u + np.float32(self.center_x), v + np.float32(self.center_y)

    def box(self, x: float, y: float, half_x: float, half_y: float) -> Box:
        """Rows and columns enclosing the rectangle centred on (x, y) in the patient's frame; may be empty."""
        u, v = self.to_image(x, y)
        turn = np.deg2rad(abs(self.tilt_degrees))
        half_u = half_x * np.cos(turn) + half_y * np.sin(turn)
        half_v = half_y * np.cos(turn) + half_x * np.sin(turn)
        columns = np.searchsorted(self.axis, [u - half_u, u + half_u])
        rows = np.searchsorted(self.axis, [v - half_v, v + half_v])
        return slice(int(rows[0]), int(rows[1])), slice(int(columns[0]), int(columns[1]))


class SmoothField:
    """A random field of unit variance made of 40 plane waves, with correlation length `scale_mm`.

    Wave vectors are normal with standard deviation 1/scale, so the covariance is Gaussian
    (Rahimi and Recht 2007, random Fourier features). The sum separates into rows x columns: one small matrix
    product evaluates a plane.
    """

    waves = 40

    def __init__(self, rng: np.random.Generator, scale_mm: float, axis: Float) -> None:
        vectors = rng.normal(size=(self.waves, 3)) / scale_mm
        self._along_z = vectors[:, 2]
        self._phase = rng.uniform(0, 2 * np.pi, self.waves)
        self._rows = np.exp(1j * np.outer(axis, vectors[:, 1])).astype(np.complex64)
        columns = np.exp(-1j * np.outer(axis, vectors[:, 0])) * np.sqrt(2 / self.waves)
        # re(a b) = re a re b - im a im b: interleaved real and imaginary parts make it one real product.
        self._columns = np.ascontiguousarray(columns.astype(np.complex64).view(np.float32).T)

    def plane(self, z: float, box: Box | None = None, *, thickness: float = 0.0) -> Float:
        """Values at height `z`, averaged over a slab of `thickness` mm."""
        rows, columns = box or (slice(None), slice(None))
        factor = np.exp(1j * (self._along_z * z + self._phase))
        if thickness:
            factor *= np.sinc(self._along_z * thickness / (2 * np.pi))
        left = (self._rows[rows] * factor.astype(np.complex64)).view(np.float32)
        return multiply(left, self._columns[:, columns])

    def sheets(self, z: float, width: float, box: Box | None = None, *, thickness: float = 0.0) -> Float:
        """Thin curved walls where the field crosses zero, exp(-(field/width)^2), averaged over the slab."""
        heights = slab_positions(z, thickness) if thickness else (z,)
        total: Float | None = None
        for height in heights:
            wall = self.plane(float(height), box)
            wall *= np.float32(1 / width)
            np.multiply(wall, wall, out=wall)
            np.negative(wall, out=wall)
            np.exp(wall, out=wall)
            total = wall if total is None else np.add(total, wall, out=total)
        assert total is not None
        total /= np.float32(len(heights))
        return total
