"""Judging scores on the host: every figure a result table prints, and the control rows beside it.

A positive call is `score >= threshold`. A figure that the data leave undefined (the AUC of one class, the
precision of no calls) is None, never a number that could be mistaken for a result.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, rankdata

_RESAMPLES = 2000
_PERMUTATIONS = 1000
_CONFIDENCE = 0.95
_CALIBRATED_DRAWS = 300
_EDGE = 1e-9
_MOST_BINS = 100


class Confusion(NamedTuple):
    """Counts of calls against labels."""

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int


class RocCurve(NamedTuple):
    """The receiver operating characteristic, from (0, 0) to (1, 1), thresholds falling from infinity."""

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    thresholds: np.ndarray


def confusion(scores: np.ndarray, labels: np.ndarray, threshold: float) -> Confusion:
    """Count the calls `score >= threshold` against the labels."""
    scores, labels = _scored(scores, labels)
    calls = scores >= threshold
    return Confusion(
        true_positives=int(np.sum(calls & labels)),
        false_positives=int(np.sum(calls & ~labels)),
        true_negatives=int(np.sum(~calls & ~labels)),
        false_negatives=int(np.sum(~calls & labels)),
    )


def sensitivity(scores: np.ndarray, labels: np.ndarray, threshold: float) -> float | None:
    """Return the share of positives that are called, None without positives."""
    counts = confusion(scores, labels, threshold)
    return _ratio(counts.true_positives, counts.true_positives + counts.false_negatives)


def specificity(scores: np.ndarray, labels: np.ndarray, threshold: float) -> float | None:
    """Return the share of negatives that are not called, None without negatives."""
    counts = confusion(scores, labels, threshold)
    return _ratio(counts.true_negatives, counts.true_negatives + counts.false_positives)


def precision(scores: np.ndarray, labels: np.ndarray, threshold: float) -> float | None:
    """Return the share of calls that are positive, None without calls."""
    counts = confusion(scores, labels, threshold)
    return _ratio(counts.true_positives, counts.true_positives + counts.false_positives)


def balanced_accuracy(scores: np.ndarray, labels: np.ndarray, threshold: float) -> float | None:
    """Return the mean of sensitivity and specificity, None unless both are defined."""
    on_positives = sensitivity(scores, labels, threshold)
    on_negatives = specificity(scores, labels, threshold)
    if on_positives is None or on_negatives is None:
        return None
    return (on_positives + on_negatives) / 2


def accuracy(scores: np.ndarray, labels: np.ndarray, threshold: float) -> float:
    """Return the share of patients that are called rightly; what the larger class alone can earn."""
    counts = confusion(scores, labels, threshold)
    return (counts.true_positives + counts.true_negatives) / sum(counts)


def threshold_figures(scores: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, float | None]:
    """Return all figures of a table row that one threshold decides."""
    return {
        "accuracy": accuracy(scores, labels, threshold),
        "balanced_accuracy": balanced_accuracy(scores, labels, threshold),
        "sensitivity": sensitivity(scores, labels, threshold),
        "specificity": specificity(scores, labels, threshold),
        "precision": precision(scores, labels, threshold),
    }


def mean_recall(called: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean over the classes that occur of the share of their members that are called right."""
    return float(np.mean([np.mean(called[truth == k] == k) for k in np.unique(truth)]))


