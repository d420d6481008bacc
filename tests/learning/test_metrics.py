"""The figures of a result table against brute force and SciPy, and what they say when nothing can be said."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from capsfl.learning import metrics

# Few distinct scores, so that ties are common.
PATIENTS = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=25)


def _defined(value):
    assert value is not None
    return value


def _arrays(patients):
    scores, labels = zip(*patients, strict=True)
    return np.array(scores) / 6, np.array(labels)


@settings(max_examples=60, deadline=None)
@given(patients=PATIENTS)
def test_auc_is_the_chance_of_ranking_a_pair_correctly(patients):
    scores, labels = _arrays(patients)
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(scores[labels], scores[~labels])]
    expected = np.mean(pairs) if pairs else None
    assert metrics.auc(scores, labels) == (None if expected is None else pytest.approx(expected))


def test_auc_is_the_mann_whitney_statistic():
    generator = np.random.default_rng(0)
    scores, labels = generator.normal(size=50), generator.integers(2, size=50)
    statistic = stats.mannwhitneyu(scores[labels == 1], scores[labels == 0]).statistic
    assert metrics.auc(scores, labels) == pytest.approx(statistic / (labels.sum() * (1 - labels).sum()))


@settings(max_examples=60, deadline=None)
@given(patients=PATIENTS)
def test_roc_curve_rises_to_one_over_the_area_of_the_auc(patients):
    scores, labels = _arrays(patients)
    curve = metrics.roc_curve(scores, labels)
    if curve is None:
        assert metrics.auc(scores, labels) is None
        return
    assert curve.false_positive_rate[0] == curve.true_positive_rate[0] == 0
    assert curve.false_positive_rate[-1] == curve.true_positive_rate[-1] == 1
    area = np.trapezoid(curve.true_positive_rate, curve.false_positive_rate)
    assert area == pytest.approx(metrics.auc(scores, labels))
    for x, y, threshold in zip(*curve, strict=True):
        assert y == metrics.sensitivity(scores, labels, threshold)
        assert 1 - x == pytest.approx(metrics.specificity(scores, labels, threshold))


def test_figures_at_a_threshold_count_the_score_on_it_as_positive():
    scores, labels = np.array([0.9, 0.5, 0.5, 0.4, 0.1]), np.array([1, 1, 0, 1, 0])
    assert metrics.confusion(scores, labels, 0.5) == (2, 1, 1, 1)
    assert metrics.sensitivity(scores, labels, 0.5) == pytest.approx(2 / 3)
    assert metrics.specificity(scores, labels, 0.5) == pytest.approx(1 / 2)
    assert metrics.precision(scores, labels, 0.5) == pytest.approx(2 / 3)
    assert metrics.balanced_accuracy(scores, labels, 0.5) == pytest.approx(7 / 12)


@settings(max_examples=60, deadline=None)
@given(patients=PATIENTS, target=st.sampled_from([0.1, 0.5, 0.9, 1.0]))
def test_threshold_reaches_the_sensitivity_and_no_higher_one_does(patients, target):
    scores, labels = _arrays([*patients, (3, True)])
    threshold = metrics.threshold_for_sensitivity(scores, labels, target)
    assert metrics.sensitivity(scores, labels, threshold) >= target - 1e-9
    higher = scores[scores > threshold]
    if higher.size:
        assert metrics.sensitivity(scores, labels, higher.min()) < target


def test_nine_of_ten_positives_are_ninety_percent():
    scores = np.arange(10) / 10
    assert metrics.threshold_for_sensitivity(scores, np.ones(10), 0.9) == 0.1


def test_undefined_figures_are_none():
    report = metrics.classification_report(np.array([0.2, 0.7]), np.array([1, 1]), 0.9)
    undefined = {key for key, value in report.items() if value is None}
    assert undefined == {"auc", "auc_low", "auc_high", "balanced_accuracy", "specificity", "precision"}
    assert (report["sensitivity"], report["patients"], report["positives"]) == (0.0, 2, 2)


def test_report_holds_a_row_for_each_hospital():
    scores, labels = np.array([0.1, 0.9, 0.3, 0.8]), np.array([0, 1, 1, 0])
    report = metrics.classification_report(scores, labels, 0.5, hospitals=["B", "B", "A", "A"])
    assert list(report["hospitals"]) == ["A", "B"]
    assert report["hospitals"]["B"] == metrics.classification_report(scores[:2], labels[:2], 0.5)
    assert (report["auc"], report["hospitals"]["A"]["auc"], report["hospitals"]["B"]["auc"]) == (0.75, 0, 1)


def test_bootstrap_is_repeatable_and_close_to_the_normal_interval_of_a_mean():
    values = np.random.default_rng(0).normal(size=200)
    low, high = _defined(metrics.bootstrap_interval(lambda rows: float(rows.mean()), values, seed=1))
    assert (low, high) == metrics.bootstrap_interval(lambda rows: float(rows.mean()), values, seed=1)
    half = 1.96 * values.std(ddof=1) / np.sqrt(200)
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.1 * half)


def test_bootstrap_by_patient_is_wider_where_rows_of_a_patient_agree():
    of_patient = np.random.default_rng(0).normal(size=20)
    rows, patients = np.repeat(of_patient, 10), np.repeat(np.arange(20), 10)

    def width(patients):
        low, high = _defined(
            metrics.bootstrap_interval(lambda rows: float(rows.mean()), rows, patients=patients, resamples=500)
        )
        return high - low

    # Ten copies of each row pretend to an interval narrower by the root of ten.
    assert width(patients) / width(None) == pytest.approx(np.sqrt(10), rel=0.2)


def test_interval_of_the_auc_holds_it_and_covers_the_true_one():
    generator = np.random.default_rng(0)
    truth = stats.norm.cdf(1 / np.sqrt(2))
    covered = 0
    for trial in range(30):
        labels = np.arange(60) % 2
        scores = generator.normal(size=60) + labels
        low, high = _defined(metrics.auc_interval(scores, labels, seed=trial, resamples=200))
        assert low <= _defined(metrics.auc(scores, labels)) <= high
        covered += low <= truth <= high
    assert covered >= 25


def test_perfect_separation_of_few_patients_is_not_certainty():
    labels = np.arange(20) % 2
    low, high = _defined(metrics.auc_interval(labels.astype(float), labels))
    assert (low, high) == (pytest.approx(0.025 ** (1 / 10)), 1)
    assert metrics.auc_interval(1.0 - labels, labels) == (0, pytest.approx(1 - low))
    one_patient_a_class = metrics.auc_interval(labels.astype(float), labels, patients=labels)
    assert one_patient_a_class == (pytest.approx(0.025), 1)


def test_always_positive_row_has_the_precision_of_the_prevalence():
    row = metrics.always_positive_row(np.array([1] * 8 + [0] * 2))
    assert (row["auc"], row["auc_low"], row["auc_high"]) == (0.5, 0.5, 0.5)
    assert (row["balanced_accuracy"], row["sensitivity"], row["specificity"]) == (0.5, 1, 0)
    assert row["precision"] == 0.8
    assert row.keys() == metrics.classification_report(np.arange(2), np.arange(2), 0.5).keys()


def test_permuted_labels_leave_nothing_of_a_perfect_classifier():
    labels = np.arange(60) % 3 == 0
    row = metrics.permuted_labels_row(labels.astype(float), labels, seed=0)
    assert row["auc"] == pytest.approx(0.5, abs=0.02)
    assert row["auc_low"] < 0.45 < 0.55 < row["auc_high"] < 1
    assert row["sensitivity"] + row["specificity"] == pytest.approx(1, abs=0.03)
    assert row["precision"] == pytest.approx(1 / 3, abs=0.02)
    assert row == metrics.permuted_labels_row(labels.astype(float), labels, seed=0)
    assert row.keys() == metrics.classification_report(np.arange(2), np.arange(2), 0.5).keys()


def test_labels_are_shuffled_between_people_and_not_between_their_scans():
    people = np.repeat(np.arange(12), 8)
    labels, scores = people % 2, people / 12  # all scans of a person look alike
    by_scan = metrics.permuted_labels_row(scores, labels)
    by_person = metrics.permuted_labels_row(scores, labels, people=people)
    assert by_person["auc"] == pytest.approx(0.5, abs=0.03)
    assert by_person["auc_high"] - by_person["auc_low"] > 2 * (by_scan["auc_high"] - by_scan["auc_low"])


def test_permuted_labels_of_one_class_are_undefined():
    row = metrics.permuted_labels_row(np.array([0.2, 0.8]), np.array([0, 0]))
    assert (row["auc"], row["sensitivity"], row["specificity"]) == (None, None, 0.5)


def test_calibration_figures_are_their_formulas():
    probabilities, labels = np.array([0.1, 0.1, 0.9, 1.0]), np.array([0, 1, 1, 1])
    assert metrics.brier(probabilities, labels) == pytest.approx((0.01 + 0.81 + 0.01 + 0) / 4)
    # Bins [0, 0.5) and [0.5, 1]: gaps 0.1 - 0.5 and 0.95 - 1.
    assert metrics.ece(probabilities, labels, bins=2) == pytest.approx((2 * 0.4 + 2 * 0.05) / 4)


def test_calibration_error_vanishes_for_a_calibrated_classifier_and_not_for_a_bold_one():
    generator = np.random.default_rng(0)
    probabilities = generator.uniform(size=20_000)
    labels = generator.uniform(size=20_000) < probabilities
    assert metrics.ece(probabilities, labels) < 0.02
    assert metrics.ece(np.round(probabilities), labels) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auc(np.array([0.1, np.nan]), np.array([0, 1])), "1 of 2 are not finite"),
        (lambda: metrics.auc(np.zeros(3), np.zeros(2)), r"scores \(3,\) and labels \(2,\)"),
        (lambda: metrics.auc(np.zeros(2), np.array([0, 2])), r"labels \[0, 2\]: expected 0 and 1"),
        (lambda: metrics.threshold_for_sensitivity(np.zeros(2), np.zeros(2)), "no positive labels"),
        (lambda: metrics.threshold_for_sensitivity(np.zeros(2), np.ones(2), 90), "target 90"),
        (lambda: metrics.ece(np.array([1.5]), np.array([1])), "expected \\[0, 1\\]"),
        (lambda: metrics.classification_report(np.zeros(2), np.arange(2), 0.5, ["A"]), "one per patient"),
        (lambda: metrics.bootstrap_interval(len, np.zeros(2), np.zeros(3)), "expected equal numbers"),
    ],
)
def test_impossible_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
