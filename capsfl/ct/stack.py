"""Slice positions to a regular stack: order, spacing, duplicates, gaps and gantry tilt."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from capsfl.ct import errors
from capsfl.ct.scan import AIR_HU, MAX_SHEAR_DEGREES

logger = logging.getLogger(__name__)

SPACING_TOLERANCE = 0.01
"""Fraction of the slice spacing by which one gap may differ, from rounded positions."""
SAME_POSITION_MM = 1e-3


@dataclass(frozen=True, eq=False)
class Stack:
    """How the slices of a series form a regular grid."""

    order: tuple[int, ...]
    """Indices of the kept slices by rising position along the slice normal."""
    planes: tuple[int, ...]
    """For each kept slice, its index on the regular grid; gaps are missing slices."""
    affine: np.ndarray
    """(4, 4) array-order index (slice, row, column, 1) to LPS mm, after any tilt is corrected."""
    tilt_degrees: float
    shift_pixels: tuple[float, float]
    """Shift (rows, columns) per slice that a tilt causes; zero without tilt."""

    @property
    def missing(self) -> int:
        """Number of absent slices between the first and the last."""
        return self.planes[-1] + 1 - len(self.planes)


def stack_slices(
    positions: np.ndarray,
    orientation: np.ndarray,
    pixel_spacing_mm: tuple[float, float],
    *,
    same: Callable[[int, int], bool],
    names: Sequence[str],
    place: Path,
    allow_interpolation: bool,
    allow_tilt_correction: bool,
) -> Stack:
    """Order slices along their normal and check that they form a regular grid.

    Args:
        positions: (slices, 3) LPS mm of each slice's first pixel.
        orientation: (6,) direction cosines along a row, then along a column (DICOM C.7.6.2.1.1).
        pixel_spacing_mm: between rows, between columns.
        same: whether two slices hold the same pixels; asked only for equal positions.
        names: file names for messages.
        place: folder for messages.
        allow_interpolation: accept missing slices.
        allow_tilt_correction: accept a gantry tilt.

    Raises:
        DuplicatePositions, GantryTilt, MissingSlices, InconsistentGeometry: as their names say.
    """
    along_row = orientation[:3] / np.linalg.norm(orientation[:3])
    normal = np.cross(along_row, orientation[3:])
    normal /= np.linalg.norm(normal)
    along_column = np.cross(normal, along_row)

    order = _without_duplicates(positions @ normal, same, names, place)
    ordered = positions[order]
    if len(order) < 2:
        return Stack(tuple(order), tuple(range(len(order))), np.eye(4), 0.0, (0.0, 0.0))
    travel = ordered[-1] - ordered[0]
    height = float(travel @ normal)
    across = np.array([travel @ along_column, travel @ along_row])
    tilt = float(np.rad2deg(np.arctan2(np.linalg.norm(across), height)))
    if tilt <= MAX_SHEAR_DEGREES:
        tilt = 0.0
    elif not allow_tilt_correction:
        raise errors.GantryTilt(place, tilt)
    # Apart from the tilt the slices must lie on one line: a jump aside is not an acquisition.
    heights = (ordered - ordered[0]) @ normal
    aside = ordered - ordered[0] - np.outer(heights / height, travel)
    if np.abs(aside).max() > min(pixel_spacing_mm):
        worst = int(np.abs(aside).max(axis=1).argmax())
        raise errors.InconsistentGeometry(
            place / names[order[worst]], "the slice is shifted against its neighbours", "export it again"
        )

    planes, spacing = _planes(heights, [names[index] for index in order], place, allow_interpolation)
    row_mm, column_mm = pixel_spacing_mm
    affine = np.eye(4)
    affine[:3, 0] = normal * spacing
    affine[:3, 1] = along_column * row_mm
    affine[:3, 2] = along_row * column_mm
    affine[:3, 3] = ordered[0]
    slope = across / planes[-1] if tilt else np.zeros(2)
    shift = (float(slope[0] / row_mm), float(slope[1] / column_mm))
    return Stack(tuple(order), tuple(planes), affine, tilt, shift)


def fill_missing(hu: np.ndarray, valid: np.ndarray, stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate absent slices linearly between their neighbours; valid where both neighbours are."""
    if not stack.missing:
        return hu, valid
    planes = np.array(stack.planes)
    wanted = np.arange(planes[-1] + 1)
    above = np.searchsorted(planes, wanted)
    below = np.where(planes[above] == wanted, above, above - 1)
    span = np.maximum(planes[above] - planes[below], 1)
    weight = ((wanted - planes[below]) / span).astype(np.float32)[:, None, None]
    return hu[below] * (1 - weight) + hu[above] * weight, valid[below] & valid[above]


def correct_tilt(hu: np.ndarray, valid: np.ndarray, stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """Shear the slices (linear interpolation in plane) so that the stack becomes orthogonal."""
    sheared, kept = np.empty_like(hu), np.empty_like(valid)
    for plane in range(hu.shape[0]):
        shift = [plane * step for step in stack.shift_pixels]
        sheared[plane] = ndimage.shift(hu[plane], shift, order=1, cval=AIR_HU)
        kept[plane] = ndimage.shift(valid[plane].astype(np.float32), shift, order=1, cval=0.0) >= 0.5
    return sheared, kept


def _without_duplicates(
    heights: np.ndarray, same: Callable[[int, int], bool], names: Sequence[str], place: Path
) -> list[int]:
    order: list[int] = []
    for index in map(int, np.argsort(heights, kind="stable")):
        if order and heights[index] - heights[order[-1]] < SAME_POSITION_MM:
            if not same(order[-1], index):
                raise errors.DuplicatePositions(
                    place,
                    f"{names[order[-1]]} and {names[index]} differ at one position "
                    f"({heights[index]:.2f} mm along the normal)",
                    "keep one phase or reconstruction per folder",
                )
            logger.warning("%s: dropped, the same slice as %s", place / names[index], names[order[-1]])
            continue
        order.append(index)
    return order


def _planes(heights: np.ndarray, names: list[str], place: Path, allow_interpolation: bool) -> tuple[list[int], float]:
    """Grid index of each slice and the spacing in mm."""
    gaps = np.diff(heights)
    # A low quantile is the spacing even when most neighbours are absent, and one odd gap does not sway it.
    steps = np.maximum(np.rint(gaps / np.quantile(gaps, 0.25, method="lower")), 1).astype(int)
    spacing = float(heights[-1] / steps.sum())
    uneven = np.abs(gaps - steps * spacing) > SPACING_TOLERANCE * spacing * steps
    if np.any(uneven):
        at = int(np.flatnonzero(uneven)[0])
        raise errors.InconsistentGeometry(
            place,
            f"uneven slice spacing: {gaps[at]:.3f} mm between {names[at]} and {names[at + 1]}, "
            f"{spacing:.3f} mm elsewhere",
            "give a series with one spacing",
        )
    if np.any(steps > 1) and not allow_interpolation:
        at = int(np.flatnonzero(steps > 1)[0])
        raise errors.MissingSlices(
            place,
            f"{int(steps.sum()) - len(gaps)} missing, first at {heights[at] + spacing:.2f} mm between "
            f"{names[at]} and {names[at + 1]}",
            "copy the series again or interpolate with allow_interpolation=True",
        )
    return [0, *np.cumsum(steps).tolist()], spacing
