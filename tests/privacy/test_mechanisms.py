"""What is released: the noise has the accounted size, and one hospital moves the mean by at most S/m."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from capsfl.privacy import PrivacyConfig, PrivacyPlan, add_gaussian, clip_by_global_norm, mean_with_noise

MILLION = 1_000_000


def _plan(clip_norm, noise_multiplier, cohort=10):
    config = PrivacyConfig(
        sampler="poisson",
        cohort=cohort,
        truncation=40,
        clip_norm=clip_norm,
        noise_multiplier=noise_multiplier,
    )
    return PrivacyPlan.build(config, num_hospitals=100)


@pytest.mark.parametrize(("clip_norm", "noise_multiplier"), [(1.0, 1.0), (0.5, 2.2), (3.0, 0.7)])
def test_the_released_noise_has_standard_deviation_z_s_over_m(clip_norm, noise_multiplier):
    plan = _plan(clip_norm, noise_multiplier)
    noise = np.asarray(mean_with_noise(jnp.zeros((MILLION,)), plan=plan, key=jax.random.key(5)), np.float64)
    deviation = noise_multiplier * clip_norm / 10
    # Four standard errors of a deviation, a mean, a skewness and a kurtosis estimated from 10^6 draws.
    assert noise.std() == pytest.approx(deviation, rel=4 / np.sqrt(2 * MILLION))
    assert abs(noise.mean()) < 4 * deviation / np.sqrt(MILLION)
    assert abs(stats.skew(noise)) < 4 * np.sqrt(6 / MILLION)
    assert abs(stats.kurtosis(noise)) < 4 * np.sqrt(24 / MILLION)


def test_traced_bound_and_multiplier_give_the_release_of_a_plan_with_those_values():
    total, key = jnp.linspace(-1.0, 1.0, 50), jax.random.key(2)
    release = jax.jit(
        lambda bound, multiplier: mean_with_noise(
            total, plan=_plan(1.0, 1.0), key=key, clip_norm=bound, noise_multiplier=multiplier
        )
    )
    np.testing.assert_allclose(
        release(0.25, 3.0), mean_with_noise(total, plan=_plan(0.25, 3.0), key=key), rtol=1e-6, atol=1e-7
    )


def test_zero_noise_releases_the_mean_over_the_expected_cohort_exactly():
    total = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.float32(-7.0)}
    noiseless = add_gaussian(total, key=jax.random.key(0), standard_deviation=0.0)
    jax.tree.map(np.testing.assert_array_equal, noiseless, total)
    released = mean_with_noise(total, plan=_plan(1.0, 0.0), key=jax.random.key(0))
    jax.tree.map(lambda mean, whole: np.testing.assert_array_equal(mean, whole / 10.0), released, total)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31 - 1), st.floats(0.125, 8, width=32), st.floats(0.0625, 64, width=32))
def test_adding_a_hospital_moves_the_released_mean_by_at_most_s_over_m(seed, bound, size):
    generator = np.random.default_rng(seed)
    updates = [
        {"w": jnp.asarray(size * generator.normal(size=(4, 3)), jnp.float32), "b": jnp.ones((3,))} for _ in range(5)
    ]
    clipped = [clip_by_global_norm(update, bound)[0] for update in updates]

    def release(parts):
        total = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *parts)
        return mean_with_noise(total, plan=_plan(bound, 0.0), key=jax.random.key(seed))

    moved = jax.tree.map(lambda with_it, without: with_it - without, release(clipped), release(clipped[:-1]))
    distance = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(moved)))
    assert distance <= bound / 10 * (1 + 1e-5)
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(updates[-1])))
    assert distance == pytest.approx(min(bound, norm) / 10, rel=1e-5)  # and the bound is attained


def test_noise_is_independent_across_leaves_and_rounds():
    zeros = {"first": jnp.zeros((200_000,)), "second": jnp.zeros((200_000,))}
    root = jax.random.key(9)
    draws = [
        leaf
        for number in range(3)
        for leaf in add_gaussian(zeros, key=jax.random.fold_in(root, number), standard_deviation=1.0).values()
    ]
    correlation = np.corrcoef(np.stack(draws)) - np.eye(6)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(200_000)


def test_the_noise_depends_on_the_key_and_not_on_the_sum_or_on_jit():
    key = jax.random.key(4)
    here = add_gaussian(jnp.zeros((64,)), key=key, standard_deviation=1.0)
    there = add_gaussian(jnp.full((64,), 8.0), key=key, standard_deviation=1.0)
    np.testing.assert_allclose(there - 8.0, here, atol=2e-6)
    compiled = jax.jit(lambda total: add_gaussian(total, key=key, standard_deviation=1.0))(jnp.zeros((64,)))
    np.testing.assert_allclose(compiled, here, rtol=1e-5)


def test_studies_with_their_own_noise_run_side_by_side_under_vmap():
    total, key = jnp.zeros((MILLION // 10,)), jax.random.key(1)
    released = jax.vmap(
        lambda multiplier: mean_with_noise(total, plan=_plan(1.0, 1.0), key=key, noise_multiplier=multiplier)
    )(jnp.array([0.0, 1.0, 4.0]))
    np.testing.assert_allclose(np.std(released, axis=1), [0.0, 0.1, 0.4], rtol=0.02)


def test_strict_promotion_is_accepted():
    with jax.numpy_dtype_promotion("strict"):
        released = mean_with_noise({"w": jnp.ones((3,))}, plan=_plan(1.0, 1.0), key=jax.random.key(0))
    assert released["w"].dtype == jnp.float32


def test_the_noise_is_within_one_percent_of_z_s_over_m():
    noise = np.asarray(mean_with_noise(jnp.zeros((MILLION,)), plan=_plan(0.5, 2.2), key=jax.random.key(8)), np.float64)
    assert noise.std() == pytest.approx(2.2 * 0.5 / 10, rel=0.01)


def test_the_divisor_stays_m_whatever_cohort_was_realised():
    # Dividing by the realised cohort would release 1 for each of these, and move by far more than S/m.
    for realised in (1, 5, 10, 17):
        released = mean_with_noise(jnp.full((2,), float(realised)), plan=_plan(1.0, 0.0), key=jax.random.key(0))
        np.testing.assert_allclose(released, realised / 10, rtol=1e-6)
