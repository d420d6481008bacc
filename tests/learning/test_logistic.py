"""Logistic regression: an optimum of the penalised likelihood, whatever units the features come in."""

import numpy as np
import pytest

from capsfl.learning.logistic import fit_logistic


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 90)
    return generator.normal(size=(90, 4)) + labels[:, None] * np.array([1.0, 0.5, 0.0, -1.0]), labels


def test_without_features_that_tell_anything_it_says_the_shares_of_the_classes(rows):
    labels = rows[1]
    found = fit_logistic(np.full((90, 2), 7.0), labels, classes=3).probabilities(np.full((1, 2), 7.0))
    np.testing.assert_allclose(found[0], np.bincount(labels) / 90, atol=1e-3)


def test_no_other_slopes_have_a_lower_penalised_cost(rows):
    features, labels = rows
    model = fit_logistic(features, labels, classes=3, penalty=0.7)

    def cost(slopes: np.ndarray) -> float:
        found = model._replace(slopes=slopes).probabilities(features)
        return float(-np.log(found[np.arange(90), labels]).sum() + 0.35 * np.square(slopes).sum())

    least = cost(model.slopes)
    generator = np.random.default_rng(1)
    for _ in range(50):
        assert cost(model.slopes + 0.05 * generator.normal(size=model.slopes.shape)) > least


def test_units_of_the_features_change_nothing(rows):
    features, labels = rows
    units, zero = np.array([1e3, 1e-4, 1.0, 5.0]), np.array([0.0, 3.0, -2.0, 9.0])
    first = fit_logistic(features, labels, classes=3).probabilities(features)
    other = fit_logistic(features * units + zero, labels, classes=3).probabilities(features * units + zero)
    np.testing.assert_allclose(first, other, atol=2e-3)


def test_a_row_of_weight_two_counts_as_two_rows():
    features, labels = np.array([[0.0], [1.0], [2.0], [1.0]]), np.array([0, 1, 1, 0])
    # Equal standardisation, so that the penalty is the same.
    twice = np.concatenate([features, features])
    first = fit_logistic(twice, np.concatenate([labels, labels]), classes=2)
    other = fit_logistic(features, labels, classes=2, weights=np.full(4, 2.0))
    np.testing.assert_allclose(first.slopes, other.slopes, atol=1e-3)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"features \(3, 1\) and labels \(2,\)"):
        fit_logistic(np.ones((3, 1)), np.zeros(2, int), classes=2)
    with pytest.raises(ValueError, match="1 of 2 are not finite"):
        fit_logistic(np.array([[1.0], [np.nan]]), np.zeros(2, int), classes=2)
