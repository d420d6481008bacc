"""What marks lungs and tumours without a network: the rows that networks are printed beside."""

import numpy as np

from capsfl.bench.segmenter_data import Fold
from capsfl.ct.lungs import lung_mask
from capsfl.ct.normalize import window
from capsfl.learning.patients import Patient

INTENSITIES = np.linspace(-0.5, 0.45, 20)
"""Least intensities tried, of the window from -0.5 to 0.5."""


def mark_lungs(fold: Fold) -> list[np.ndarray]:
    """Marks lungs by threshold and connectivity, see `capsfl.ct.lungs`; nothing is learned."""
    return [lung_mask(case.hu, case.spacing_mm) for case in fold.test]


def mark_middle(fold: Fold) -> list[np.ndarray]:
    """Marks what is dense enough in a disc in the middle, its radius and the least intensity fitted to training.

    The patches were cut around tumours, so that the middle alone tells much: a network has to beat this.
    """
    radius, least = fit_middle(fold.train)
    return [_middle(case, radius, least) for case in fold.test]


def fit_middle(cases: tuple[Patient, ...]) -> tuple[float, float]:
    """Returns the radius in pixels and the least intensity of the highest mean Dice on single slices with masks."""
    images = np.concatenate([window(case.hu) for case in cases])
    truths = np.concatenate([case.truth for case in cases if case.truth is not None])
    distance = _distance(images.shape[1:])
    best = (-1.0, 0.0, 0.0)
    sizes = truths.sum(axis=(1, 2))
    for radius in np.arange(1.0, max(images.shape[1:]) / 2 + 1):
        disc = distance <= radius
        inside, true = images[:, disc], truths[:, disc]
        for least in INTENSITIES:
            marked = inside >= least
            total = marked.sum(axis=1) + sizes
            dices = np.where(total, 2 * np.sum(marked & true, axis=1) / np.maximum(total, 1), 1.0)
            best = max(best, (float(dices.mean()), float(radius), float(least)))
    return best[1], best[2]


def _middle(case: Patient, radius: float, least: float) -> np.ndarray:
    return (window(case.hu) >= least) & (_distance(case.hu.shape[1:]) <= radius)[None]


def _distance(shape: tuple[int, ...]) -> np.ndarray:
    """Pixels from the middle, `(height, width)`."""
    rows, columns = (np.arange(size) - (size - 1) / 2 for size in shape)
    return np.hypot(rows[:, None], columns[None, :])
