"""Differences of AUC on the same patients."""

import numpy as np
import pytest

from capsfl.learning import metrics
from capsfl.learning.multiclass import macro_auc
from capsfl.report.paired import Difference, auc_differences


def of_two(scores: np.ndarray) -> np.ndarray:
    return np.stack([1 - scores, scores], axis=1)


def difference(first: np.ndarray, second: np.ndarray, labels: np.ndarray, **options) -> Difference:
    return auc_differences(first, {"other": second}, labels, **options)["other"]


def area(scores: np.ndarray, labels: np.ndarray) -> float:
    found = metrics.auc(scores, labels)
    assert found is not None
    return found


@pytest.fixture
def scored() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sixty patients, hard and easy ones, two classifiers that see nearly the same."""
    generator = np.random.default_rng(3)
    labels = np.arange(60) % 2
    seen = labels + generator.normal(0, 1.2, 60)
    return seen + generator.normal(0, 0.05, 60), seen + generator.normal(0, 0.4, 60), labels


def test_the_difference_is_that_of_the_two_areas(scored):
    first, second, labels = scored
    found = difference(of_two(first), of_two(second), labels)
    assert found.value == pytest.approx(area(first, labels) - area(second, labels))
    assert found.low < found.value < found.high
    against = difference(of_two(second), of_two(first), labels)
    assert tuple(against) == pytest.approx((-found.value, -found.high, -found.low))


def test_the_interval_is_as_wide_as_a_bootstrap_written_out_says(scored):
    first, second, labels = scored
    people = np.arange(60) // 3
    generator = np.random.default_rng(8)
    rows = [np.flatnonzero(people == person) for person in range(20)]
    draws = []
    for _ in range(3000):
        chosen = np.concatenate([rows[person] for person in generator.integers(20, size=20)])
        draws.append(area(first[chosen], labels[chosen]) - area(second[chosen], labels[chosen]))
    value = area(first, labels) - area(second, labels)
    half = np.quantile(np.abs(np.array(draws) - value), 0.95)
    found = difference(of_two(first), of_two(second), labels, people=people, resamples=4000)
    assert (found.low, found.high) == pytest.approx((value - half, value + half), abs=0.006)
    alone = difference(of_two(first), of_two(second), labels, resamples=4000)
    assert abs(alone.low - found.low) > 0.004, "scans of one person count as one draw"


def test_pairing_sees_what_two_intervals_hide(scored):
    first, _, labels = scored
    # The other classifier is a little worse with every patient, in the same order of difficulty.
    second = first - 0.25 * (2 * labels - 1)
    of_first, of_second = (metrics.auc_interval(scores, labels) for scores in (first, second))
    assert of_first is not None
    assert of_second is not None
    assert of_first[0] < of_second[1], "the intervals overlap"
    assert difference(of_two(first), of_two(second), labels).low > 0


def test_among_equals_all_intervals_hold_zero_nineteen_times_in_twenty():
    generator = np.random.default_rng(4)
    labels, held = np.arange(40) % 2, 0
    for study in range(60):
        seen = labels + generator.normal(0, 1, 40)
        scores = [of_two(seen + generator.normal(0, 0.7, 40)) for _ in range(11)]
        found = auc_differences(scores[0], dict(zip("abcdefghij", scores[1:], strict=True)), labels, seed=study,
                                resamples=400)  # fmt: skip
        held += all(row.low <= 0 <= row.high for row in found.values())
    assert held >= 53  # 57 on average; each interval for itself would leave some 38


def test_ties_count_half_and_where_nothing_tells_them_apart_there_is_no_difference():
    labels = np.array([0, 0, 0, 1, 1, 1])
    equal, right = of_two(np.full(6, 0.5)), of_two(labels.astype(float))
    assert auc_differences(right, {"equal": equal, "right": right}, labels) == {}, "every draw gives the same"
    uneven = of_two(np.array([0, 0, 0.5, 0.5, 1, 1]))
    assert difference(right, uneven, labels).value == pytest.approx(1 - 8.5 / 9)
    assert auc_differences(right, {"uneven": uneven}, np.ones(6, int)) == {}


def test_of_several_classes_it_is_the_mean_of_each_against_the_rest():
    generator = np.random.default_rng(1)
    labels = np.arange(30) % 3
    first, second = (generator.dirichlet(np.ones(3), 30) + np.eye(3)[labels] * share for share in (0.5, 0.2))
    of_first, of_second = macro_auc(first, labels), macro_auc(second, labels)
    assert of_first is not None
    assert of_second is not None
    assert difference(first, second, labels).value == pytest.approx(of_first - of_second)


def test_other_scans_are_refused():
    with pytest.raises(ValueError, match=r"vgg16: probabilities \(3, 2\) and \(4, 2\)"):
        auc_differences(np.zeros((3, 2)), {"vgg16": np.zeros((4, 2))}, np.zeros(3, int))
