"""Figures of three classes against brute force, against the two-class figures, and at chance."""

import itertools

import numpy as np
import pytest

from capsfl.learning import metrics, multiclass


@pytest.fixture(scope="module")
def patients() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 40)
    evidence = generator.uniform(size=(40, 3)) + 0.6 * np.eye(3)[labels]
    return evidence / evidence.sum(axis=1, keepdims=True), labels


def test_the_macro_auc_is_the_mean_chance_of_ranking_a_member_above_an_outsider(patients):
    probabilities, labels = patients
    areas = []
    for k in range(3):
        column = probabilities[:, k]
        pairs = itertools.product(column[labels == k], column[labels != k])
        areas.append(np.mean([(a > b) + 0.5 * (a == b) for a, b in pairs]))
    assert multiclass.macro_auc(probabilities, labels) == pytest.approx(np.mean(areas))


def test_of_two_classes_it_is_the_auc_itself():
    generator = np.random.default_rng(1)
    scores, labels = generator.uniform(size=30), generator.integers(0, 2, 30)
    probabilities = np.stack([1 - scores, scores], axis=1)
    assert multiclass.macro_auc(probabilities, labels) == pytest.approx(metrics.auc(scores, labels))


def test_a_report_holds_a_row_for_every_class_and_hospital(patients):
    probabilities, labels = patients
    hospitals = np.array(["A", "B"] * 20)
    report = multiclass.multiclass_report(probabilities, labels, 0.5, hospitals)
    called = probabilities.argmax(axis=1)
    recalls = [np.mean(called[labels == k] == k) for k in range(3)]
    assert [row["sensitivity"] for row in report["classes"]] == pytest.approx(recalls)
    assert report["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert report["accuracy"] == np.mean(called == labels)
    assert report["auc_low"] < report["auc"] < report["auc_high"]
    assert report["sensitivity"] == metrics.sensitivity(1 - probabilities[:, 0], labels > 0, 0.5)
    assert report["positives"] == np.sum(labels > 0)
    assert report["hospitals"]["B"]["auc"] == multiclass.macro_auc(probabilities[1::2], labels[1::2])


def test_perfect_order_has_an_interval_as_wide_as_the_rarest_class_allows():
    labels = np.array([0] * 20 + [1] * 20 + [2] * 3)
    low, high = multiclass.macro_auc_interval(np.eye(3)[labels], labels) or (None, None)
    assert (low, high) == metrics.newcombe_interval(1.0, 3, 40)
    assert low is not None
    assert 0.4 < low < metrics.newcombe_interval(1.0, 20, 23)[0]


def test_a_class_without_a_patient_leaves_the_figures_undefined(patients):
    probabilities, labels = patients
    report = multiclass.multiclass_report(probabilities[labels < 2], labels[labels < 2], 0.5)
    assert (report["auc"], report["auc_low"], report["balanced_accuracy"]) == (None, None, None)
    assert report["accuracy"] is not None


def test_the_controls_are_at_chance(patients):
    probabilities, labels = patients
    frequent = multiclass.most_frequent_row(labels, 3)
    assert (frequent["auc"], frequent["balanced_accuracy"], frequent["sensitivity"]) == (0.5, pytest.approx(1 / 3), 1)
    shuffled = multiclass.permuted_rows(probabilities, labels, threshold=0.5)
    assert shuffled["auc"] == pytest.approx(0.5, abs=0.02)
    assert shuffled["auc_low"] < 0.5 < shuffled["auc_high"]
    assert shuffled["balanced_accuracy"] == pytest.approx(1 / 3, abs=0.02)


def test_calibration_is_perfect_for_certainty_that_is_right_and_worst_for_certainty_that_is_wrong():
    labels = np.array([0, 1, 2, 1])
    assert multiclass.calibration(np.eye(3)[labels], labels) == {"brier": 0.0, "ece": 0.0, "ece_chance": 0.0}
    assert multiclass.calibration(np.eye(3)[(labels + 1) % 3], labels) == {"brier": 2.0, "ece": 1.0, "ece_chance": 0.0}


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(ValueError, match=r"labels \[0, 3\]: expected 0 to 2"):
        multiclass.multiclass_report(np.full((2, 3), 1 / 3), np.array([0, 3]), 0.5)
