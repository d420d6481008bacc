"""How good a run's classification of patients never trained on is, beside the controls that give it a meaning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from capsfl.config import StudyConfig
from capsfl.evaluation.controls import Controls, threshold_of
from capsfl.evaluation.segmentation import Segmented
from capsfl.learning import metrics, multiclass
from capsfl.learning.classification import ClassificationConfig, Classifier, images_of
from capsfl.learning.logistic import fit_logistic
from capsfl.learning.patients import Patient, people_of
from capsfl.learning.tasks import trainable
from capsfl.study import Split

Judged = tuple[tuple[Patient, np.ndarray], ...]
"""Patients whose label is known, each with its class probabilities `(classes,)`."""


class Images:
    """The images of patients that a run's classifier sees: pictures, slices, or slices that its segmentation masks."""

    def __init__(self, config: ClassificationConfig, scans: Segmented | None) -> None:
        self._config = config
        self._scans = scans

    def of(self, patient: Patient) -> np.ndarray:
        """The images of one patient, `(images, side, side, 1)` in [0, 1]."""
        probability = None if self._scans is None or patient.pictures is not None else self._scans.fused(patient)
        return images_of(patient, self._config, probability=probability)

    def records(self, patient: Patient) -> dict[str, np.ndarray]:
        """The records of one patient: images, and the patient's label for each."""
        images = self.of(patient)
        return {"image": images, "label": np.full(len(images), patient.label, np.int32)}


@dataclass(frozen=True)
class Classified:
    """What a trained classifier says.

    Attributes:
        validation: of the patients that the threshold is chosen on.
        test: of the patients that it is judged by.
        probe: how well a linear model tells the scanner from the last layer's input; None where not asked.
        parameters: number of trained weights.
    """

    validation: Judged
    test: Judged
    probe: dict[str, Any] | None
    parameters: int


def classify(
    classifier: Classifier,
    weights: Any,
    own: Mapping[str, Any],
    images: Images,
    split: Split,
    *,
    probe: bool,
) -> Classified:
    """Judges every labelled validation and test patient, and probes for the scanner.

    Args:
        classifier: the network.
        weights: the server's.
        own: by hospital, the weights that its patients are judged with instead; see `rounds.batch_norm`.
        images: of the patients.
        split: whom to judge; the probe also sees training patients.
        probe: whether to probe.
    """

    def part(patients: Sequence[Patient]) -> Judged:
        return tuple(
            (p, classifier.judge(classifier.probabilities(own.get(p.hospital, weights), images.of(p))))
            for p in patients
            if p.label is not None
        )

    found = probe_scanner(classifier, weights, images, split) if probe else None
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable(weights)))
    return Classified(part(split.validation), part(split.test), found, count)


def probe_scanner(classifier: Classifier, weights: Any, images: Images, split: Split) -> dict[str, Any] | None:
    """Asks how well the scanner, or where none is known the hospital, shows in what the last layer sees.

    A logistic regression on the mean over a patient's images, fitted on training patients and scored on test patients;
    a classifier whose features tell scanners apart may be judging them. None with fewer than two to tell apart.
    """
    by = "scanner" if all(p.scanner for p in (*split.train, *split.test)) else "hospital"
    names = sorted({getattr(p, by) for p in split.train})
    test = [p for p in split.test if getattr(p, by) in names]
    if len(names) < 2 or len({getattr(p, by) for p in test}) < 2:
        return None

    def features(patients: Sequence[Patient]) -> np.ndarray:
        return np.stack([classifier.features(weights, images.of(p)).mean(axis=0) for p in patients])

    def labels(patients: Sequence[Patient]) -> np.ndarray:
        return np.array([names.index(getattr(p, by)) for p in patients])

    model = fit_logistic(features(split.train), labels(split.train), classes=len(names))
    called, truth = model.probabilities(features(test)).argmax(axis=1), labels(test)
    interval = metrics.bootstrap_interval(metrics.mean_recall, called, truth, patients=people_of(test), resamples=1000)
    low, high = interval or (None, None)
    return {
        "of": by,
        "classes": len(names),
        "balanced_accuracy": metrics.mean_recall(called, truth),
        "balanced_accuracy_low": low,
        "balanced_accuracy_high": high,
        "chance": 1 / len(np.unique(truth)),
        "patients": len(test),
    }