def auc(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """Return the area under the ROC curve, None unless both classes are present.

    The Mann-Whitney statistic: the chance that a positive scores higher than a negative, ties counting half.
    """
    scores, labels = _scored(scores, labels)
    return _auc_of_ranks(rankdata(scores), labels)


def roc_curve(scores: np.ndarray, labels: np.ndarray) -> RocCurve | None:
    """Return the origin and a point per distinct score, None unless both classes are present."""
    scores, labels = _scored(scores, labels)
    positives = int(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        return None
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last_of_ties = np.append(np.flatnonzero(np.diff(ordered)), labels.size - 1)
    true_positives = np.cumsum(labels[order])[last_of_ties]
    false_positives = last_of_ties + 1 - true_positives
    return RocCurve(
        np.append(0.0, false_positives / negatives),
        np.append(0.0, true_positives / positives),
        np.append(np.inf, ordered[last_of_ties]),
    )


def threshold_for_sensitivity(scores: np.ndarray, labels: np.ndarray, target: float = 0.9) -> float:
    """Return the highest threshold at which sensitivity reaches the target.

    Choose it on validation patients, then judge others with it: on the patients it was chosen on, the
    specificity is flattered.

    Raises:
        ValueError: if there are no positives or the target is not in (0, 1].
    """
    scores, labels = _scored(scores, labels)
    if not 0 < target <= 1:
        raise ValueError(f"target {target}: a sensitivity lies in (0, 1]")
    if not labels.any():
        raise ValueError("no positive labels; a sensitivity needs at least one positive patient")
    falling = np.sort(scores[labels])[::-1]
    # The guard against rounding: 0.9 * 10 must ask for 9 positives, not 10.
    needed = int(np.ceil(target * falling.size - 1e-9))
    return float(falling[needed - 1])


def bootstrap_interval(
    statistic: Callable[..., float | None],
    *arrays: np.ndarray,
    patients: Sequence[Any] | np.ndarray | None = None,
    seed: int = 0,
    resamples: int = _RESAMPLES,
    confidence: float = _CONFIDENCE,
) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of a statistic, drawn by patient (Efron 1979).

    Patients are drawn with replacement and bring all their rows, since rows of one patient are not
    independent. Draws that leave the statistic undefined are left out; None if every draw does.

    Args:
        statistic: maps the arrays to a number, or None where undefined.
        *arrays: rows along axis 0.
        patients: the patient of each row, or None if each row is a patient.
        seed: of the draws.
        resamples: number of draws.
        confidence: share of the draws inside the interval.

    Raises:
        ValueError: if the arrays differ in length or are empty.
    """
    rows = len(arrays[0])
    if rows == 0 or any(len(array) != rows for array in arrays) or (patients is not None and len(patients) != rows):
        raise ValueError(f"rows {[len(array) for array in arrays]}: expected equal numbers, at least one")
    if patients is None:
        groups = [np.array([row]) for row in range(rows)]
    else:
        names = np.unique(np.asarray(patients), return_inverse=True)[1]
        groups = [np.flatnonzero(names == name) for name in range(names.max() + 1)]
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        chosen = np.concatenate([groups[index] for index in generator.integers(len(groups), size=len(groups))])
        value = statistic(*(array[chosen] for array in arrays))
        if value is not None:
            drawn.append(value)
    if not drawn:
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def auc_interval(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    patients: Sequence[Any] | np.ndarray | None = None,
    confidence: float = _CONFIDENCE,
) -> tuple[float, float] | None:
    """Return an interval for the AUC over patients, see `newcombe_interval`; None unless both classes are present.

    Scans of one patient are not independent, so patients are what counts, each once in every class it has a scan of.
    A score that is the same for everybody has an AUC of 1/2 whoever the patients are, and an interval of no width.
    """
    scores, labels = _scored(scores, labels)
    area = auc(scores, labels)
    if area is None:
        return None
    if np.ptp(scores) == 0:
        return area, area
    positives, negatives = count_by_class(labels, patients)
    return newcombe_interval(area, positives, negatives, confidence=confidence)


def newcombe_interval(
    area: float, positives: int, negatives: int, *, confidence: float = _CONFIDENCE
) -> tuple[float, float]:
    """Return the score interval of an AUC of so many independent positives and negatives (Newcombe 2006, method 5).

    It holds every AUC that lies within z standard errors of the one observed, the error being that of the AUC asked
    about: Hanley & McNeil's (1982) formula with the mean of both numbers in the place of each. It is continuous in the
    AUC: at 0 and 1 it does not shrink to a point, as percentiles of a bootstrap do, nor is it wider there than just
    beside. Statistics in Medicine 25:559-573.
    """
    z = float(norm.ppf((1 + confidence) / 2))
    others = (positives + negatives) / 2 - 1

    def outside(asked: float) -> float:
        spread = 1 + others * ((1 - asked) / (2 - asked) + asked / (1 + asked))
        return (area - asked) ** 2 - z**2 * asked * (1 - asked) * spread / (positives * negatives)

    # At the very ends the error is 0, and an AUC observed there would be a root beside the one looked for.
    low: Any = brentq(outside, 0.0, min(area, 1 - _EDGE)) if area > 0 else 0.0
    high: Any = brentq(outside, max(area, _EDGE), 1.0) if area < 1 else 1.0
    return float(low), float(high)


def count_by_class(labels: np.ndarray, patients: Sequence[Any] | np.ndarray | None = None) -> tuple[int, int]:
    """Return how many patients have a positive row and how many a negative one; every row is one where None."""
    labels = np.asarray(labels, bool)
    whose = np.arange(labels.size) if patients is None else np.unique(np.asarray(patients), return_inverse=True)[1]
    return len(np.unique(whose[labels])), len(np.unique(whose[~labels]))


def classification_report(
    scores: np.ndarray,
    labels: np.ndarray,
    threshold: float,
    hospitals: Sequence[str] | np.ndarray | None = None,
    *,
    people: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return the figures of one table row; each score is one patient.

    Keys: auc, auc_low, auc_high (95 %, see `auc_interval`), accuracy, balanced_accuracy, sensitivity,
    specificity, precision, threshold, patients, positives; and with `hospitals` (the hospital of each patient) a
    dict of such rows under "hospitals". Undefined figures are None. With `people`, a number for whose each score is,
    intervals count people and not their scans.

    Raises:
        ValueError: if lengths differ or a score is not finite.
    """
    scores, labels = _scored(scores, labels)
    interval = auc_interval(scores, labels, patients=people)
    report: dict[str, Any] = {
        "auc": auc(scores, labels),
        "auc_low": None if interval is None else interval[0],
        "auc_high": None if interval is None else interval[1],
        **threshold_figures(scores, labels, threshold),
        "threshold": float(threshold),
        "patients": int(labels.size),
        "positives": int(labels.sum()),
    }
    if hospitals is not None:
        names = np.asarray(hospitals)
        if names.shape != labels.shape:
            raise ValueError(f"hospitals {names.shape} do not fit labels {labels.shape}; name one per patient")
        report["hospitals"] = {
            str(name): classification_report(
                scores[names == name],
                labels[names == name],
                threshold,
                people=None if people is None else people[names == name],
            )
            for name in np.unique(names)
        }
    return report


def always_positive_row(labels: np.ndarray) -> dict[str, Any]:
    """Return the report of the classifier that calls every patient positive, the first control of a table."""
    return classification_report(np.ones(len(labels)), labels, threshold=1.0)


def permuted_labels_row(
    scores: np.ndarray,
    labels: np.ndarray,
    seed: int = 0,
    *,
    threshold: float = 0.5,
    people: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return the mean report of the same scores against shuffled labels, the second control of a table.

    Means over 1,000 permutations; auc_low and auc_high hold 95 % of the permuted AUCs, so a model whose AUC
    lies between them has shown nothing. With `people` labels are shuffled between them and not between scans.
    """
    scores, labels = _scored(scores, labels)
    ranks = rankdata(scores)

    def figures(shuffled: np.ndarray) -> dict[str, float | None]:
        return {"auc": _auc_of_ranks(ranks, shuffled), **threshold_figures(scores, shuffled, threshold)}

    return {
        **permuted_means(figures, labels, permutations=_PERMUTATIONS, seed=seed, people=people),
        "threshold": float(threshold),
        "patients": int(labels.size),
        "positives": int(labels.sum()),
    }


def permuted_means(
    figures: Callable[[np.ndarray], Mapping[str, float | None]],
    labels: np.ndarray,
    *,
    permutations: int,
    seed: int,
    people: np.ndarray | None = None,
) -> dict[str, float | None]:
    """Return the means of a row's figures over shuffled labels, and what holds 95 % of the AUCs.

    Args:
        figures: maps labels to a row with the key "auc".
        labels: to be shuffled.
        permutations: number of them.
        seed: of the shuffling.
        people: a number for whose each row is: a person's rows stay together, all with another person's first label.
    """
    generator = np.random.default_rng(seed)
    whose = np.arange(labels.size) if people is None else np.unique(people, return_inverse=True)[1]
    first = labels[np.unique(whose, return_index=True)[1]]
    rows = [figures(generator.permutation(first)[whose]) for _ in range(permutations)]
    known = {key: [value for row in rows if (value := row[key]) is not None] for key in rows[0]}
    means = {key: float(np.mean(values)) if values else None for key, values in known.items()}
    low, high = map(float, np.quantile(known["auc"], (0.025, 0.975))) if known["auc"] else (None, None)
    return {"auc": means["auc"], "auc_low": low, "auc_high": high, **means}


def brier(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean squared difference between probability and outcome (Brier 1950); 0 is perfect."""
    probabilities, labels = _scored(probabilities, labels)
    return float(np.mean(np.square(probabilities - labels)))


def ece(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error of a probability of the positive class (Naeini et al. 2015).

    Over bins of equally many patients, the mean gap between the mean probability and the share of positives, weighted
    by the number of patients in the bin. There are as many bins, up to 100, as leave the shares rising from bin to bin
    (Roelofs et al. 2022, arXiv:2012.08668, ECE_sweep): of few patients that is far less biased than a fixed number of
    bins of equal width, most of which then hold a patient or two. Patients of equal probability count as one average
    patient.

    Raises:
        ValueError: if a probability lies outside [0, 1].
    """
    probabilities, labels = _scored(probabilities, labels)
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise ValueError(f"probabilities in [{probabilities.min():g}, {probabilities.max():g}]: expected [0, 1]")
    values, whose, counts = np.unique(probabilities, return_inverse=True, return_counts=True)
    return _swept_ece(np.repeat(values, counts), np.repeat(np.bincount(whose, labels) / counts, counts))


def _swept_ece(probabilities: np.ndarray, shares: np.ndarray) -> float:
    """`ece` of sorted probabilities and the share of positives among the patients of each."""
    count = probabilities.size
    positives, expected = (np.append(0.0, np.cumsum(each)) for each in (shares, probabilities))
    edges = np.array([0, count])
    for bins in range(2, min(len(np.unique(probabilities)), _MOST_BINS) + 1):
        finer = np.arange(bins + 1) * count // bins
        if np.any(np.diff(np.diff(positives[finer]) / np.diff(finer)) < -1e-12):
            break
        edges = finer
    return float(np.abs(np.diff((expected - positives)[edges])).sum() / count)


def ece_of_chance(probabilities: np.ndarray, *, seed: int = 0, draws: int = _CALIBRATED_DRAWS) -> float:
    """Return what `ece` stays below in 95 % of the cases where the probabilities are right.

    Outcomes are drawn from the probabilities themselves (consistency resampling: Bröcker & Smith 2007, Weather and
    Forecasting 22:651-661): an error below this shows nothing but how few the patients are.
    """
    generator = np.random.default_rng(seed)
    ordered = np.sort(np.asarray(probabilities, np.float64))
    found = [ece(ordered, generator.uniform(size=ordered.size) < ordered) for _ in range(draws)]
    return float(np.quantile(found, _CONFIDENCE))


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return `brier`, and `calibration_error`, of a probability of the positive class."""
    return {"brier": brier(probabilities, labels), **calibration_error(probabilities, labels)}


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return `ece`, and as "ece_chance" what `ece_of_chance` says about the same probabilities."""
    return {"ece": ece(probabilities, labels), "ece_chance": ece_of_chance(probabilities)}


def _auc_of_ranks(ranks: np.ndarray, labels: np.ndarray) -> float | None:
    positives = int(labels.sum())
    negatives = labels.size - positives
    if not positives or not negatives:
        return None
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _scored(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores = np.asarray(scores, np.float64)
    labels = np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape or not scores.size:
        raise ValueError(f"scores {scores.shape} and labels {labels.shape}: expected one of each per patient")
    if not np.isfinite(scores).all():
        raise ValueError(f"scores: {int(np.sum(~np.isfinite(scores)))} of {scores.size} are not finite")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"labels {np.unique(labels).tolist()}: expected 0 and 1")
    return scores, labels.astype(bool)


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
