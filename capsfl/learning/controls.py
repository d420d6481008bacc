"""Controls that train nothing, and what they score: the rows every result is printed beside."""

from collections.abc import Sequence

import numpy as np

from capsfl.ct.normalize import lung_mask
from capsfl.learning.metrics import dice
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
