"""How well a mask meets the truth: overlap, distance of the surfaces, error of the volume."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage


def dice(prediction: np.ndarray, truth: np.ndarray, *, missed: int = 0) -> float:
    """Return the Dice coefficient of two masks (Dice 1945); 1 where both are empty, 0 where one is.

    Args:
        prediction: mask.
        truth: mask of the same shape.
        missed: voxels of the truth that lie outside both arrays, false negatives whatever is predicted.

    Raises:
        ValueError: if the shapes differ.
    """
    prediction, truth = _masks(prediction, truth)
    total = int(prediction.sum()) + int(truth.sum()) + missed
    return 2 * int(np.sum(prediction & truth)) / total if total else 1.0


def hd95_mm(prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Return the 95th percentile Hausdorff distance between the surfaces of two masks, in mm.

    The larger of the two directed 95th percentiles; a surface voxel has a background face neighbour or lies
    at the border. 0 where both masks are empty; where one is, the diagonal of the volume (as in the BraTS
    challenge), so that a missed lesion is not left out of a mean.

    Args:
        prediction: mask.
        truth: mask of the same shape.
        spacing_mm: spacing along each axis, in mm.

    Raises:
        ValueError: if the shapes differ or the spacing does not fit them.
    """
    prediction, truth = _masks(prediction, truth)
    if len(spacing_mm) != truth.ndim or min(spacing_mm) <= 0:
        raise ValueError(f"spacing_mm {tuple(spacing_mm)}: expected {truth.ndim} positive distances")
    if not prediction.any() and not truth.any():
        return 0.0
    if not prediction.any() or not truth.any():
        return float(np.linalg.norm(np.multiply(truth.shape, spacing_mm)))
    return max(
        _directed_percentile(prediction, truth, spacing_mm),
        _directed_percentile(truth, prediction, spacing_mm),
    )


def volume_error_ml(prediction: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Return the predicted minus the true volume of a lesion mask, in millilitres."""
    prediction, truth = _masks(prediction, truth)
    return (int(prediction.sum()) - int(truth.sum())) * float(np.prod(spacing_mm)) / 1000


def _directed_percentile(source: np.ndarray, target: np.ndarray, spacing_mm: Sequence[float]) -> float:
    distances = ndimage.distance_transform_edt(~_surface(target), sampling=spacing_mm)
    return float(np.percentile(np.asarray(distances)[_surface(source)], 95))


def _surface(mask: np.ndarray) -> np.ndarray:
    return mask & np.logical_not(ndimage.binary_erosion(mask))


def _masks(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    return prediction.astype(bool), truth.astype(bool)
