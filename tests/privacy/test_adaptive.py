"""Quantile clipping finds its quantile, and its noise is charged to z."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfl.privacy import PrivacyConfig, PrivacyError, PrivacyPlan
from capsfl.privacy.adaptive import centred_bit, median_norm, quantile_update, update_multiplier


@settings(max_examples=50, deadline=None)
@given(st.floats(0.05, 20), st.floats(0.51, 50))
def test_updates_and_bits_together_cost_z(multiplier, ratio):
    bit_noise = multiplier * ratio
    z_delta = float(update_multiplier(multiplier, bit_noise))
    assert z_delta > multiplier
    assert z_delta**-2 + (2 * bit_noise) ** -2 == pytest.approx(multiplier**-2, rel=1e-4)


def test_no_noise_stays_none_and_traced_multipliers_are_vmapped():
    found = jax.jit(jax.vmap(update_multiplier, (0, None)))(jnp.array([0.0, 1.0, 4.0]), 1.0)
    np.testing.assert_allclose(found[:2], [0.0, np.sqrt(4 / 3)], rtol=1e-6)
    assert np.isnan(found[2])
    with pytest.raises(PrivacyError, match=r"bit_noise = 0\.5: must be above half the noise multiplier \(0\.5\)"):
        update_multiplier(1.0, 0.5)


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_the_clip_norm_settles_at_the_quantile_of_the_norms(quantile):
    norms = jnp.linspace(0.01, 1.0, 100)

    def advance(clip_norm, key):
        bits = centred_bit(norms, clip_norm).sum()
        clip_norm = quantile_update(
            clip_norm,
            bits,
            expected_cohort=100,
            key=key,
            bit_noise=5.0,
            target_quantile=quantile,
            learning_rate=0.2,
        )
        return clip_norm, clip_norm

    keys = jax.random.split(jax.random.key(0), 400)
    path = jax.jit(lambda start: jax.lax.scan(advance, start, keys)[1])(jnp.float32(20.0))
    assert float(path[200:].mean()) == pytest.approx(quantile, abs=0.03)


def test_a_norm_that_is_not_finite_counts_as_clipped():
    np.testing.assert_array_equal(centred_bit(jnp.array([1.0, 1.1, jnp.nan]), 1.0), [0.5, -0.5, -0.5])


def test_the_median_leaves_out_who_is_absent_or_broken():
    norms = jnp.array([1.0, 2.0, 9.0, jnp.inf, 100.0])
    mask = jnp.array([True, True, True, True, False])
    assert float(median_norm(norms, mask, otherwise=7.0)) == 2.0
    assert float(median_norm(norms, jnp.zeros(5, bool), otherwise=7.0)) == 7.0


def test_a_quantile_plan_keeps_the_statement_of_z_and_raises_the_noise_on_updates():
    def plan(**words):
        config = PrivacyConfig(sampler="all", clip_norm=1.0, noise_multiplier=1.0, **words)
        return PrivacyPlan.build(config, num_hospitals=40)

    assert plan(clipping="quantile").statement(5) == plan().statement(5)
    assert plan(clipping="quantile").bit_noise == 2.0
    adapted = plan(clipping="quantile", bit_noise=1.0)
    assert adapted.update_multiplier == pytest.approx(float(update_multiplier(1.0, 1.0)), rel=1e-6)
    assert plan().update_multiplier == 1.0


def test_a_median_plan_states_no_epsilon_and_says_why():
    config = PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0, clipping="median")
    statement = PrivacyPlan.build(config, num_hospitals=40).statement(5)
    assert statement.epsilon is None
    assert statement.remark.startswith("not accounted")
