"""The lungs by a classical method: air in the body, without airway, closed over vessels and lesions."""

from dataclasses import dataclass
from typing import cast

import numpy as np
from scipy import ndimage

AIR_BELOW_HU = -320.0
"""Halfway between aerated lung (about -860) and soft tissue (about 40), rounded up: the usual threshold."""
AIRWAY_BELOW_HU = -930.0
GAS_BELOW_HU = -950.0
"""Median of a stomach or bowel full of gas and of the air around a patient, which even an emphysematous lung does not
reach."""
AIRWAY_MAX_AREA_MM2 = 1000.0
LUNG_MIN_ML = 50.0
LUNG_MIN_SHARE = 0.12
"""A second component counts as lung from this share of the first; bowel gas and oesophagus are smaller."""
CLOSING_MM = 9.0
HOLE_MAX_MM2 = 1500.0
"""Larger holes in a closed slice are the heart between two lungs that met, not a vessel or a lesion."""
SEARCH_SPACING_MM = 4.0
BODY_SPACING_MM = (4.0, 2.6, 2.6)
"""Grid on which the body is sought; finer ones take its border from their own voxels."""
GAS_MIN_MM2 = 150.0
"""Smaller cross-sections hold too few voxels for their median to tell gas from lung."""
OPEN_LUNG_MIN_MM2 = 1500.0
OPEN_LUNG_REACH_MM = 8.0
OPEN_LUNG_WALL = 0.7
"""A lung that the field of view cuts open is still walled within this distance along this share of two opposite sides;
the foam of a couch is not."""
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
    hu = np.asarray(hu)
    air = hu < AIR_BELOW_HU
    inner = air & ~_outer_air(air, hu, spacing_mm)
    inner &= ~_airway(inner, hu, spacing_mm)
    inner &= ~_gas(inner, hu, spacing_mm)
    labels, count = _components(inner, IN_SPACE)
    volumes = np.bincount(labels.ravel(), minlength=count + 1) * (float(np.prod(spacing_mm)) / 1000)
    volumes[0] = 0
    boxes = ndimage.find_objects(labels)
    for label in np.flatnonzero(volumes >= LUNG_MIN_ML):
        box = boxes[label - 1]
        if _median(hu[box], labels[box] == label) < GAS_BELOW_HU:
            volumes[label] = 0
    return _closed(((volumes >= LUNG_MIN_ML) & (volumes >= LUNG_MIN_SHARE * volumes.max()))[labels], spacing_mm)


