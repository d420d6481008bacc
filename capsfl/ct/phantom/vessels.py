"""Pulmonary vessels: trees grown from the hila, drawn as tapered capsules."""

import numpy as np
from numpy.typing import NDArray

from capsfl.ct.phantom.anatomy import Anatomy
from capsfl.ct.phantom.shapes import Float, Grid, slab_positions

ROOTS = 26
SMALLEST_MM = 0.42
_GENERATIONS = 9
_EDGE_MM = 1.0


def _unit(vectors: NDArray) -> NDArray:
    return vectors / (np.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-9)


def grow_vessels(anatomy: Anatomy) -> Float:
    """Grow both lungs' vessel trees, a generation at a time.

    Returns:
        Segments `(count, 8)`: both ends' x, y, z and both radii, in mm in the patient's frame.
    """
    rng = np.random.default_rng([anatomy.seed, 4])
    side = np.repeat([-1, 1], ROOTS)
    hilum = np.stack([side * 33 * anatomy.size, np.full(side.size, 8.0), np.where(side > 0, 10.0, 6.0)], 1)
    elevation = np.arcsin(rng.uniform(-0.97, 0.9, side.size))
    azimuth = rng.uniform(-1.5, 1.5, side.size)
    heading = np.stack(
        [side * np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)],
        1,
    )
    start = hilum + rng.normal(0, 7, (side.size, 3)) * np.array([0.5, 1, 1.8])
    branches = (side, start, heading, rng.uniform(2.3, 4.4, side.size), rng.uniform(20, 30, side.size))
    # A side branch skips a generation, so two generations are pending at a time.
    pending = [[branches], *([] for _ in range(_GENERATIONS + 2))]
    segments = []
    for generation in range(_GENERATIONS + 1):
        if not pending[generation]:
            continue
        side, start, heading, radius, length = (np.concatenate(part) for part in zip(*pending[generation], strict=True))
        keep = radius >= SMALLEST_MM
        side, start, heading, radius, length = (part[keep] for part in (side, start, heading, radius, length))
        length = length * rng.uniform(0.75, 1.25, side.size)
        heading = _unit(heading + rng.normal(0, 0.10, heading.shape))
        if generation:
            keep, heading, length = _stay_inside(anatomy, side, start, heading, length)
            side, start, heading, radius, length = (part[keep] for part in (side, start, heading, radius, length))
        end = start + heading * length[:, None]
        segments.append(np.concatenate([start, end, radius[:, None], 0.86 * radius[:, None]], 1))

        across = rng.normal(size=heading.shape)
        across = _unit(across - (across * heading).sum(1, keepdims=True) * heading)
        angle = np.deg2rad(rng.uniform(22, 45, (side.size, 1)))
        shrink_a, shrink_b = rng.uniform(0.72, 0.86, side.size), rng.uniform(0.6, 0.78, side.size)
        pending[generation + 1] += [
            (
                side,
                end,
                np.cos(0.7 * angle) * heading + np.sin(0.7 * angle) * across,
                radius * shrink_a,
                0.84 * length,
            ),
            (
                side,
                end,
                np.cos(1.2 * angle) * heading - np.sin(1.2 * angle) * across,
                radius * shrink_b,
                0.78 * length,
            ),
        ]
        if generation < 6:
            some = rng.uniform(size=side.size) < 0.55
            sideways = np.cross(heading, across) * rng.choice([-1, 1], (side.size, 1))
            middle = start + 0.5 * heading * length[:, None]
            pending[generation + 2].append(
                (
                    side[some],
                    middle[some],
                    (0.45 * heading + 0.9 * sideways)[some],
                    0.48 * radius[some],
                    0.62 * length[some],
                )
            )
    return np.concatenate(segments).astype(np.float32)


def _outside(anatomy: Anatomy, side: NDArray, point: NDArray) -> NDArray[np.bool_]:
    """Whether points lie within 3 mm of the chest wall, beyond it, or under the lungs' base."""
    width = anatomy.lung_width(point[:, 2])
    x, y = (point[:, axis].astype(np.float32) for axis in (0, 1))
    wall = np.where(side < 0, anatomy.lung_wall(-1, x, y, width), anatomy.lung_wall(1, x, y, width))
    return (wall > -3) | (anatomy.height(point[:, 2]) < 0.02)


def _stay_inside(
    anatomy: Anatomy, side: NDArray, start: NDArray, heading: NDArray, length: NDArray
) -> tuple[NDArray[np.bool_], NDArray, NDArray]:
    """Bend branches that would leave their lung back to its centre; cut those that still leave it."""
    end = start + heading * length[:, None]
    leaving = _outside(anatomy, side, end)
    low = anatomy.height(end[:, 2]) < 0.1
    center = np.stack(
        [
            side * (34 + 36 * anatomy.lung_width(start[:, 2])) * anatomy.size,
            np.full(side.size, 8.0),
            start[:, 2] + np.where(low, 20.0, 0.0),
        ],
        1,
    )
    bent = _unit(0.8 * heading + 0.6 * _unit(center - start))
    heading = np.where(leaving[:, None], bent, heading)
    length = np.where(leaving, 0.6 * length, length)
    cut = leaving & _outside(anatomy, side, start + heading * length[:, None])
    return ~cut, heading, length


