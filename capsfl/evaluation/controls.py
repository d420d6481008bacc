"""Controls of a study: figures that need no network, computed once for all arms."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from capsfl.config import StudyConfig
from capsfl.learning import controls as untrained
from capsfl.learning import metrics
from capsfl.learning.classification import judge
from capsfl.learning.logistic import fit_logistic
from capsfl.learning.masks import dice
from capsfl.learning.patients import Patient
from capsfl.study import Split

TARGET_SENSITIVITY = 0.9
"""Sensitivity on validation patients that every operating point is chosen for."""


@dataclass(frozen=True)
class ThresholdControl:
    """Segmentation by one threshold in the lung: its HU, and the Dice of every test patient with a mask."""

    hu: float
    dice: Mapping[str, float]


@dataclass(frozen=True)
class ScoreControl:
    """A classifier without a network.

    Attributes:
        probabilities: by patient, `(classes,)`.
        threshold: on the probability of not being of class 0, chosen on validation patients.
        calibrated: whether these are meant as probabilities; a share of the lung is not.
    """

    probabilities: Mapping[str, np.ndarray]
    threshold: float
    calibrated: bool


@dataclass(frozen=True)
class Controls:
    """The controls of a study, by what they are rows beside."""

    segmentation: ThresholdControl | None
    classification: Mapping[str, ScoreControl]


def score_controls(split: Split, config: StudyConfig) -> Controls:
    """Scores what needs no network: the HU threshold, the dense-lung fraction, and what pictures give away."""
    segmentation, classification = None, {}
    if config.segmentation is not None:
        hu = untrained.fit_threshold(split.train)
        dices = {
            p.key: dice(untrained.segment_by_threshold(p, hu), p.truth, missed=p.truth_outside)
            for p in split.test
            if p.truth is not None and p.is_marked
        }
        segmentation = ThresholdControl(hu, dices)
    if config.classification is not None:
        classes, top = config.classification.num_classes, config.classification.top_slices
        judged = [p for p in (*split.validation, *split.test) if p.label is not None]
        learners = [p for p in split.train if p.label is not None]
        if all(p.pictures is None for p in (*learners, *judged)):
            found = _by_dense_lung(learners, judged, classes)
            classification["dense lung fraction"] = _score(found, split, calibrated=classes > 2)
        if all(p.pictures is not None for p in (*learners, *judged)):
            model = untrained.fit_leak(learners, classes)
            found = {p.key: judge(model.probabilities(untrained.leak_features(p)), top) for p in judged}
            classification["size and sharpness"] = _score(found, split, calibrated=True)
    return Controls(segmentation, classification)


def _by_dense_lung(learners: Sequence[Patient], judged: Sequence[Patient], classes: int) -> dict[str, np.ndarray]:
    """The share of dense lung itself as the score of two classes; of more, a logistic regression on it."""
    fractions = {p.key: untrained.dense_lung_fraction(p) for p in judged}
    if classes == 2:
        return {key: np.array([1 - fraction, fraction]) for key, fraction in fractions.items()}
    features = np.array([[untrained.dense_lung_fraction(p)] for p in learners])
    model = fit_logistic(features, np.array([p.label for p in learners]), classes=classes)
    return {key: model.probabilities(np.array([[fraction]]))[0] for key, fraction in fractions.items()}


def threshold_of(scored: Sequence[tuple[Patient, float]], *, otherwise: float = 0.5) -> float:
    """The threshold that finds 90 % of the positives among these patients; `otherwise` where there are none."""
    labels = np.array([int(patient.label or 0) > 0 for patient, _ in scored], bool)
    if not labels.any():
        return otherwise
    scores = np.array([score for _, score in scored])
    return metrics.threshold_for_sensitivity(scores, labels, target=TARGET_SENSITIVITY)


def _score(found: Mapping[str, np.ndarray], split: Split, *, calibrated: bool) -> ScoreControl:
    cut = threshold_of([(p, 1 - found[p.key][0]) for p in split.validation if p.key in found])
    return ScoreControl(found, cut, calibrated)
