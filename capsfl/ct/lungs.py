"""The lungs by a classical method: air in the body, without airway, closed over vessels and lesions."""

from typing import cast

import numpy as np
from scipy import ndimage

AIR_BELOW_HU = -320.0
"""Halfway between aerated lung (about -860) and soft tissue (about 40), rounded up: the usual threshold."""
AIRWAY_BELOW_HU = -930.0
GAS_BELOW_HU = -950.0
"""Mean of a stomach or bowel full of gas, which even an emphysematous lung does not reach."""
AIRWAY_MAX_AREA_MM2 = 1000.0
LUNG_MIN_ML = 50.0
LUNG_MIN_SHARE = 0.12
"""A second component counts as lung from this share of the first; bowel gas and oesophagus are smaller."""
CLOSING_MM = 9.0
HOLE_MAX_MM2 = 1500.0
"""Larger holes in a closed slice are the heart between two lungs that met, not a vessel or a lesion."""
SEARCH_SPACING_MM = 4.0
BODY_OPENING_MM = 6.0
"""Blankets, cables and the shells of a couch are thinner than twice this; the chest wall is thicker."""

IN_SPACE = ndimage.generate_binary_structure(3, 1)
IN_PLANE = IN_SPACE & np.array([False, True, False])[:, None, None]
"""Slice by slice: the trachea would join the lungs to the air before the face if the head is in view."""


def lung_mask(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Segment both lungs, (z, y, x) bool: threshold, drop outer air and airway, close, fill each slice.

    The threshold-and-connectivity scheme of Hu, Hoffman and Reinhardt (IEEE TMI 2001), without their
    separation of left and right. All false when there is no lung.

    Args:
        hu: (z, y, x) HU, axes towards Superior, Posterior, Left.
        spacing_mm: voxel distances along (z, y, x).
    """
    air = np.asarray(hu) < AIR_BELOW_HU
    inner = air & ~_outer_air(air)
    inner &= ~_airway(inner, hu, spacing_mm)
    labels, count = _components(inner, IN_SPACE)
    if count == 0:
        return inner
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    voxels = np.bincount(labels.ravel())[1:]
    mean_hu = np.bincount(labels.ravel(), weights=np.asarray(hu).ravel())[1:] / voxels
    volumes = voxels * voxel_ml * (mean_hu >= GAS_BELOW_HU)
    keep = (volumes >= LUNG_MIN_ML) & (volumes >= LUNG_MIN_SHARE * volumes.max())
    lungs = np.concatenate([[False], keep])[labels]
    return _closed(lungs, spacing_mm)


def body_mask(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Segment the body with all that it encloses, (z, y, x) bool; couch, blankets and cables are left out.

    Every slice is filled, then opened in the axial plane, which parts the body from thin things that touch it, and
    the largest piece is kept. The whole body has to be in view: where a crop opens the chest wall,
    the lung behind it would count as outside.

    Args:
        hu: (z, y, x) HU.
        spacing_mm: voxel distances along (z, y, x).
    """
    filled = ~_outer_air(np.asarray(hu) < AIR_BELOW_HU)
    steps = max(1, round(BODY_OPENING_MM / max(spacing_mm[1:])))
    core = ndimage.binary_erosion(filled, IN_PLANE, iterations=steps)
    labels, count = _components(core, IN_SPACE)
    if count == 0:
        return np.zeros_like(filled)
    largest = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    return np.asarray(ndimage.binary_dilation(largest, IN_PLANE, iterations=steps, mask=filled))


def lung_box(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray] | None:
    """Bound the lungs by the (low, high) corners (3,) in voxel indices, high exclusive; None without lungs.

    Searches on a grid of about 4 mm, which bounds the box to that accuracy.
    """
    strides = [max(1, round(SEARCH_SPACING_MM / spacing)) for spacing in spacing_mm]
    coarse = hu[:: strides[0], :: strides[1], :: strides[2]]
    z, y, x = (stride * spacing for stride, spacing in zip(strides, spacing_mm, strict=True))
    lungs = lung_mask(coarse, (z, y, x))
    if not lungs.any():
        return None
    low, high = np.empty(3, int), np.empty(3, int)
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        used = np.flatnonzero(lungs.any(axis=others))
        low[axis] = used[0] * strides[axis]
        high[axis] = min((used[-1] + 1) * strides[axis], hu.shape[axis])
    return low, high


def _components(mask: np.ndarray, structure: np.ndarray) -> tuple[np.ndarray, int]:
    """Label connected components from 1."""
    labels = np.empty(mask.shape, np.int32)
    count = ndimage.label(mask, structure=structure, output=labels)
    return labels, cast(int, count)


def _outer_air(air: np.ndarray) -> np.ndarray:
    """Air that reaches the side of the field of view; the lungs may reach its first and last slice."""
    labels, count = _components(air, IN_PLANE)
    outer = np.zeros(count + 1, bool)
    for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        outer[np.unique(edge)] = True
    outer[0] = False
    return outer[labels]


def _airway(inner: np.ndarray, hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Small cross-sections with a core of nothing but air: trachea and free-standing main bronchi."""
    labels, count = _components(inner, IN_PLANE)
    if count == 0:
        return np.zeros_like(inner)
    area = np.bincount(labels.ravel())[1:] * spacing_mm[1] * spacing_mm[2]
    smooth = np.empty(inner.shape, np.float32)
    for plane, values in enumerate(hu):  # the mean of 3 x 3 pixels, so that noise in lung does not reach air
        ndimage.uniform_filter(np.asarray(values, np.float32), 3, output=smooth[plane])
    darkest = np.asarray(ndimage.minimum(smooth, labels, np.arange(1, count + 1)))
    airway = (area <= AIRWAY_MAX_AREA_MM2) & (darkest < AIRWAY_BELOW_HU)
    return np.concatenate([[False], airway])[labels]


def _closed(lungs: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Close each slice with a disk of 9 mm and fill small holes: vessels and lesions count as lung."""
    sampling = spacing_mm[1:]
    rows, columns = (int(np.ceil(CLOSING_MM / spacing)) + 1 for spacing in sampling)
    closed = np.zeros_like(lungs)
    for plane in np.flatnonzero(lungs.any(axis=(1, 2))):
        padded = np.pad(lungs[plane], [(rows, rows), (columns, columns)])
        # With distances a large disk costs no more than a small one.
        grown = np.asarray(ndimage.distance_transform_edt(~padded, sampling=sampling)) <= CLOSING_MM
        shrunk = np.asarray(ndimage.distance_transform_edt(grown, sampling=sampling)) > CLOSING_MM
        filled = _filled(shrunk | padded, sampling[0] * sampling[1])
        closed[plane] = filled[rows:-rows, columns:-columns]
    return closed


def _filled(mask: np.ndarray, pixel_mm2: float) -> np.ndarray:
    holes = np.asarray(ndimage.binary_fill_holes(mask)) & ~mask
    labels, _ = _components(holes, ndimage.generate_binary_structure(2, 1))
    small = np.bincount(labels.ravel()) * pixel_mm2 <= HOLE_MAX_MM2
    small[0] = False
    return mask | small[labels]
