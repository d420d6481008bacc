"""Self-attention routing: every implementation equals the paper's loops, value and gradient."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels import self_attention_routing
from capsfl_kernels.self_attention import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

IMPLEMENTATIONS = ("reference", "streamed")


def _arguments(case: cases.Case, dtype=jnp.float32):
    # NumPy draws, for JAX would compile a generator for every shape.
    generator = np.random.default_rng(5)
    weights = (case.inputs, case.capsules, case.dim, case.depth)
    shapes = ((case.batch, case.inputs, case.depth), weights, weights[:2])
    return tuple(jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes)


def _run(*arguments, **options):
    with jax.numpy_dtype_promotion("strict"):
        return jax.jit(functools.partial(self_attention_routing, **options))(*arguments)


@functools.cache
def _gradient(implementation, block_size=None):
    """Loss and output, and the gradients of all three arguments; compiled once for every shape."""

    def loss(*arguments):
        output = self_attention_routing(*arguments, implementation=implementation, block_size=block_size)
        return jnp.sum(jnp.sin(3 * output)), output

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


def _route_by_hand(inputs, weights, bias):
    """The routing of Mazzia et al. 2021, one vote after the other: (N, D), (N, M, K, D), (N, M) to (M, K)."""
    number, capsules, dim, _ = weights.shape
    votes = [[weights[n, m] @ inputs[n] for m in range(capsules)] for n in range(number)]
    agreement = np.zeros((number, capsules))
    for m in range(capsules):
        for n in range(number):
            # A row of the symmetric matrix U Uᵀ / sqrt(K), summed.
            agreement[n, m] = sum(votes[n][m] @ votes[other][m] for other in range(number)) / math.sqrt(dim)
    output = np.zeros((capsules, dim))
    for m in range(capsules):
        for n in range(number):
            shares = np.exp(agreement[n] - agreement[n].max())
            output[m] += votes[n][m] * (shares[m] / shares.sum() + bias[n, m])
        length = np.linalg.norm(output[m])
        output[m] *= (1 - math.exp(-length)) / (length + 1e-7)
    return output


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", cases.SMALL)
@pytest.mark.usefixtures("double_precision")
def test_value_is_that_of_the_papers_loops(case, implementation):
    inputs, weights, bias = _arguments(case, jnp.float64)
    got = _run(inputs, weights, bias, implementation=implementation, block_size=2)
    for example, output in zip(np.asarray(inputs), got, strict=True):
        expected = _route_by_hand(example, np.asarray(weights), np.asarray(bias))
        np.testing.assert_allclose(output, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.usefixtures("double_precision")
def test_gradient_agrees_with_finite_differences(implementation):
    route = functools.partial(self_attention_routing, implementation=implementation, block_size=2)
    inputs, weights, bias = _arguments(cases.TINY, jnp.float64)
    check_grads(jax.jit(route), (inputs, 0.3 * weights, bias), order=1, modes=["rev"])


@settings(max_examples=4, deadline=None)
@given(
    # Few shapes, lest each example compile the reference anew.
    st.sampled_from([cases.Case(3, 7, 2, 3, 4), cases.Case(1, 9, 3, 1, 2), cases.Case(4, 1, 1, 4, 1)]),
    st.integers(1, 10),
)
def test_streamed_gradients_equal_stored_votes(enable_double_precision, case, block):
    with enable_double_precision():
        arguments = _arguments(case, jnp.float64)
        expected = _gradient("reference")(*arguments)
        got = _gradient("streamed", block)(*arguments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_accumulates_in_float32(implementation):
    inputs, weights, bias = _arguments(cases.Case(4, 256, 8, 4, 8), jnp.bfloat16)
    arguments = (inputs, weights * jnp.bfloat16(0.02), bias * jnp.bfloat16(0.1))
    wide = tuple(a.astype(jnp.float32) for a in arguments)
    with jax.numpy_dtype_promotion("strict"):
        (_, got), grads = _gradient(implementation)(*arguments)
    assert got.dtype == jnp.bfloat16
    (_, expected), wanted = _gradient("reference")(*wide)
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.02)
    for grad, full, argument in zip(grads, wanted, arguments, strict=True):
        assert grad.dtype == argument.dtype
        error = jnp.linalg.norm((grad.astype(jnp.float32) - full).ravel()) / jnp.linalg.norm(full.ravel())
        assert error < 0.03


@pytest.mark.parametrize("leading", [(), (2, 1, 3)])
def test_any_number_of_batch_axes(leading):
    _, weights, bias = _arguments(cases.TINY)
    inputs = _arguments(cases.TINY._replace(batch=math.prod(leading)))[0].reshape(
        *leading, cases.TINY.inputs, cases.TINY.depth
    )
    expected = _run(inputs.reshape(-1, *inputs.shape[-2:]), weights, bias, implementation="reference")
    for implementation in IMPLEMENTATIONS:
        got = _run(inputs, weights, bias, implementation=implementation)
        assert got.shape == (*leading, cases.TINY.capsules, cases.TINY.dim)
        np.testing.assert_allclose(got.reshape(expected.shape), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_bias_is_a_bias_of_zero(implementation):
    inputs, weights, bias = _arguments(cases.TINY)
    got = _run(inputs, weights, implementation=implementation)
    zero = jnp.zeros_like(bias)
    np.testing.assert_array_equal(got, _run(inputs, weights, zero, implementation=implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_capsules_of_zero_have_finite_gradients(implementation):
    inputs, weights, bias = _arguments(cases.TINY)
    (value, _), grads = _gradient(implementation)(jnp.zeros_like(inputs), weights, bias)
    assert value == 0
    assert all(np.isfinite(grad).all() for grad in grads)
    np.testing.assert_array_equal(grads[1], jnp.zeros_like(weights))


def test_agreement_beyond_the_range_of_exp_stays_finite():
    inputs, weights, bias = _arguments(cases.TINY)
    expected = _gradient("reference")(1e3 * inputs, weights, bias)
    got = _gradient("streamed")(1e3 * inputs, weights, bias)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((expected, got)))
    np.testing.assert_allclose(got[0][0], expected[0][0], rtol=1e-4)


@pytest.mark.parametrize("gradient", [False, True])
def test_temporary_memory_is_at_most_a_fifth_of_stored_votes(gradient):
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in _arguments(cases.MODERATE)]

    def temporary(implementation):
        def loss(*arguments):
            return jnp.sum(self_attention_routing(*arguments, implementation=implementation) ** 2)

        function = jax.grad(loss, argnums=(0, 1, 2)) if gradient else loss
        usage = jax.jit(function).lower(*shapes).compile().memory_analysis()
        assert usage is not None
        return usage.temp_size_in_bytes

    assert temporary("streamed") <= temporary("reference") / 5


def test_impossible_arguments_are_refused_with_both_shapes():
    u, w = jnp.ones((2, 5, 3)), jnp.ones((5, 4, 6, 3))
    with pytest.raises(ValueError, match=r"inputs \(2, 5, 3\) and weights \(6, 4, 6, 3\) do not fit"):
        self_attention_routing(u, jnp.ones((6, 4, 6, 3)))
    with pytest.raises(ValueError, match=r"weights has shape \(5, 0, 6, 3\); every axis needs at least one"):
        self_attention_routing(u, jnp.ones((5, 0, 6, 3)))
    with pytest.raises(ValueError, match=r"bias has shape \(4, 6\), but weights \(5, 4, 6, 3\) asks for \(5, 4\)"):
        self_attention_routing(u, w, jnp.ones((4, 6)))
    with pytest.raises(ValueError, match="implementation='fast' is unknown; choose from reference, streamed"):
        self_attention_routing(u, w, implementation="fast")
    with pytest.raises(ValueError, match="floating point, got int32"):
        self_attention_routing(u.astype(jnp.int32), w)
    with pytest.raises(ValueError, match="block_size=0"):
        self_attention_routing(u, w, block_size=0)
