"""Squash keeps directions, bounds lengths, and is smooth at the zero vector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels import squash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.test_util import check_grads

KINDS = ("sabour", "exponential")


@pytest.mark.parametrize("kind", KINDS)
def test_zero_vector_has_zero_value_and_zero_gradient(kind):
    value, vjp = jax.vjp(lambda x: squash(x, kind=kind), jnp.zeros((3, 4)))
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(vjp(jnp.ones((3, 4)))[0], 0)


@settings(deadline=None)
@given(hnp.arrays(np.float32, (5, 3), elements=st.floats(-1e4, 1e4, width=32)))
def test_length_stays_below_one_and_direction_is_kept(x):
    for kind in KINDS:
        y = np.asarray(squash(jnp.asarray(x), kind=kind), np.float64)
        assert np.all(np.isfinite(y))
        assert np.all(np.linalg.norm(y, axis=-1) <= 1 + 1e-6)
        lengths = np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
        aligned = np.sum(x * y, axis=-1, keepdims=True)
        np.testing.assert_allclose(aligned, lengths * np.linalg.norm(y, axis=-1, keepdims=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1e-3, 0.5, 1.0, 7.0])
def test_lengths_are_those_of_the_papers(length):
    vector = jnp.array([0.6, 0.8]) * length
    expected = {"sabour": length**2 / (1 + length**2), "exponential": 1 - np.exp(-length)}
    for kind in KINDS:
        got = float(jnp.linalg.norm(squash(vector, kind=kind, eps=1e-12)))
        assert got == pytest.approx(expected[kind], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("double_precision")
def test_gradient_agrees_with_finite_differences(kind):
    x = jax.random.normal(jax.random.key(0), (3, 4), dtype=jnp.float64)
    check_grads(jax.jit(lambda x: squash(x, kind=kind)), (x,), order=2)


def test_axis_chooses_the_components():
    x = jax.random.normal(jax.random.key(1), (2, 5, 3))
    np.testing.assert_allclose(squash(x, 1), jnp.swapaxes(squash(jnp.swapaxes(x, 1, 2)), 1, 2), rtol=1e-6)


def test_bfloat16_in_bfloat16_out_computed_in_float32():
    x = jax.random.normal(jax.random.key(2), (64, 8)).astype(jnp.bfloat16)
    y = squash(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, squash(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_unknown_kind_and_integers_are_refused():
    with pytest.raises(ValueError, match="kind='hinton' is unknown; choose 'sabour' or 'exponential'"):
        squash(jnp.ones(3), kind="hinton")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="floating point, got int32"):
        squash(jnp.ones(3, jnp.int32))
