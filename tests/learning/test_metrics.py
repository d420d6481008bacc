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


@pytest.mark.parametrize(("positives", "negatives"), [(4, 4), (11, 7), (20, 60)])
@pytest.mark.parametrize("area", [0.5, 0.9, 0.97])
def test_the_interval_of_the_auc_covers_the_true_one_of_few_patients(positives: int, negatives: int, area: float):
    """The percentile bootstrap, in the same place, does so in 33 to 93 of 100 samples."""
    generator = np.random.default_rng(0)
    above = generator.normal(size=(1500, positives, 1)) + np.sqrt(2) * stats.norm.ppf(area)
    areas = np.mean(above > generator.normal(size=(1500, 1, negatives)), axis=(1, 2))
    seen, counts = np.unique(areas, return_counts=True)
    held = [low <= area <= high for low, high in (metrics.newcombe_interval(a, positives, negatives) for a in seen)]
    assert 0.93 <= np.sum(counts[held]) / 1500 <= 0.99


def test_the_interval_ends_where_the_observed_auc_is_just_not_refuted():
    labels = np.arange(20) % 2
    scores = np.random.default_rng(3).normal(size=20) + labels
    area, (low, high) = _defined(metrics.auc(scores, labels)), _defined(metrics.auc_interval(scores, labels))
    for end in (low, high):
        hanley_mcneil = end * (1 - end) + 9 * (end / (2 - end) - end**2 + 2 * end**2 / (1 + end) - end**2)
        assert abs(area - end) == pytest.approx(stats.norm.ppf(0.975) * np.sqrt(hanley_mcneil / 100), rel=1e-6)
    assert low < area < high


def test_perfect_separation_of_few_patients_is_neither_certain_nor_less_certain_than_the_next_best():
    labels = np.arange(20) % 2
    low, high = _defined(metrics.auc_interval(labels.astype(float), labels))
    assert high == 1
    assert 0.7 < low < 0.9
    assert metrics.auc_interval(1.0 - labels, labels) == (0, pytest.approx(1 - low))
    ends = np.array([metrics.newcombe_interval(area, 10, 10) for area in np.linspace(0, 1, 401)])
    assert np.all(np.diff(ends, axis=0) > -1e-9)
    assert np.abs(np.diff(ends, axis=0)).max() < 0.02, "no jump, at the ends neither"
    assert metrics.newcombe_interval(1.0, 1, 1)[0] == pytest.approx(1 / (1 + stats.norm.ppf(0.975) ** 2))


def test_the_interval_of_the_auc_counts_people_and_not_their_scans():
    people, labels = np.repeat(np.arange(12), 8), np.repeat(np.arange(12) % 2, 8)
    scores = np.random.default_rng(5).normal(size=96) + labels
    by_person, by_scan = (_defined(metrics.auc_interval(scores, labels, patients=who)) for who in (people, None))
    assert by_person == metrics.newcombe_interval(_defined(metrics.auc(scores, labels)), 6, 6)
    assert by_person[1] - by_person[0] > 2 * (by_scan[1] - by_scan[0])
    assert metrics.count_by_class(np.array([0, 1, 1, 0]), np.array([7, 7, 8, 9])) == (2, 2)


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
    probabilities, labels = np.array([0.9, 0.1, 0.2, 0.8]), np.array([1, 0, 0, 1])
    assert metrics.brier(probabilities, labels) == pytest.approx((0.01 + 0.01 + 0.04 + 0.04) / 4)
    # Shares rise up to four bins: every patient is one.
    assert metrics.ece(probabilities, labels) == pytest.approx((0.1 + 0.1 + 0.2 + 0.2) / 4)
    # Of two bins the second has the smaller share, so there is one: the mean probability against the share of all.
    assert metrics.ece(np.array([0.1, 0.2, 0.7, 0.9]), np.array([1, 1, 0, 0])) == pytest.approx(0.5 - 0.475)
    assert metrics.ece(np.full(4, 0.8), np.array([1, 0, 0, 1])) == pytest.approx(0.3), "equal patients are one average"


def test_calibration_error_vanishes_for_a_calibrated_classifier_and_not_for_a_bold_one():
    generator = np.random.default_rng(0)
    probabilities = generator.uniform(size=20_000)
    labels = generator.uniform(size=20_000) < probabilities
    assert metrics.ece(probabilities, labels) < 0.02
    assert metrics.ece(np.round(probabilities), labels) == pytest.approx(0.25, abs=0.02)


def test_chance_says_how_large_an_error_a_calibrated_classifier_of_few_patients_has():
    generator = np.random.default_rng(1)
    above, bold = [], []
    for study in range(40):
        probabilities = generator.uniform(size=24)
        labels = generator.uniform(size=24) < probabilities
        limit = metrics.ece_of_chance(probabilities, draws=60, seed=study)
        above.append(metrics.ece(probabilities, labels) > limit)
        bold.append(metrics.ece(np.where(probabilities > 0.5, 0.999, 0.001), labels) > limit)
    assert np.mean(above) < 0.15
    assert np.mean(bold) > 0.4
    assert metrics.ece_of_chance(np.zeros(9)) == 0
    few, many = (metrics.ece_of_chance(np.linspace(0, 1, count)) for count in (18, 400))
    assert few > 2 * many


def test_the_error_of_calibrated_probabilities_is_less_inflated_than_in_fifteen_equal_bins():
    generator = np.random.default_rng(2)
    swept, binned = [], []
    for _ in range(100):
        probabilities = generator.uniform(size=30)
        labels = generator.uniform(size=30) < probabilities
        swept.append(metrics.ece(probabilities, labels))
        members = np.minimum((probabilities * 15).astype(int), 14)
        binned.append(np.abs(np.bincount(members, weights=probabilities - labels, minlength=15)).sum() / 30)
    assert np.mean(swept) < 0.6 * np.mean(binned)


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
