"""Separable resampling as three matrix products, the way `jax.image.scale_and_translate` does it.

The weights are those of `jax.image.scale_and_translate` (a test holds them together). They are applied with
NumPy because every scanner brings its own shape, and compiling a program for each one costs more than
resampling it; ingestion's worker processes also start without loading jax.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Kernel = Literal["lanczos", "linear"]
LANCZOS_LOBES = 3


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


def apply_weights(
    values: np.ndarray, weights: Sequence[np.ndarray], *, clip: tuple[float, float] | None = None
) -> np.ndarray:
    """Resample (z, y, x) values with one weight matrix per axis; the result is float32.

    Goes slice by slice, so that the temporaries stay in cache, and leaves out rows and columns that no
    output sample touches.

    Args:
        values: (z, y, x) array of any real or bool type.
        weights: three matrices (output, input).
        clip: limits applied to the values before they are resampled.
    """
    along_z, along_y, along_x = weights
    rows, columns = _touched(along_y), _touched(along_x)
    left, right = along_y[:, rows], np.ascontiguousarray(along_x[:, columns].T)
    planes = _touched(along_z)
    reduced = np.empty((planes.stop - planes.start, left.shape[0], right.shape[1]), np.float32)
    for target, plane in enumerate(range(planes.start, planes.stop)):
        piece = values[plane, rows, columns].astype(np.float32)
        if clip is not None:
            np.clip(piece, *clip, out=piece)
        # The cheaper order first: the intermediate is (rows, output x) or (output y, columns).
        reduced[target] = left @ (piece @ right)
    flat = along_z[:, planes] @ reduced.reshape(reduced.shape[0], -1)
    return flat.reshape(along_z.shape[0], *reduced.shape[1:])


def _touched(weights: np.ndarray) -> slice:
    """The range of inputs with any weight."""
    used = np.flatnonzero(weights.any(axis=0))
    return slice(int(used[0]), int(used[-1]) + 1) if used.size else slice(0, 1)
