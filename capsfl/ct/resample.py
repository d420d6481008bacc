"""Separable resampling as three sparse products, the way `jax.image.scale_and_translate` weighs it.

The weights are those of `jax.image.scale_and_translate` (a test holds them together). They are applied with SciPy
because every scanner brings its own shape, and compiling a program for each one costs more than resampling it;
ingestion's worker processes also start without loading jax. A row has some ten weights, so a sparse product does a
fortieth of the multiplications of a dense one; and its sums run in one order with any number of threads, which those
of a BLAS do not: equal scans give equal bits.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from scipy import sparse

Kernel = Literal["lanczos", "linear"]
LANCZOS_LOBES = 3
BLOCK = 8
"""Output planes that are made at a time, which stay in cache until they are finished."""


def weight_matrix(input_size: int, output_size: int, *, step: float, start: float, kernel: Kernel) -> np.ndarray:
    """Weights (output, input) that sample one axis at `start + step * index`, antialiased when step > 1.

    Rows sum to 1; a row whose sample lies more than half a voxel outside the input is zero.

    Args:
        input_size: number of input samples.
        output_size: number of output samples.
        step: distance of output samples in input samples.
        start: input index under the first output sample.
        kernel: Lanczos with three lobes (Duchon 1979) or linear.
    """
    sample = start + step * np.arange(output_size)
    distance = np.abs(sample[:, None] - np.arange(input_size)[None, :]) / max(step, 1.0)
    if kernel == "lanczos":
        weights = np.sinc(distance) * np.sinc(distance / LANCZOS_LOBES) * (distance < LANCZOS_LOBES)
    else:
        weights = np.maximum(0.0, 1.0 - distance)
    total = weights.sum(axis=1, keepdims=True)
    inside = (sample >= -0.5) & (sample <= input_size - 0.5)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=np.abs(total) > 1e-4)
    return (weights * inside[:, None]).astype(np.float32)


def apply_weights(values: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Resample (z, y, x) values with one weight matrix per axis; the result is float32.

    Args:
        values: (z, y, x) array of any real or bool type.
        weights: three matrices (output, input).
    """
    out = np.empty(_output_shape(weights), np.float32)
    _resample(values, weights, None, out, lambda block, target: np.copyto(target, block))
    return out


def resample_hu(
    hu: np.ndarray, weights: Sequence[np.ndarray], *, limits: tuple[float, float], outside: float
) -> np.ndarray:
    """Resample (z, y, x) Hounsfield units to int16, clipped before and after, which removes the overshoot.

    Args:
        hu: (z, y, x) HU.
        weights: three matrices (output, input).
        limits: lowest and highest HU.
        outside: HU where no weight reaches.
    """
    out = np.empty(_output_shape(weights), np.int16)
    z, y, x = (covered(axis) for axis in weights)

    def finish(block: np.ndarray, target: np.ndarray) -> None:
        np.rint(block, out=block)
        np.copyto(target, block, casting="unsafe")  # limits and overshoot together are far below 16 bits
        np.clip(target, np.int16(limits[0]), np.int16(limits[1]), out=target)

    _resample(hu, weights, limits, out, finish)
    for edge in (slice(0, z.start), slice(z.stop, None)):
        out[edge] = outside
    for edge in (slice(0, y.start), slice(y.stop, None)):
        out[z, edge] = outside
    for edge in (slice(0, x.start), slice(x.stop, None)):
        out[z, y, edge] = outside
    return out


def resample_mask(mask: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Resample a (z, y, x) bool mask and cut it at one half; the result is bool.

    Args:
        mask: (z, y, x) bool array.
        weights: three matrices (output, input).
    """
    out = np.zeros(_output_shape(weights), bool)
    if len(mask) > 1 and (mask[1:] == mask[0]).all():  # a reconstruction circle is the same in every slice
        plane = resample_mask(mask[:1], [np.ones((1, 1), np.float32), *weights[1:]])
        out[covered(weights[0])] = plane
        return out
    _resample(mask, weights, None, out, lambda block, target: np.greater_equal(block, 0.5, out=target))
    return out


def covered(weights: np.ndarray) -> slice:
    """The range of outputs with any weight; samples are in order, so that there are no gaps."""
    used = np.flatnonzero(weights.any(axis=1))
    return slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 0)


def _output_shape(weights: Sequence[np.ndarray]) -> tuple[int, ...]:
    return tuple(axis.shape[0] for axis in weights)


def _resample(
    values: np.ndarray,
    weights: Sequence[np.ndarray],
    clip: tuple[float, float] | None,
    out: np.ndarray,
    finish: Callable[[np.ndarray, np.ndarray], object],
) -> None:
    """Fill `out` a few planes at a time; `finish` turns such a block of float32 into its place in `out`.

    Neither a float copy of the input nor one of the output ever stands beside them: what is held is every plane
    resampled along y and x. In the plane a scan shrinks or hardly grows, thick slices grow along z, so z is last.
    """
    along_z, planes = weights[0], _touched(weights[0])
    rows, columns = _touched(weights[1]), _touched(weights[2])
    along_y, along_x = sparse.csr_array(weights[1][:, rows]), sparse.csr_array(weights[2][:, columns])
    reduced = np.empty((planes.stop - planes.start, out.shape[1] * out.shape[2]), np.float32)
    piece = np.empty(values[0, rows, columns].shape, np.float32)
    for plane, target in zip(values[planes, rows, columns], reduced, strict=True):
        if clip is None:
            piece[...] = plane
        else:
            _clip(plane, clip, piece)
        target.reshape(out.shape[1:])[...] = (along_x @ np.ascontiguousarray((along_y @ piece).T)).T
    for start in range(0, len(along_z), BLOCK):
        part = along_z[start : start + BLOCK, planes]
        if out.dtype != np.float32 and not part.any():
            continue  # nothing reaches these planes
        near = _touched(part)
        block = sparse.csr_array(part[:, near]) @ reduced[near]
        target = out[start : start + BLOCK]
        finish(block.reshape(target.shape), target)


def _clip(values: np.ndarray, limits: tuple[float, float], out: np.ndarray) -> None:
    """What `np.clip` does, whose one loop takes five times as long as these two."""
    np.maximum(values, np.float32(limits[0]), out=out)
    np.minimum(out, np.float32(limits[1]), out=out)


def _touched(weights: np.ndarray) -> slice:
    """The range of inputs with any weight."""
    used = np.flatnonzero(weights.any(axis=0))
    return slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 1)
