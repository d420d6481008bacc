"""Routing of given votes: every implementation equals the paper's loops, at every position alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels import route_votes
from capsfl_kernels.votes import cases
from hypothesis import given, settings
from hypothesis import strategies as st

IMPLEMENTATIONS = ("reference", "streamed")


def _arguments(case: cases.Case, dtype=jnp.float32):
    # NumPy draws, for JAX would compile a generator for every shape.
    generator = np.random.default_rng(11)
    shape = (*case.positions, case.inputs, case.capsules, case.dim)
    return tuple(jnp.asarray(generator.standard_normal(size), dtype) for size in (shape, shape[-2:]))


def _run(*arguments, **options):
    return jax.jit(functools.partial(route_votes, **options))(*arguments)


@functools.cache
def _gradient(implementation, **options):
    def loss(votes, bias):
        return jnp.sum(jnp.sin(3 * route_votes(votes, bias, implementation=implementation, **options)))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", cases.SMALL)
@pytest.mark.usefixtures("double_precision")
def test_value_is_that_of_the_papers_loops(case, implementation, route_by_hand):
    votes, bias = _arguments(case, jnp.float64)
    got = _run(votes, bias, num_iters=case.num_iters, implementation=implementation, block_size=2)
    assert got.shape == (*case.positions, case.capsules, case.dim)
    for index in np.ndindex(case.positions):
        expected = route_by_hand(np.asarray(votes[index]), np.asarray(bias), case.num_iters)
        np.testing.assert_allclose(got[index], expected, rtol=1e-12, atol=1e-13)


@settings(max_examples=4, deadline=None)
@given(
    # Few shapes, lest each example compile the reference anew.
    st.sampled_from([cases.Case((3, 2), 4, 3, 2), cases.Case((), 1, 4, 3), cases.Case((4,), 3, 1, 1)]),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["full", "last"]),
    st.integers(1, 9),
)
def test_streamed_gradients_equal_stored_couplings(enable_double_precision, case, iters, leaky, gradient, block):
    with enable_double_precision():
        arguments = _arguments(case, jnp.float64)
        options = {"num_iters": iters, "leaky": leaky, "gradient": gradient}
        expected = _gradient("reference", **options)(*arguments)
        got = _gradient("streamed", **options, block_size=block)(*arguments)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), got, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_bias_is_a_bias_of_zero(implementation):
    votes, bias = _arguments(cases.TINY)
    got = route_votes(votes, implementation=implementation)
    np.testing.assert_array_equal(got, route_votes(votes, jnp.zeros_like(bias), implementation=implementation))


def test_temporary_memory_is_at_most_a_quarter_of_stored_couplings():
    def temporary(implementation):
        votes, bias = (jax.ShapeDtypeStruct(a.shape, a.dtype) for a in _arguments(cases.MODERATE))
        loss = lambda *a: jnp.sum(route_votes(*a, implementation=implementation) ** 2)  # noqa: E731
        grad = jax.jit(loss).lower(votes, bias).compile()
        usage = grad.memory_analysis()
        assert usage is not None
        return usage.temp_size_in_bytes

    assert temporary("streamed") <= temporary("reference") / 4


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match=r"votes has shape \(3, 4\), needs \(\.\.\., inputs, capsules, dim\)"):
        route_votes(jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"votes has shape \(2, 0, 3, 4\)"):
        route_votes(jnp.ones((2, 0, 3, 4)))
    with pytest.raises(ValueError, match=r"bias has shape \(4, 3\), but votes \(2, 3, 4\) asks for \(3, 4\)"):
        route_votes(jnp.ones((2, 3, 4)), jnp.ones((4, 3)))
