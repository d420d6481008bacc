"""The cohorts drawn are those that are accounted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from capsfl.privacy.sampling import sample_all, sample_fixed, sample_poisson

DRAWS = 4000


def _many(sample):
    keys = jax.random.split(jax.random.key(7), DRAWS)
    cohorts = jax.jit(jax.vmap(lambda key: sample(key=key)))(keys)
    return np.asarray(cohorts.indices), np.asarray(cohorts.mask)


def _appearances(indices, mask, hospitals):
    return np.bincount(indices[mask], minlength=hospitals)


def test_all_takes_every_hospital_once():
    cohort = sample_all(num_hospitals=5)
    np.testing.assert_array_equal(cohort.indices, np.arange(5))
    assert cohort.indices.dtype == jnp.int32
    assert cohort.mask.dtype == bool
    assert bool(cohort.mask.all())


def test_fixed_takes_exactly_m_distinct_hospitals_each_equally_often():
    indices, mask = _many(lambda key: sample_fixed(key=key, num_hospitals=12, cohort=5))
    assert indices.shape == (DRAWS, 5)
    assert mask.all()
    assert all(len(set(row)) == 5 for row in indices.tolist())
    counts = _appearances(indices, mask, 12)
    spread = np.sqrt(DRAWS * (5 / 12) * (7 / 12))
    assert np.abs(counts - DRAWS * 5 / 12).max() < 4.5 * spread


def test_untruncated_poisson_cohorts_are_binomial_and_hospitals_independent():
    indices, mask = _many(lambda key: sample_poisson(key=key, num_hospitals=20, cohort=6, truncation=20))
    sizes = mask.sum(axis=1)
    observed = np.bincount(sizes, minlength=21)
    expected = DRAWS * stats.binom.pmf(np.arange(21), 20, 0.3)
    bulk = expected > 20
    chi_squared = ((observed - expected)[bulk] ** 2 / expected[bulk]).sum()
    assert chi_squared < stats.chi2.ppf(1 - 1e-4, bulk.sum())
    taken = np.zeros((DRAWS, 20))
    taken[np.arange(DRAWS)[:, None], indices] = mask
    correlation = np.corrcoef(taken.T) - np.eye(20)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(DRAWS)
    assert np.abs(taken.mean(axis=0) - 0.3).max() < 4.5 * np.sqrt(0.21 / DRAWS)


def test_truncated_poisson_drops_uniformly_and_only_the_surplus():
    indices, mask = _many(lambda key: sample_poisson(key=key, num_hospitals=20, cohort=6, truncation=7))
    sizes = mask.sum(axis=1)
    assert indices.shape == (DRAWS, 7)
    assert sizes.max() == 7
    overflow = stats.binom.sf(6, 20, 0.3)  # seven or more drawn: all seven slots full
    assert abs((sizes == 7).mean() - overflow) < 4.5 * np.sqrt(overflow * (1 - overflow) / DRAWS)
    expected = np.minimum(np.arange(21), 7) @ stats.binom.pmf(np.arange(21), 20, 0.3) / 20
    frequency = _appearances(indices, mask, 20) / DRAWS
    assert np.abs(frequency - expected).max() < 4.5 * np.sqrt(expected * (1 - expected) / DRAWS)


def test_poisson_slots_hold_distinct_hospitals_with_the_drawn_ones_first():
    indices, mask = _many(lambda key: sample_poisson(key=key, num_hospitals=9, cohort=3, truncation=6))
    assert indices.dtype == np.int32
    assert indices.min() >= 0
    assert indices.max() < 9
    assert all(len(set(row)) == 6 for row in indices.tolist())
    assert (np.diff(mask.astype(int), axis=1) <= 0).all()


def test_poisson_draws_the_same_hospitals_whatever_the_cap():
    key = jax.random.key(3)
    whole = sample_poisson(key=key, num_hospitals=30, cohort=10, truncation=30)
    capped = sample_poisson(key=key, num_hospitals=30, cohort=10, truncation=12)
    assert set(np.asarray(capped.indices)[capped.mask]) <= set(np.asarray(whole.indices)[whole.mask])


def test_poisson_with_every_hospital_expected_takes_all():
    cohort = sample_poisson(key=jax.random.key(0), num_hospitals=4, cohort=4, truncation=4)
    assert bool(cohort.mask.all())
    assert sorted(cohort.indices.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("sampler", ["fixed", "poisson"])
def test_rounds_draw_different_cohorts_and_the_same_key_the_same(sampler):
    def sample(number):
        key = jax.random.fold_in(jax.random.key(1), number)
        if sampler == "fixed":
            return sample_fixed(key=key, num_hospitals=40, cohort=10)
        return sample_poisson(key=key, num_hospitals=40, cohort=10, truncation=20)

    assert sample(0).indices.tolist() == sample(0).indices.tolist()
    assert sample(0).indices.tolist() != sample(1).indices.tolist()


def _chi_squared(counts, probability):
    # Each count is binomial; fixed cohorts' counts are negatively correlated, which only lowers the statistic's tail.
    return ((counts - DRAWS * probability) ** 2 / (DRAWS * probability * (1 - probability))).sum()


@pytest.mark.parametrize("name", ["poisson", "truncated", "fixed"])
def test_every_hospital_is_drawn_as_often_as_accounted_by_chi_square(name):
    if name == "fixed":
        indices, mask = _many(lambda key: sample_fixed(key=key, num_hospitals=20, cohort=6))
        probability = 0.3
    else:
        cap = 20 if name == "poisson" else 7
        indices, mask = _many(lambda key: sample_poisson(key=key, num_hospitals=20, cohort=6, truncation=cap))
        probability = np.minimum(np.arange(21), cap) @ stats.binom.pmf(np.arange(21), 20, 0.3) / 20
    statistic = _chi_squared(_appearances(indices, mask, 20), probability)
    assert statistic < stats.chi2.ppf(1 - 1e-4, 20)


def test_the_chi_square_notices_a_hospital_drawn_a_fifth_too_often():
    counts = np.full(20, DRAWS * 0.3)
    counts[0] *= 1.2
    assert _chi_squared(counts, 0.3) > stats.chi2.ppf(1 - 1e-4, 20)
