"""Figures of a classifier of three classes and more, one row of probabilities a patient.

The AUC is the mean over classes of each class against the rest (Provost & Domingos 2000, unweighted); calls for
accuracy go to the most probable class. A figure that the data leave undefined is None.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from capsfl.learning import metrics

_PERMUTATIONS = 300


def macro_auc(probabilities: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the mean one-vs-rest AUC of `(patients, classes)`, None unless every class is present."""
    areas = [metrics.auc(column, labels == k) for k, column in enumerate(probabilities.T)]
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if len(known) == len(areas) else None


def macro_auc_interval(
    probabilities: np.ndarray, labels: np.ndarray, *, people: np.ndarray | None = None
) -> tuple[float, float] | None:
    """Return a 95 % interval for `macro_auc` over patients; None where that is None.

    That of an AUC of the rarest class against the rest (`metrics.newcombe_interval`), which the mean of all classes is
    known no worse than: it holds the truth more often than in 95 of 100 studies.
    """
    area = macro_auc(probabilities, labels)
    if area is None:
        return None
    if np.all(np.ptp(probabilities, axis=0) == 0):
        return area, area
    counts = [metrics.count_by_class(labels == k, people) for k in range(probabilities.shape[1])]
    return metrics.newcombe_interval(area, *min(counts))


def multiclass_report(
    probabilities: np.ndarray,
    labels: np.ndarray,
    threshold: float,
    hospitals: Sequence[str] | np.ndarray | None = None,
    *,
    people: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return the figures of one table row; each row of probabilities is one patient.

    Keys: auc, auc_low, auc_high (macro); accuracy and balanced_accuracy (the mean of the classes' sensitivities) of the
    most probable class; sensitivity, specificity and precision of "not class 0" at the threshold; threshold, patients,
    positives; "classes", one row per class; and with `hospitals` a dict of such rows under "hospitals".

    Args:
        probabilities: `(patients, classes)`, rows that sum to one.
        labels: `(patients,)` integers from 0 to classes - 1.
        threshold: on `1 - probabilities[:, 0]`.
        hospitals: of each patient.
        people: a number for whose each row is; intervals count people and not their scans.

    Raises:
        ValueError: shapes that do not fit, or a label that is no class.
    """
    probabilities, labels = _checked(probabilities, labels)
    interval = macro_auc_interval(probabilities, labels, people=people)
    ill = metrics.classification_report(1 - probabilities[:, 0], labels > 0, threshold, people=people)
    report: dict[str, Any] = ill | {
        "auc": macro_auc(probabilities, labels),
        "auc_low": None if interval is None else interval[0],
        "auc_high": None if interval is None else interval[1],
        **_calls(probabilities, labels),
        "classes": [_class_row(probabilities, labels, k, people) for k in range(probabilities.shape[1])],
    }
    if hospitals is not None:
        names = np.asarray(hospitals)
        report["hospitals"] = {
            str(name): multiclass_report(
                probabilities[names == name],
                labels[names == name],
                threshold,
                people=None if people is None else people[names == name],
            )
            for name in np.unique(names)
        }
    return report


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the Brier score (Brier 1950, summed over classes) and the expected calibration error of the calls."""
    probabilities, labels = _checked(probabilities, labels)
    truth = np.eye(probabilities.shape[1])[labels]
    called = probabilities.argmax(axis=1)
    confidence = np.clip(probabilities.max(axis=1), 0, 1)
    return {
        "brier": float(np.mean(np.sum(np.square(probabilities - truth), axis=1))),
        **metrics.calibration_error(confidence, called == labels),
    }


def most_frequent_row(labels: np.ndarray, classes: int) -> dict[str, Any]:
    """Return the report of calling every patient ill, of the most frequent class but 0; the first control."""
    labels = np.asarray(labels)
    frequent = 1 + int(np.argmax(np.bincount(labels, minlength=classes)[1:]))
    return multiclass_report(np.eye(classes)[np.full(len(labels), frequent)], labels, threshold=0.5)


def permuted_rows(
    probabilities: np.ndarray,
    labels: np.ndarray,
    *,
    threshold: float,
    seed: int = 0,
    people: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return the mean report of the same probabilities against shuffled labels, the second control.

    auc_low and auc_high hold 95 % of the permuted AUCs. With `people` labels are shuffled between them.
    """
    probabilities, labels = _checked(probabilities, labels)

    def figures(shuffled: np.ndarray) -> dict[str, float | None]:
        ill = metrics.threshold_figures(1 - probabilities[:, 0], shuffled > 0, threshold)
        return {"auc": macro_auc(probabilities, shuffled), **ill, **_calls(probabilities, shuffled)}

    return {
        **metrics.permuted_means(figures, labels, permutations=_PERMUTATIONS, seed=seed, people=people),
        "threshold": float(threshold),
        "patients": int(labels.size),
        "positives": int(np.sum(labels > 0)),
    }


def _calls(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    called = probabilities.argmax(axis=1)
    found = [np.mean(called[labels == k] == k) for k in range(probabilities.shape[1]) if np.any(labels == k)]
    everyone = len(found) == probabilities.shape[1]
    return {
        "accuracy": float(np.mean(called == labels)),
        "balanced_accuracy": float(np.mean(found)) if everyone else None,
    }


def _class_row(probabilities: np.ndarray, labels: np.ndarray, k: int, people: np.ndarray | None) -> dict[str, Any]:
    """One class against the rest; called where it is the most probable one."""
    own, called = labels == k, probabilities.argmax(axis=1) == k
    interval = metrics.auc_interval(probabilities[:, k], own, patients=people)
    return {
        "class": k,
        "auc": metrics.auc(probabilities[:, k], own),
        "auc_low": None if interval is None else interval[0],
        "auc_high": None if interval is None else interval[1],
        **metrics.threshold_figures(called.astype(float), own, 0.5),
        "patients": int(own.sum()),
    }


def _checked(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    probabilities, labels = np.asarray(probabilities, np.float64), np.asarray(labels)
    if probabilities.ndim != 2 or labels.shape != (len(probabilities),) or not labels.size:
        raise ValueError(f"probabilities {probabilities.shape} and labels {labels.shape}: expected a row per label")
    if not np.isin(labels, np.arange(probabilities.shape[1])).all():
        raise ValueError(f"labels {np.unique(labels).tolist()}: expected 0 to {probabilities.shape[1] - 1}")
    return probabilities, labels.astype(int)
