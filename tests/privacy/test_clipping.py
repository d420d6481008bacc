"""No update, whatever it holds, leaves clipping with a norm above S."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from capsfl.privacy import clip_by_global_norm

ROUNDING = 1e-6


def _norm(tree):
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.linalg.norm(np.concatenate(leaves)) if leaves else 0.0


@pytest.mark.parametrize(("norm", "expected"), [(0.1, 0.1), (0.5, 0.5), (1, 1), (2, 1), (50, 1)])
def test_norms_above_the_bound_come_down_to_it_and_the_others_stay(norm, expected):
    update = {"kernel": jnp.full((3, 4), norm / 4.0), "bias": jnp.full((4,), norm / 4.0)}
    clipped, measured = clip_by_global_norm(update, 1.0)
    assert float(measured) == pytest.approx(norm)
    assert _norm(clipped) == pytest.approx(expected)


finite = st.floats(-1e6, 1e6, width=32)
trees = st.tuples(arrays(np.float32, (3, 2), elements=finite), arrays(np.float32, (4,), elements=finite))
bounds = st.floats(2**-10, 2**10, width=32)


@settings(max_examples=200, deadline=None)
@given(trees, bounds)
def test_the_norm_is_bounded_and_the_direction_kept(update, bound):
    clipped, measured = clip_by_global_norm(jax.tree.map(jnp.asarray, update), bound)
    norm = _norm(update)
    assert float(measured) == pytest.approx(norm, rel=1e-5, abs=1e-18)
    assert _norm(clipped) <= bound * (1 + ROUNDING)
    factor = min(1.0, bound / norm) if norm else 1.0
    for before, after in zip(update, clipped, strict=True):
        np.testing.assert_allclose(after, before * factor, rtol=1e-5, atol=1e-30)


@settings(max_examples=200, deadline=None)
@given(
    arrays(np.float32, (6,), elements=st.floats(width=32, allow_nan=True, allow_infinity=True)),
    bounds,
)
def test_any_bit_pattern_is_bounded_or_discarded_and_flagged(values, bound):
    clipped, norm = clip_by_global_norm({"weights": jnp.asarray(values)}, bound)
    assert _norm(clipped) <= bound * (1 + ROUNDING)
    if not np.isfinite(norm):
        np.testing.assert_array_equal(clipped["weights"], np.zeros(6))
    if not np.isfinite(values).all():
        assert not np.isfinite(norm)


def test_updates_within_the_bound_are_unchanged_bit_for_bit():
    update = jnp.asarray(np.random.default_rng(0).normal(size=(500,)), jnp.float32)
    clipped, norm = clip_by_global_norm(update, float(np.nextafter(np.float32(_norm(update)), np.inf)) * 1.001)
    np.testing.assert_array_equal(clipped, update)
    assert float(norm) > 0


@pytest.mark.parametrize("bound", [5.0, 2.0**-20, 2.0**20])
def test_clipping_is_exact_at_just_below_and_just_above_the_bound(bound):
    unit = np.float32(bound / 5)
    at = jnp.asarray([3 * unit, 0, -4 * unit])  # of norm S without rounding
    clipped, norm = clip_by_global_norm(at, bound)
    assert float(norm) == bound
    np.testing.assert_array_equal(clipped, at)
    below, _ = clip_by_global_norm(at, float(np.nextafter(np.float32(bound), np.float32(np.inf))))
    np.testing.assert_array_equal(below, at)
    # One unit in the last place above S: scaled by a factor below 1, and S is kept to the last place.
    less = np.nextafter(np.float32(bound), np.float32(0))
    above, _ = clip_by_global_norm(at, float(less))
    assert _norm(above) == pytest.approx(float(less), rel=2**-22)
    assert (np.abs(above) <= np.abs(at)).all()
    assert not np.array_equal(above, at)
    far, _ = clip_by_global_norm(at * 1024, bound)
    np.testing.assert_array_equal(far, at)  # a power of two comes back exactly


def test_zero_and_empty_updates_pass():
    clipped, norm = clip_by_global_norm({"a": jnp.zeros((2, 3)), "b": jnp.zeros(())}, 0.5)
    assert _norm(clipped) == 0
    assert float(norm) == 0
    assert float(clip_by_global_norm({}, 1.0)[1]) == 0


def test_the_bound_is_on_the_whole_update_and_not_on_each_leaf():
    clipped, _ = clip_by_global_norm([jnp.full((1,), 3.0), jnp.full((1,), 4.0)], 1.0)
    np.testing.assert_allclose(np.concatenate(clipped), [0.6, 0.8], rtol=1e-6)


def test_a_million_elements_keep_the_bound_to_float32_rounding():
    update = jnp.asarray(np.random.default_rng(1).normal(size=(1_000_000,)), jnp.float32)
    clipped, norm = jax.jit(clip_by_global_norm)(update, 1.0)
    assert float(norm) == pytest.approx(_norm(update), rel=1e-6)
    assert _norm(clipped) == pytest.approx(1.0, rel=ROUNDING)


def test_narrow_leaves_are_widened_rather_than_rounded_past_the_bound():
    update = jnp.asarray(np.random.default_rng(2).normal(size=(1000,)), jnp.bfloat16)
    clipped, norm = clip_by_global_norm(update, 1.0)
    assert clipped.dtype == jnp.float32
    assert norm.dtype == jnp.float32
    assert _norm(clipped) <= 1 + ROUNDING


def test_one_broken_hospital_spoils_no_other_under_vmap():
    updates = {"weights": jnp.stack([jnp.full((4,), 1.0), jnp.full((4,), jnp.nan), jnp.full((4,), 0.1)])}
    clipped, norms = jax.vmap(clip_by_global_norm, in_axes=(0, None))(updates, 1.0)
    np.testing.assert_allclose(clipped["weights"][:, 0], [0.5, 0.0, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(np.isfinite(norms), [True, False, True])


def test_strict_promotion_and_a_traced_bound_are_accepted():
    with jax.numpy_dtype_promotion("strict"):
        clipped, _ = jax.jit(clip_by_global_norm)({"w": jnp.full((4,), 2.0)}, jnp.float32(1.0))
    assert _norm(clipped) == pytest.approx(1.0)
