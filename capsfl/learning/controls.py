"""Controls that need no network, and what they score: the rows every result is printed beside."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from capsfl.ct.normalize import lung_mask
from capsfl.learning.logistic import LogisticModel, fit_logistic
from capsfl.learning.masks import dice
from capsfl.learning.patients import Patient

DENSE_HU = -700.0
"""Aerated lung is below this; ground glass, consolidation, vessels and walls are above it."""

CANDIDATES_HU = (-1024, *range(-800, -199, 50))
"""Thresholds tried on the training patients; the lowest one marks the whole lung."""


def segment_by_threshold(patient: Patient, threshold_hu: float) -> np.ndarray:
    """Marks every lung voxel at or above a threshold, `(z, y, x)` bool."""
    return lung_mask(patient.hu, patient.spacing_mm) & (patient.hu >= threshold_hu)


def fit_threshold(patients: Sequence[Patient], candidates: Sequence[float] = CANDIDATES_HU) -> float:
    """Returns the threshold in HU with the best mean Dice over patients that have a mask: the fairest control."""
    lungs = [(lung_mask(p.hu, p.spacing_mm), p.hu, p.truth) for p in patients if p.truth is not None and p.truth.any()]
    if not lungs:
        return DENSE_HU
    means = [np.mean([dice(lung & (hu >= t), truth) for lung, hu, truth in lungs]) for t in candidates]
    return float(candidates[int(np.argmax(means))])


def dense_lung_fraction(patient: Patient, threshold_hu: float = DENSE_HU) -> float:
    """Share of the lung, in [0, 1], that is denser than aerated lung: a classifier of one number."""
    lung = lung_mask(patient.hu, patient.spacing_mm)
    return float(np.mean(patient.hu[lung] >= threshold_hu)) if lung.any() else 0.0


LEAKS = ("height", "width", "aspect", "mean", "high frequencies")
"""What pictures give away beside anatomy: how large the file was, how bright and how sharp it is."""


def leak_features(patient: Patient) -> np.ndarray:
    """Numbers of each of a patient's pictures that say nothing of the lung, `(pictures, 5)`, in the order of `LEAKS`.

    Height and width in pixels before the importer resized it, width over height; mean grey value in [0, 1], and the
    mean square of what a 3 x 3 mean takes away, both of the picture that the importer yields.
    """
    assert patient.pictures is not None
    grey = patient.pictures.pixels.astype(np.float64) / 255
    height, width = patient.pictures.original_sizes.astype(np.float64).T
    detail = grey - np.stack([ndimage.uniform_filter(picture, 3) for picture in grey])
    return np.stack(
        [height, width, width / height, grey.mean(axis=(1, 2)), np.square(detail).mean(axis=(1, 2))], axis=1
    )


def fit_leak(patients: Sequence[Patient], classes: int) -> LogisticModel:
    """Fits a logistic regression on `leak_features` of training patients, each of whom counts once."""
    rows = [leak_features(patient) for patient in patients]
    labels = np.concatenate([np.full(len(row), patient.label) for row, patient in zip(rows, patients, strict=True)])
    weights = np.concatenate([np.full(len(row), 1 / len(row)) for row in rows])
    return fit_logistic(np.concatenate(rows), labels, classes=classes, weights=weights)