def draw_vessels(segments: Float, grid: Grid, z: float, thickness: float) -> Float:
    """Fraction of each pixel that vessels fill in the slab at `z`, `(matrix, matrix)`.

    Segments are drawn in square patches, batched by patch size, so that the cost follows the vessels' area.
    """
    heights = slab_positions(z, thickness)
    canvas = np.zeros((len(heights), grid.matrix * grid.matrix), np.float32)
    for layer, height in zip(canvas, heights, strict=True):
        reach = segments[:, 6] + 1
        low = np.minimum(segments[:, 2], segments[:, 5]) - reach
        high = np.maximum(segments[:, 2], segments[:, 5]) + reach
        _draw_layer(layer, segments[(low < height) & (high > height)], grid, float(height))
    return canvas.mean(0).reshape(grid.matrix, grid.matrix)


def _draw_layer(layer: Float, segments: Float, grid: Grid, z: float) -> None:
    if not len(segments):
        return
    pixel, matrix = grid.pixel_mm, grid.matrix
    # Only the part of a segment near this height can show; clip the axis to it before boxing.
    x0, y0 = grid.to_image(segments[:, 0], segments[:, 1])
    x1, y1 = grid.to_image(segments[:, 3], segments[:, 4])
    z0, r0 = segments[:, 2], segments[:, 6]
    dx, dy, dz, dr = x1 - x0, y1 - y0, segments[:, 5] - z0, segments[:, 7] - r0
    squared = dx * dx + dy * dy + dz * dz + np.float32(1e-6)
    rise = np.where(np.abs(dz) < 1e-3, np.float32(1e-3), dz)
    reach = r0 + np.float32(_EDGE_MM)
    ends = np.stack([(z - reach - z0) / rise, (z + reach - z0) / rise])
    first, last = np.clip(ends.min(0), 0, 1), np.clip(ends.max(0), 0, 1)
    left = np.minimum(x0 + first * dx, x0 + last * dx) - reach
    right = np.maximum(x0 + first * dx, x0 + last * dx) + reach
    top = np.minimum(y0 + first * dy, y0 + last * dy) - reach
    bottom = np.maximum(y0 + first * dy, y0 + last * dy) + reach
    column = np.ceil((left - grid.axis[0]) / pixel).astype(int)
    row = np.ceil((top - grid.axis[0]) / pixel).astype(int)
    span = (
        np.maximum(np.floor((right - grid.axis[0]) / pixel) - column, np.floor((bottom - grid.axis[0]) / pixel) - row)
        + 1
    )
    seen = (span > 0) & (column < matrix) & (row < matrix) & (column + span > 0) & (row + span > 0)
    bucket = np.maximum(np.ceil(span / 6), 1).astype(int) * 6
    for size in np.unique(bucket[seen]):
        chosen = np.flatnonzero(seen & (bucket == size))
        size = min(int(size), matrix)
        i, j = np.clip(row[chosen], 0, matrix - size), np.clip(column[chosen], 0, matrix - size)
        steps = np.arange(size)
        u = grid.axis[j[:, None] + steps] - x0[chosen, None]
        v = grid.axis[i[:, None] + steps] - y0[chosen, None]
        w = z - z0[chosen]
        length = squared[chosen]
        along_rows = (v * dy[chosen, None] + (w * dz[chosen])[:, None]) / length[:, None]
        along_columns = u * dx[chosen, None] / length[:, None]
        along = along_rows[:, :, None] + along_columns[:, None, :]
        nearest = np.clip(along, 0, 1)
        # |v|^2 - 2 s (v.d) + s^2 |d|^2, with s the nearest point's position along the axis
        along *= -2
        along += nearest
        along *= nearest
        along *= length[:, None, None]
        along += ((v * v) + (w * w)[:, None])[:, :, None]
        along += (u * u)[:, None, :]
        distance = np.sqrt(np.maximum(along, 0, out=along), out=along)
        nearest *= dr[chosen, None, None]
        nearest += r0[chosen, None, None] + np.float32(0.5 * _EDGE_MM)
        filled = np.subtract(nearest, distance, out=nearest)
        which, down, across = np.nonzero(filled > 0)
        values = np.minimum(filled[which, down, across] * np.float32(1 / _EDGE_MM), 1)
        np.maximum.at(layer, (i[which] + down) * matrix + j[which] + across, values)
