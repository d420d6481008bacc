"""Slice positions to a regular stack: order, spacing, duplicates, gaps and gantry tilt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from capsfl.ct import errors
from capsfl.ct.reader import ReaderConfig
from capsfl.ct.scan import AIR_HU, MAX_SHEAR_DEGREES

SPACING_TOLERANCE = 0.01
"""Fraction of the slice spacing by which one gap may differ, from rounded positions."""
SAME_POSITION_MM = 1e-3
LISTED_POSITIONS = 6
"""Missing positions that a message names before it counts the rest."""


@dataclass(frozen=True, eq=False)
class Stack:
    """How the slices of a series form a regular grid."""

    order: tuple[int, ...]
    """Indices of the kept slices by rising position along the slice normal."""
    planes: tuple[int, ...]
    """For each kept slice, its index on the regular grid; gaps are missing slices."""
    duplicates: tuple[tuple[int, int], ...]
    """Pairs (kept, dropped) of slices at one position; whether their pixels are equal is not yet known."""
    affine: np.ndarray
    """(4, 4) array-order index (slice, row, column, 1) to LPS mm, of the grid after any tilt is corrected."""
    tilt_degrees: float
    shift_pixels: tuple[float, float]
    """Shift (rows, columns) per slice that a tilt causes; zero without tilt."""

    @property
    def missing(self) -> int:
        """Number of absent slices between the first and the last."""
        return self.planes[-1] + 1 - len(self.planes)

    @property
    def spacing_mm(self) -> float:
        """Distance of neighbouring planes in mm."""
        return float(np.linalg.norm(self.affine[:3, 0]))

    def grid(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Shape of the regular grid for slices of some rows and columns: a tilt needs room to shear into."""
        first, last = self._reach()
        return self.planes[-1] + 1, rows + last[0] - first[0], columns + last[1] - first[1]

    def offset(self, plane: int) -> tuple[float, float]:
        """Where the first pixel of a slice lies on its plane of the grid, in rows and columns."""
        first, _ = self._reach()
        return plane * self.shift_pixels[0] - first[0], plane * self.shift_pixels[1] - first[1]

    def _reach(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return _reach(self.shift_pixels, self.planes[-1])


def stack_slices(
    positions: np.ndarray,
    orientation: np.ndarray,
    pixel_spacing_mm: tuple[float, float],
    *,
    names: Sequence[str],
    place: Path,
    config: ReaderConfig,
) -> Stack:
    """Order slices along their normal and check that they form a regular grid.

    Args:
        positions: (slices, 3) LPS mm of each slice's first pixel.
        orientation: (6,) direction cosines along a row, then along a column (DICOM C.7.6.2.1.1).
        pixel_spacing_mm: between rows, between columns.
        names: names of the slices for messages.
        place: folder for messages.
        config: what is mended: missing slices, gantry tilt.

    Raises:
        GantryTilt, MissingSlices, InconsistentGeometry: as their names say.
    """
    along_row = orientation[:3] / np.linalg.norm(orientation[:3])
    normal = np.cross(along_row, orientation[3:])
    normal /= np.linalg.norm(normal)
    along_column = np.cross(normal, along_row)

    order, duplicates = _without_duplicates(positions @ normal)
    ordered = positions[order]
    if len(order) < 2:
        return Stack(tuple(order), tuple(range(len(order))), duplicates, np.eye(4), 0.0, (0.0, 0.0))
    travel = ordered[-1] - ordered[0]
    height = float(travel @ normal)
    across = np.array([travel @ along_column, travel @ along_row])
    tilt = float(np.rad2deg(np.arctan2(np.linalg.norm(across), height)))
    if tilt <= MAX_SHEAR_DEGREES:
        tilt = 0.0
    elif not config.allow_tilt_correction:
        raise errors.GantryTilt(place, tilt)
    # Apart from the tilt the slices must lie on one line: a jump aside is not an acquisition.
    heights = (ordered - ordered[0]) @ normal
    aside = ordered - ordered[0] - np.outer(heights / height, travel)
    if np.abs(aside).max() > min(pixel_spacing_mm):
        worst = int(np.abs(aside).max(axis=1).argmax())
        raise errors.InconsistentGeometry(
            place / names[order[worst]], "the slice is shifted against its neighbours", "export it again"
        )

    planes, spacing = _planes(ordered @ normal, [names[index] for index in order], place, config)
    row_mm, column_mm = pixel_spacing_mm
    slope = across / planes[-1] if tilt else np.zeros(2)
    shift = (float(slope[0] / row_mm), float(slope[1] / column_mm))
    (first_row, first_column), _ = _reach(shift, planes[-1])
    affine = np.eye(4)
    affine[:3, 0] = normal * spacing
    affine[:3, 1] = along_column * row_mm
    affine[:3, 2] = along_row * column_mm
    affine[:3, 3] = ordered[0] + first_row * affine[:3, 1] + first_column * affine[:3, 2]
    return Stack(tuple(order), tuple(planes), duplicates, affine, tilt, shift)


def shear(values: np.ndarray, valid: np.ndarray, stack: Stack, plane: int, out: np.ndarray, kept: np.ndarray) -> None:
    """Write one slice of a tilted stack where it lies on its plane of the grid, linearly in plane.

    Args:
        values: (rows, columns) HU of the slice.
        valid: (rows, columns) bool.
        stack: the stack.
        plane: index of the slice's plane.
        out: the plane's HU, overwritten; -1000 where nothing was measured.
        kept: the plane's validity, overwritten; true where all that was interpolated is valid.
    """
    rows, columns = values.shape
    canvas, measured = np.full(out.shape, AIR_HU, np.float32), np.zeros(out.shape, np.float32)
    canvas[:rows, :columns], measured[:rows, :columns] = values, valid
    offset = stack.offset(plane)
    np.greater(ndimage.shift(measured, offset, order=1, cval=0.0), 0.999, out=kept)
    out[...] = np.where(kept, ndimage.shift(canvas, offset, order=1, cval=AIR_HU), np.float32(AIR_HU))


def fill_missing(hu: np.ndarray, valid: np.ndarray, stack: Stack) -> None:
    """Interpolate absent planes linearly between their neighbours, in place; valid where both neighbours are."""
    for below, above in zip(stack.planes, stack.planes[1:], strict=False):
        for plane in range(below + 1, above):
            weight = np.float32((plane - below) / (above - below))
            np.logical_and(valid[below], valid[above], out=valid[plane])
            np.multiply(hu[below], 1 - weight, out=hu[plane])
            hu[plane] += hu[above] * weight
            hu[plane][~valid[plane]] = AIR_HU


def _reach(shift_pixels: tuple[float, float], last_plane: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Lowest and highest whole pixel (row, column) to which the first and the last plane are shifted."""
    rows, columns = (last_plane * step for step in shift_pixels)
    lowest = (int(np.floor(min(rows, 0.0))), int(np.floor(min(columns, 0.0))))
    return lowest, (int(np.ceil(max(rows, 0.0))), int(np.ceil(max(columns, 0.0))))


def _without_duplicates(heights: np.ndarray) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    order: list[int] = []
    duplicates: list[tuple[int, int]] = []
    for index in map(int, np.argsort(heights, kind="stable")):
        if order and heights[index] - heights[order[-1]] < SAME_POSITION_MM:
            duplicates.append((order[-1], index))
        else:
            order.append(index)
    return order, tuple(duplicates)


def _planes(heights: np.ndarray, names: list[str], place: Path, config: ReaderConfig) -> tuple[list[int], float]:
    """Grid index of each slice and the spacing in mm."""
    gaps = np.diff(heights)
    # A low quantile is the spacing even when most neighbours are absent, and one odd gap does not sway it.
    usual = float(np.quantile(gaps, 0.25, method="lower"))
    steps = np.maximum(np.rint(gaps / usual), 1).astype(int)
    spacing = float((heights[-1] - heights[0]) / steps.sum())
    uneven = np.abs(gaps - steps * spacing) > SPACING_TOLERANCE * spacing * steps
    if np.any(uneven):
        at = int(np.flatnonzero(uneven)[0])
        raise errors.InconsistentGeometry(
            place,
            f"uneven slice spacing: {gaps[at]:.3f} mm between {names[at]} and {names[at + 1]}, "
            f"{usual:.3f} mm elsewhere",
            "give a series with one spacing",
        )
    missing = int((steps - 1).sum())
    if missing and not config.allow_interpolation:
        absent = [
            heights[at] + step * spacing
            for at in np.flatnonzero(steps > 1)[:LISTED_POSITIONS]
            for step in range(1, min(int(steps[at]), LISTED_POSITIONS + 1))
        ][:LISTED_POSITIONS]
        listed = ", ".join(f"{height:.2f}" for height in absent) + (", ..." if missing > len(absent) else "")
        at = int(np.flatnonzero(steps > 1)[0])
        raise errors.MissingSlices(
            place,
            f"{missing} missing, at {listed} mm along the normal, the first between {names[at]} and {names[at + 1]}",
            "copy the series again, or set reader.allow_interpolation to fill the gaps",
        )
    if steps.max() - 1 > config.max_gap_slices:
        at = int(steps.argmax())
        raise errors.MissingSlices(
            place,
            f"{int(steps[at]) - 1} slices in a row are missing between {names[at]} and {names[at + 1]}",
            f"copy the series again; reader.max_gap_slices = {config.max_gap_slices} is the longest gap to fill",
        )
    return [0, *np.cumsum(steps).tolist()], spacing
