"""One classifier against others on the same patients: differences of AUC, with intervals that know they are the same.

Intervals of two AUC may overlap although one classifier is better for nearly every draw of patients, since hard
patients are hard for both. Drawing patients, and asking all classifiers about the drawn ones, keeps that apart.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """An AUC minus another one, and its interval."""

    value: float
    low: float
    high: float


def auc_differences(
    first: np.ndarray,
    others: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    people: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> dict[str, Difference]:
    """Return the AUC of one classifier minus that of each other one, with simultaneous intervals.

    Patients are drawn with replacement and bring all their scans (Efron 1979), the same for every classifier; an AUC is
    the Mann-Whitney statistic, ties counting half, weighted by how often a patient was drawn. Of more than two classes
    it is the mean of each against the rest. Draws that lack a class are left out.

    Of thirteen comparisons at 95 % each, one in two studies has one that is wrong. So the intervals hold together: each
    reaches as many of its own bootstrap deviations as the largest studentized deviation of all comparisons keeps below
    in 95 % of the draws (the max-T method, Westfall & Young 1993).

    Args:
        first: `(scans, classes)` probabilities.
        others: the same scans' by the other classifiers, by name.
        labels: `(scans,)` integers from 0 to classes - 1.
        people: a number for whose each scan is; None where everybody has one.
        seed: of the draws.
        resamples: number of draws.
        confidence: that all intervals hold.

    Returns:
        By name; without those that no draw of patients tells apart, as where both are perfect.

    Raises:
        ValueError: shapes that do not fit.
    """
    for name, other in others.items():
        if first.ndim != 2 or first.shape != other.shape or labels.shape != first.shape[:1] or not labels.size:
            raise ValueError(f"{name}: probabilities {first.shape} and {other.shape}, labels {labels.shape}")
    whose = np.arange(labels.size) if people is None else np.unique(people, return_inverse=True)[1]
    crowd = int(whose.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(crowd, np.full(crowd, 1 / crowd), size=resamples)
    weights = np.vstack([np.ones(labels.size), drawn[:, whose]])  # first of all, everybody once
    reference = _areas(first, labels, weights)
    found = {name: reference - _areas(other, labels, weights) for name, other in others.items()}
    spread = {name: float(np.nanstd(row[1:])) if not np.isnan(row[0]) else 0.0 for name, row in found.items()}
    told = [name for name in found if spread[name] > 0]
    if not told:
        return {}
    deviations = np.array([np.abs(found[name][1:] - found[name][0]) / spread[name] for name in told]).max(axis=0)
    reach = float(np.nanquantile(deviations, confidence))
    differences = {}
    for name in told:
        value, half = float(found[name][0]), reach * spread[name]
        differences[name] = Difference(value, max(value - half, -1.0), min(value + half, 1.0))
    return differences


def _areas(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The AUC under each row of weights, NaN where a class has none; of several classes the mean."""
    classes = range(probabilities.shape[1]) if probabilities.shape[1] > 2 else (1,)
    return np.mean([_area(probabilities[:, k], labels == k, weights) for k in classes], axis=0)


def _area(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    above, below = scores[positive][:, None], scores[~positive][None, :]
    in_order = (above > below) + 0.5 * (above == below)
    of_positives, of_negatives = weights[:, positive], weights[:, ~positive]
    pairs = of_positives.sum(axis=1) * of_negatives.sum(axis=1)
    won = np.sum((of_positives @ in_order) * of_negatives, axis=1)
    return np.divide(won, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