def body_mask(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Segment the body with all that it encloses, (z, y, x) bool; couch, blankets and cables are left out.

    Every slice is filled, then opened in the axial plane, which parts the body from thin things that touch it, and
    the largest piece is kept. That is done on a grid of about 4 x 2.6 x 2.6 mm; on finer ones the voxels that lie
    along the border of what was found there decide for themselves, by the same threshold.

    Args:
        hu: (z, y, x) HU.
        spacing_mm: voxel distances along (z, y, x).
    """
    hu = np.asarray(hu)
    strides = tuple(
        min(max(1, round(wanted / has)), size)
        for wanted, has, size in zip(BODY_SPACING_MM, spacing_mm, hu.shape, strict=True)
    )
    coarse = hu[tuple(slice(stride // 2, None, stride) for stride in strides)]
    z, y, x = (stride * has for stride, has in zip(strides, spacing_mm, strict=True))
    # Slices of nothing but air, at most one at either end, say what those between them do.
    tissue = np.flatnonzero((coarse >= AIR_BELOW_HU).any(axis=(1, 2)))
    body = np.zeros(coarse.shape, bool)
    if not tissue.size:
        return np.zeros(hu.shape, bool)
    part = slice(max(0, tissue[0] - 1), tissue[-1] + 2)
    body[part] = _body(coarse[part], (z, y, x))
    if strides == (1, 1, 1):
        return body
    # What the field of view cuts has no border there.
    within = _eroded(body, (0, 1, 2), outside=True)
    around = ~_eroded(~body, (0, 1, 2), outside=True)
    fine = np.zeros(hu.shape, bool)
    for index, (outer, inner) in enumerate(zip(around, within, strict=True)):
        if not outer.any():
            continue
        used = np.flatnonzero(outer.any(axis=1))
        rows = slice(used[0], used[-1] + 1)
        place = (_fine(slice(index, index + 1), strides[0], len(body)), _fine(rows, strides[1], len(outer)))
        part = fine[place]
        np.greater_equal(hu[place], AIR_BELOW_HU, out=part)
        part &= _spread(outer[rows], strides[1:], part.shape[1:])
        part |= _spread(inner[rows], strides[1:], part.shape[1:])
    return fine


def _fine(part: slice, stride: int, size: int) -> slice:
    """The voxels of a fine grid for some of a coarse one of `size`; what the last of these leaves over is its."""
    return slice(part.start * stride, None if part.stop == size else part.stop * stride)


def _spread(plane: np.ndarray, strides: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Repeat a plane's voxels `strides` times along y and x; what a last one leaves over goes to it."""
    for axis, (stride, size) in enumerate(zip(strides, shape, strict=True)):
        plane = plane.repeat(stride, axis)
        if plane.shape[axis] != size:
            plane = plane.take(range(size), axis, mode="clip")
    return plane


def _body(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    filled = ~_outer_air(hu < AIR_BELOW_HU, hu, spacing_mm)
    core = filled
    steps = max(1, round(BODY_OPENING_MM / max(spacing_mm[1:])))
    for _ in range(steps):
        core = _eroded(core, (1, 2), outside=False)
    labels, count = _components(core, IN_SPACE)
    if count == 0:
        return np.zeros_like(filled)
    core = labels == 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    for _ in range(steps):
        core = ~_eroded(~core, (1, 2), outside=True) & filled
    return core


def _eroded(mask: np.ndarray, axes: tuple[int, ...], *, outside: bool) -> np.ndarray:
    """Erode by the two neighbours along each of some axes, with `outside` around the array; dilates a complement."""
    result = mask.copy()
    for axis in axes:
        shifted = np.moveaxis(result, axis, 0), np.moveaxis(mask, axis, 0)
        shifted[0][1:] &= shifted[1][:-1]
        shifted[0][:-1] &= shifted[1][1:]
        if not outside:
            shifted[0][[0, -1]] = False
    return result


@dataclass(frozen=True, eq=False)
class CoarseLungs:
    """The lungs on every n-th voxel of a scan along each axis: a grid of about 4 mm."""

    mask: np.ndarray
    """(z, y, x) bool with a voxel of lung at least."""
    strides: tuple[int, int, int]
    """How many voxels of the scan a voxel of the mask stands for along (z, y, x)."""
    shape: tuple[int, ...]
    """Shape of the scan."""

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """The (low, high) corners (3,) in the scan's voxels, high exclusive."""
        low, high = np.empty(3, int), np.empty(3, int)
        for axis, (stride, size) in enumerate(zip(self.strides, self.shape, strict=True)):
            used = np.flatnonzero(self.mask.any(axis=tuple(other for other in range(3) if other != axis)))
            low[axis] = used[0] * stride
            high[axis] = min((used[-1] + 1) * stride, size)
        return low, high

    def fraction_outside(self, low: np.ndarray, high: np.ndarray) -> float:
        """The share of the lungs that lies outside the (low, high) corners (3,), in the scan's voxels."""
        z, y, x = (
            (np.arange(count) * stride >= a - 0.5) & (np.arange(count) * stride <= b - 0.5)
            for count, stride, a, b in zip(self.mask.shape, self.strides, low, high, strict=True)
        )
        return 1 - float(self.mask[np.ix_(z, y, x)].sum() / self.mask.sum())


def find_lungs(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> CoarseLungs | None:
    """Search the lungs on a grid of about 4 mm, which places them to that accuracy; None without lungs.

    Args:
        hu: (z, y, x) HU, axes towards Superior, Posterior, Left.
        spacing_mm: voxel distances along (z, y, x).
    """
    i, j, k = (max(1, round(SEARCH_SPACING_MM / spacing)) for spacing in spacing_mm)
    mask = lung_mask(hu[::i, ::j, ::k], (i * spacing_mm[0], j * spacing_mm[1], k * spacing_mm[2]))
    return CoarseLungs(mask, (i, j, k), hu.shape) if mask.any() else None


def lung_box(hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray] | None:
    """Bound the lungs by the (low, high) corners (3,) in voxel indices, high exclusive; None without lungs.

    Searches on a grid of about 4 mm, which bounds the box to that accuracy.
    """
    lungs = find_lungs(hu, spacing_mm)
    return None if lungs is None else lungs.box()


def _components(mask: np.ndarray, structure: np.ndarray) -> tuple[np.ndarray, int]:
    """Label connected components from 1."""
    labels = np.empty(mask.shape, np.int32)
    count = ndimage.label(mask, structure=structure, output=labels)
    return labels, cast(int, count)


def _outer_air(air: np.ndarray, hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Air that reaches the side of the field of view; the lungs may reach its first and last slice.

    A field of view that cuts the chest opens a lung to a side. Such a lung is denser than air, and tissue that is
    thicker than a couch's shell walls it on the two sides beside its opening.
    """
    labels, count = _components(air, IN_PLANE)
    outer = np.zeros(count + 1, bool)
    for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        outer[np.unique(edge)] = True
    outer[0] = False
    areas = np.bincount(labels.ravel(), minlength=count + 1) * (spacing_mm[1] * spacing_mm[2])
    boxes = ndimage.find_objects(labels)
    for label in np.flatnonzero(outer & (areas >= OPEN_LUNG_MIN_MM2)):
        box = boxes[label - 1]
        component = labels[box] == label
        if _median(hu[box], component) >= GAS_BELOW_HU:
            outer[label] = not _is_walled(labels[box[0].start] == label, air[box[0].start], spacing_mm)
    return outer[labels]


def _is_walled(component: np.ndarray, air: np.ndarray, spacing_mm: tuple[float, float, float]) -> bool:
    """Whether thick tissue lies on both sides of most of a region of a slice: front and back, or right and left."""
    steps = max(1, round(BODY_OPENING_MM / max(spacing_mm[1:])))
    thick = ~air  # opened, so that it is tissue less what thin things there are
    for _ in range(steps):
        thick = _eroded(thick, (0, 1), outside=False)
    for _ in range(steps):
        thick = ~_eroded(~thick, (0, 1), outside=True) & ~air
    return _between(component, thick, spacing_mm[1]) or _between(component.T, thick.T, spacing_mm[2])


def _between(component: np.ndarray, thick: np.ndarray, spacing_mm: float) -> bool:
    columns = np.flatnonzero(component.any(axis=0))
    reach = 1 + np.arange(max(1, round(OPEN_LUNG_REACH_MM / spacing_mm)))[:, None]
    for region, tissue in ((component, thick), (component[::-1], thick[::-1])):
        rows = region[:, columns].argmax(axis=0) - reach
        if np.mean((tissue[rows.clip(0), columns] & (rows >= 0)).any(axis=0)) <= OPEN_LUNG_WALL:
            return False
    return True


def _median(hu: np.ndarray, region: np.ndarray) -> float:
    """Median of a region, of a thousand of its voxels where it has more; `np.median` is mostly overhead here."""
    values = hu[region]
    values = values[:: 1 + len(values) // 1000]
    below, above = (len(values) - 1) // 2, len(values) // 2
    values.partition((below, above))
    return float((values[below] + values[above]) / 2)


def _gas(inner: np.ndarray, hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Cross-sections of gas: stomach and bowel, which only a thin diaphragm parts from the lung."""
    labels, count = _components(inner, IN_PLANE)
    gas = np.zeros(count + 1, bool)
    areas = np.bincount(labels.ravel(), minlength=count + 1) * (spacing_mm[1] * spacing_mm[2])
    areas[0] = 0
    boxes = ndimage.find_objects(labels)
    for label in np.flatnonzero(areas >= GAS_MIN_MM2):
        box = boxes[label - 1]
        gas[label] = _median(hu[box], labels[box] == label) < GAS_BELOW_HU
    return gas[labels]


def _airway(inner: np.ndarray, hu: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Small cross-sections with a core of nothing but air: trachea and free-standing main bronchi."""
    labels, count = _components(inner, IN_PLANE)
    if count == 0:
        return np.zeros_like(inner)
    area = np.bincount(labels.ravel()) * (spacing_mm[1] * spacing_mm[2])
    # The mean of 3 x 3 pixels, so that noise in lung does not reach air.
    smooth = np.asarray(ndimage.uniform_filter(np.asarray(hu, np.float32), size=3, axes=(1, 2)))
    core = np.bincount(labels[smooth < AIRWAY_BELOW_HU], minlength=count + 1) > 0
    airway = core & (area <= AIRWAY_MAX_AREA_MM2)
    airway[0] = False
    return airway[labels]


def _closed(lungs: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Close each slice with a disk of 9 mm and fill small holes: vessels and lesions count as lung."""
    used = np.flatnonzero(lungs.any(axis=(1, 2)))
    closed = np.zeros_like(lungs)
    if not used.size:
        return closed
    sampling = spacing_mm[1:]
    rows, columns = (int(np.ceil(CLOSING_MM / spacing)) + 1 for spacing in sampling)
    part = slice(used[0], used[-1] + 1)
    padded = np.pad(lungs[part], [(0, 0), (rows, rows), (columns, columns)])
    grown = _dilated(padded, sampling)
    filled = _filled(~_dilated(~grown, sampling) | padded, sampling[0] * sampling[1])
    closed[part] = filled[:, rows:-rows, columns:-columns]
    return closed


def _dilated(mask: np.ndarray, sampling: tuple[float, ...]) -> np.ndarray:
    """Dilate each slice by the disk, row by row of it from its ends: towards the middle the rows grow longer."""
    height = mask.shape[1]
    steps = [np.arange(int(CLOSING_MM / spacing) + 2) * spacing for spacing in sampling]
    inside = np.sqrt(steps[0][:, None] ** 2 + steps[1] ** 2) <= CLOSING_MM
    result = mask.copy()
    runs, reach = mask, 0
    for down in np.flatnonzero(inside[:, 0])[::-1]:
        while inside[down, reach + 1]:
            wider = runs.copy()
            wider[:, :, 1:] |= runs[:, :, :-1]
            wider[:, :, :-1] |= runs[:, :, 1:]
            runs, reach = wider, reach + 1
        result[:, down:] |= runs[:, : height - down]
        result[:, : height - down] |= runs[:, down:]
    return result


def _filled(mask: np.ndarray, pixel_mm2: float) -> np.ndarray:
    """Fill each slice's small holes: what of the background does not reach the slice's border."""
    labels, count = _components(~mask, IN_PLANE)
    fill = np.bincount(labels.ravel(), minlength=count + 1) * pixel_mm2 <= HOLE_MAX_MM2
    for edge in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        fill[edge] = False
    fill[0] = False
    return mask | fill[labels]