def classification_results(found: Classified, controls: Controls, config: StudyConfig) -> dict[str, Any]:
    """What the page says about the classification of one run, as JSON values."""
    assert config.classification is not None
    classes = config.classification.num_classes
    patients = [p for p, _ in found.test]
    probabilities = np.stack([row for _, row in found.test])
    scores = 1 - probabilities[:, 0]
    labels = np.array([int(p.label or 0) for p in patients])
    threshold = threshold_of([(p, float(1 - row[0])) for p, row in found.validation])
    people = people_of(patients)
    judge = (_TwoClasses if classes == 2 else _ManyClasses)(labels, people, config.seed)
    overall = judge.row(probabilities, threshold, hospitals=np.array([p.hospital for p in patients]))
    rows: dict[str, Any] = {
        "always positive": judge.always_positive(classes),
        "permuted labels": judge.permuted(probabilities, threshold),
    }
    for name, control in controls.classification.items():
        of_test = np.stack([control.probabilities[p.key] for p in patients])
        rows[name] = judge.row(of_test, control.threshold)
        rows[name] |= judge.calibration(of_test) if control.calibrated else {}
    curve = metrics.roc_curve(scores, labels > 0)
    return {
        "hospitals": overall.pop("hospitals"),
        "overall": overall | judge.calibration(probabilities),
        "controls": rows,
        "auc_interval": "newcombe",
        "scanner": found.probe,
        "network": config.classification.model.name,
        "parameters": found.parameters,
        "roc": None
        if curve is None
        else {
            "false_positive_rate": [float(v) for v in curve.false_positive_rate],
            "true_positive_rate": [float(v) for v in curve.true_positive_rate],
        },
        "scores": [
            {"patient": p.name, "hospital": p.hospital, "label": p.label, "score": float(score)}
            | ({"person": p.person} if p.person else {})
            | ({"probabilities": [float(v) for v in row]} if classes > 2 else {})
            for p, score, row in zip(patients, scores, probabilities, strict=True)
        ],
    }


class _TwoClasses:
    """Rows of a table about disease or none; the score is the probability of class 1."""

    def __init__(self, labels: np.ndarray, people: np.ndarray | None, seed: int) -> None:
        self._labels, self._people, self._seed = labels > 0, people, seed

    def row(self, probabilities: np.ndarray, threshold: float, hospitals: np.ndarray | None = None) -> dict[str, Any]:
        return metrics.classification_report(
            1 - probabilities[:, 0], self._labels, threshold, hospitals, people=self._people
        )

    def always_positive(self, classes: int) -> dict[str, Any]:
        return metrics.always_positive_row(self._labels)

    def permuted(self, probabilities: np.ndarray, threshold: float) -> dict[str, Any]:
        return metrics.permuted_labels_row(
            1 - probabilities[:, 0], self._labels, seed=self._seed, threshold=threshold, people=self._people
        )

    def calibration(self, probabilities: np.ndarray) -> dict[str, float]:
        return metrics.calibration(np.clip(1 - probabilities[:, 0], 0, 1), self._labels)


class _ManyClasses:
    """Rows of a table about several classes."""

    def __init__(self, labels: np.ndarray, people: np.ndarray | None, seed: int) -> None:
        self._labels, self._people, self._seed = labels, people, seed

    def row(self, probabilities: np.ndarray, threshold: float, hospitals: np.ndarray | None = None) -> dict[str, Any]:
        return multiclass.multiclass_report(probabilities, self._labels, threshold, hospitals, people=self._people)

    def always_positive(self, classes: int) -> dict[str, Any]:
        return multiclass.most_frequent_row(self._labels, classes)

    def permuted(self, probabilities: np.ndarray, threshold: float) -> dict[str, Any]:
        return multiclass.permuted_rows(
            probabilities, self._labels, threshold=threshold, seed=self._seed, people=self._people
        )

    def calibration(self, probabilities: np.ndarray) -> dict[str, float]:
        return multiclass.calibration(probabilities, self._labels)
