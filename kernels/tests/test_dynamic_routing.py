"""Fully connected routing: every implementation equals the paper's loops, value and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels import dynamic_routing
from capsfl_kernels.dynamic import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

IMPLEMENTATIONS = ("reference", "streamed")


def _arguments(case: cases.Case, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(7), 3)
    return (
        jax.random.normal(keys[0], (case.batch, case.inputs, case.depth), dtype),
        jax.random.normal(keys[1], (case.inputs, case.capsules, case.dim, case.depth), dtype),
        jax.random.normal(keys[2], (case.capsules, case.dim), dtype),
    )


def _gradients(implementation, arguments, **options):
    def loss(inputs, weights, bias):
        return jnp.sum(jnp.sin(3 * dynamic_routing(inputs, weights, bias, implementation=implementation, **options)))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("case", cases.SMALL)
@pytest.mark.usefixtures("double_precision")
def test_value_is_that_of_the_papers_loops(case, leaky, implementation, route_by_hand):
    inputs, weights, bias = _arguments(case, jnp.float64)
    got = dynamic_routing(
        inputs,
        weights,
        bias,
        num_iters=case.num_iters,
        leaky=leaky,
        implementation=implementation,
        block_size=2,
    )
    for example, output in zip(np.asarray(inputs), got, strict=True):
        votes = np.stack([[w @ u for w in row] for u, row in zip(example, np.asarray(weights), strict=True)])
        expected = route_by_hand(votes, np.asarray(bias), case.num_iters, leaky)
        np.testing.assert_allclose(output, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.usefixtures("double_precision")
def test_full_gradient_agrees_with_finite_differences(implementation, leaky):
    route = functools.partial(dynamic_routing, leaky=leaky, implementation=implementation, block_size=2)
    check_grads(route, _arguments(cases.TINY, jnp.float64), order=1, modes=["rev"])


@settings(max_examples=6, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["full", "last"]),
    st.integers(1, 10),
)
def test_streamed_gradients_equal_stored_votes(batch, inputs, depth, capsules, dim, iters, leaky, gradient, block):
    with jax.enable_x64(True):
        arguments = _arguments(cases.Case(batch, inputs, depth, capsules, dim), jnp.float64)
        options = {"num_iters": iters, "leaky": leaky, "gradient": gradient}
        expected = _gradients("reference", arguments, **options)
        got = _gradients("streamed", arguments, **options, block_size=block)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, expected)


@pytest.mark.usefixtures("double_precision")
def test_last_gradient_takes_the_couplings_as_constants():
    inputs, weights, bias = _arguments(cases.TINY, jnp.float64)

    def frozen(inputs, weights, bias):
        """One more sum under the couplings that two iterations leave behind."""
        votes = jnp.einsum("bnd,nmkd->bnmk", inputs, weights)
        kept = jax.lax.stop_gradient(votes)
        fixed = jax.lax.stop_gradient(bias)
        first = dynamic_routing(inputs, weights, fixed, num_iters=1)
        second = dynamic_routing(inputs, weights, fixed, num_iters=2)
        logits = jnp.einsum("bnmk,bmk->bnm", kept, jax.lax.stop_gradient(first + second))
        total = jnp.einsum("bnm,bnmk->bmk", jax.nn.softmax(logits, -1), votes) + bias[None]
        squared = jnp.sum(total * total, -1, keepdims=True)
        return jnp.sum(jnp.sin(3 * total * squared / (1 + squared) / jnp.sqrt(squared + 1e-7)))

    expected = jax.grad(frozen, argnums=(0, 1, 2))(inputs, weights, bias)
    full = _gradients("reference", (inputs, weights, bias))[1]
    for implementation in IMPLEMENTATIONS:
        got = _gradients(implementation, (inputs, weights, bias), gradient="last")[1]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, expected)
        assert not np.allclose(got[0], full[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_accumulates_in_float32(implementation):
    arguments = _arguments(cases.Case(4, 512, 8, 4, 8), jnp.bfloat16)
    arguments = (arguments[0], arguments[1] * jnp.bfloat16(0.05), arguments[2])
    wide = tuple(a.astype(jnp.float32) for a in arguments)
    got = dynamic_routing(*arguments, implementation=implementation)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), dynamic_routing(*wide, implementation="reference"), atol=0.02)
    _, grads = _gradients(implementation, arguments)
    _, expected = _gradients("reference", wide)
    for grad, full, argument in zip(grads, expected, arguments, strict=True):
        assert grad.dtype == argument.dtype
        error = jnp.linalg.norm((grad.astype(jnp.float32) - full).ravel()) / jnp.linalg.norm(full.ravel())
        assert error < 0.03


@pytest.mark.parametrize("leading", [(), (2,), (2, 1, 3)])
def test_any_number_of_batch_axes(leading):
    _, weights, bias = _arguments(cases.TINY)
    inputs = jax.random.normal(jax.random.key(3), (*leading, cases.TINY.inputs, cases.TINY.depth))
    flat = inputs.reshape(-1, *inputs.shape[-2:])
    for implementation in IMPLEMENTATIONS:
        got = dynamic_routing(inputs, weights, bias, implementation=implementation)
        one = dynamic_routing(flat, weights, bias, implementation="reference")
        assert got.shape == (*leading, cases.TINY.capsules, cases.TINY.dim)
        np.testing.assert_allclose(got.reshape(one.shape), one, rtol=1e-4, atol=1e-6)


def test_temporary_memory_is_at_most_an_eighth_of_stored_votes():
    arguments = _arguments(cases.MODERATE)

    def temporary(implementation):
        def loss(*arguments):
            return jnp.sum(dynamic_routing(*arguments, implementation=implementation) ** 2)

        shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments]
        compiled = jax.jit(loss).lower(*shapes).compile()
        usage = compiled.memory_analysis()
        assert usage is not None
        return usage.temp_size_in_bytes

    assert temporary("streamed") <= temporary("reference") / 8


def test_impossible_arguments_are_refused_with_both_shapes():
    u, w = jnp.ones((2, 5, 3)), jnp.ones((5, 4, 6, 3))
    with pytest.raises(ValueError, match=r"inputs \(2, 5, 3\) and weights \(6, 4, 6, 3\) do not fit"):
        dynamic_routing(u, jnp.ones((6, 4, 6, 3)))
    with pytest.raises(ValueError, match=r"weights has shape \(5, 0, 6, 3\); every axis needs at least one"):
        dynamic_routing(u, jnp.ones((5, 0, 6, 3)))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\), but weights \(5, 4, 6, 3\) asks for \(4, 6\)"):
        dynamic_routing(u, w, jnp.ones(4))
    with pytest.raises(ValueError, match="implementation='fast' is unknown; choose from reference, streamed"):
        dynamic_routing(u, w, implementation=("streamed", "fast"))
    with pytest.raises(ValueError, match="num_iters=0 must be an integer of at least 1"):
        dynamic_routing(u, w, num_iters=0)
    with pytest.raises(ValueError, match="gradient='some' is unknown"):
        dynamic_routing(u, w, gradient="some")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="floating point, got int32"):
        dynamic_routing(u.astype(jnp.int32), w)
    with pytest.raises(ValueError, match="block_size=0"):
        dynamic_routing(u, w, block_size=0)


def test_a_sequence_of_implementations_runs_the_first():
    arguments = _arguments(cases.TINY)
    first = str(jax.make_jaxpr(lambda *a: dynamic_routing(*a, implementation=("streamed", "reference")))(*arguments))
    other = str(jax.make_jaxpr(lambda *a: dynamic_routing(*a, implementation=("reference", "streamed")))(*arguments))
    assert "custom_vjp_call" in first
    assert "custom_vjp_call" not in other
