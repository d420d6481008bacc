"""The figures of a result table against brute force and SciPy, and what they say when nothing can be said."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import cdist, directed_hausdorff

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


MASKS = st.lists(st.booleans(), min_size=27, max_size=27).map(lambda bits: np.array(bits).reshape(3, 3, 3))


@settings(max_examples=40, deadline=None)
@given(first=MASKS, second=MASKS)
def test_dice_and_hausdorff_are_symmetric_and_perfect_only_for_equal_masks(first, second):
    spacing = (5.0, 1.0, 0.7)
    assert metrics.dice(first, second) == metrics.dice(second, first)
    assert metrics.hd95_mm(first, second, spacing) == metrics.hd95_mm(second, first, spacing)
    assert (metrics.dice(first, second) == 1) == np.array_equal(first, second)
    assert metrics.hd95_mm(first, first, spacing) == 0


def test_dice_counts_the_overlap_twice():
    assert metrics.dice(np.array([1, 1, 0, 0]), np.array([0, 1, 1, 1])) == pytest.approx(2 / 5)


def test_empty_masks_follow_the_rule():
    empty, full = np.zeros((4, 3), bool), np.ones((4, 3), bool)
    assert (metrics.dice(empty, empty), metrics.dice(empty, full)) == (1, 0)
    assert metrics.hd95_mm(empty, empty, (2.0, 1.0)) == 0
    assert metrics.hd95_mm(full, empty, (2.0, 1.0)) == metrics.hd95_mm(empty, full, (2.0, 1.0))
    assert metrics.hd95_mm(empty, full, (2.0, 1.0)) == pytest.approx(np.hypot(8, 3))


def test_hausdorff_distance_is_that_of_brute_force_over_surface_points():
    generator = np.random.default_rng(0)
    spacing = np.array([5.0, 1.0, 0.7])
    for _ in range(5):
        masks = [generator.uniform(size=(5, 6, 7)) < share for share in (0.3, 0.8)]
        points = []
        for mask in masks:
            padded = np.pad(mask, 1)
            inside = mask.copy()
            for axis, step in itertools.product(range(3), (-1, 1)):
                inside &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
            points.append(np.argwhere(mask & ~inside) * spacing)
        distances = cdist(*points)
        expected = max(np.percentile(distances.min(axis), 95) for axis in (0, 1))
        found = metrics.hd95_mm(masks[0], masks[1], spacing.tolist())
        assert found == pytest.approx(expected)
        assert found <= max(directed_hausdorff(*points)[0], directed_hausdorff(*points[::-1])[0]) + 1e-9


def test_shifted_block_is_as_far_as_the_shift_in_mm():
    truth = np.zeros((10, 10), bool)
    truth[2:5, 2:5] = True
    assert metrics.hd95_mm(np.roll(truth, 3, axis=1), truth, (1.0, 2.5)) == pytest.approx(7.5)


def test_volume_error_is_in_millilitres():
    prediction, truth = np.ones((10, 10, 10)), np.zeros((10, 10, 10))
    assert metrics.volume_error_ml(prediction, truth, (5.0, 1.0, 1.0)) == pytest.approx(5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auc(np.array([0.1, np.nan]), np.array([0, 1])), "1 of 2 are not finite"),
        (lambda: metrics.auc(np.zeros(3), np.zeros(2)), r"scores \(3,\) and labels \(2,\)"),
        (lambda: metrics.auc(np.zeros(2), np.array([0, 2])), r"labels \[0, 2\]: expected 0 and 1"),
        (lambda: metrics.threshold_for_sensitivity(np.zeros(2), np.zeros(2)), "no positive labels"),
        (lambda: metrics.threshold_for_sensitivity(np.zeros(2), np.ones(2), 90), "target 90"),
        (lambda: metrics.ece(np.array([1.5]), np.array([1])), "expected \\[0, 1\\]"),
        (lambda: metrics.dice(np.zeros(2), np.zeros(3)), "differ in shape"),
        (
            lambda: metrics.hd95_mm(np.zeros((2, 2)), np.zeros((2, 2)), (1.0,)),
            "expected 2 positive distances",
        ),
        (lambda: metrics.classification_report(np.zeros(2), np.arange(2), 0.5, ["A"]), "one per patient"),
        (lambda: metrics.bootstrap_interval(len, np.zeros(2), np.zeros(3)), "expected equal numbers"),
    ],
)
def test_impossible_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
