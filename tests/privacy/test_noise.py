"""Noise is what the accountant takes it for, tails included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from capsfl.config import ArmConfig
from capsfl.privacy import PrivacyConfig, add_gaussian, clip_by_global_norm, noise
from capsfl.privacy.adaptive import quantile_update
from capsfl.privacy.laplace import release_laplace

DRAWS = 1_000_001


@pytest.mark.parametrize(
    ("draw", "law"),
    [
        (lambda key: noise.standard_normal(key, DRAWS), stats.norm),
        (lambda key: noise.standard_laplace(key, (DRAWS,)), stats.laplace),
    ],
    ids=["normal", "laplace"],
)
def test_draws_follow_their_law(draw, law):
    values = np.asarray(draw(jax.random.key(11)), np.float64)
    assert values.shape == (DRAWS,)
    assert stats.kstest(values, law.cdf).pvalue > 0.01
    assert abs(np.corrcoef(values[: DRAWS // 2], values[DRAWS // 2 : -1])[0, 1]) < 4 / np.sqrt(DRAWS / 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_an_exponential_draw_is_exact_in_both_tails_and_in_the_middle(dtype):
    words = [0, 1, 2**20, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2**20, 2**32 - 2, 2**32 - 1]
    high, low = (axis.ravel() for axis in np.meshgrid(words, words))
    with jax.enable_x64(dtype == jnp.float64):
        found = noise._exponential(jnp.asarray(high, jnp.uint32), jnp.asarray(low, jnp.uint32), dtype)
        assert found.dtype == dtype
    # Exact integers: near 1 a float64 of u itself would round to 1.
    share = [(int(h) * 2**32 + int(lo)) for h, lo in zip(high, low, strict=True)]
    expected = [
        -np.log((2 * s + 1) / 2**65) if s < 2**63 else -np.log1p(-(2 * (2**64 - 1 - s) + 1) / 2**65) for s in share
    ]
    np.testing.assert_allclose(found, expected, rtol=3e-6 if dtype == jnp.float32 else 1e-14)


def test_the_support_ends_far_beyond_every_accounted_delta():
    # A draw of 23 bits ends at 5.5 deviations: at z = 0.5 a part of S moves the end by 2, and P(N > 3.5) is 2e-4.
    rarest = noise._exponential(jnp.zeros((), jnp.uint32), jnp.zeros((), jnp.uint32), jnp.float32)
    assert float(jnp.sqrt(2 * rarest)) > 9.4
    assert stats.norm.sf(9.4 - 1 / 0.4) < 1e-10


def test_every_release_draws_its_noise_here():
    key = jax.random.key(4)
    gaussian = add_gaussian(jnp.zeros(7), key=key, standard_deviation=1.0)
    np.testing.assert_array_equal(gaussian, noise.standard_normal(key, 7))
    moved = quantile_update(1.0, 0.0, expected_cohort=1, key=key, bit_noise=1.0, target_quantile=0.5, learning_rate=1.0)
    np.testing.assert_allclose(moved, jnp.exp(-noise.standard_normal(key, 1)[0]), rtol=1e-6)
    released, _ = release_laplace({"w": jnp.zeros(5)}, key=key, clip_norm=1.0, local_epsilon=2.0)
    np.testing.assert_array_equal(released["w"], noise.standard_laplace(jax.random.fold_in(key, 0), (5,)))


def test_a_clip_norm_whose_squares_would_vanish_is_refused():
    with pytest.raises(ValueError, match="clip_norm"):
        PrivacyConfig(clip_norm=1e-13)
    with pytest.raises(ValueError, match="clip_norm"):
        ArmConfig(clip_norm=1e-30)
    # The least one still bounds an update that is longer by seven orders of magnitude.
    clipped, _ = clip_by_global_norm({"w": jnp.full((4,), 1e-5)}, 1e-12)
    assert np.linalg.norm(np.asarray(clipped["w"], np.float64)) <= 1e-12 * (1 + 1e-5)
