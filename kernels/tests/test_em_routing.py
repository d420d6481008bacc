"""EM routing: every implementation equals procedure 1 of the paper, value and gradient, and stays finite."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels import em_capsules, em_routing
from capsfl_kernels.em import cases
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

IMPLEMENTATIONS = ("reference", "streamed")
EPS = 1e-6


def _draw(shapes, dtype):
    # NumPy draws, for JAX would compile a generator for every shape.
    generator = np.random.default_rng(23)
    return [jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes]


def _votes(case: cases.Votes, dtype=jnp.float32):
    shape = (*case.positions, case.inputs, case.outputs, case.dim)
    votes, logits, beta_a, beta_u = _draw((shape, shape[:-2], (case.outputs,), (case.outputs,)), dtype)
    return votes, jax.nn.sigmoid(logits), beta_a, beta_u


def _capsules(case: cases.Capsules, dtype=jnp.float32):
    poses = (case.batch, case.inputs, case.rows, case.inner)
    weights = (case.inputs, case.outputs, case.inner, case.columns)
    shapes = (poses, poses[:2], weights, (case.outputs,), (case.outputs,))
    poses, logits, weights, beta_a, beta_u = _draw(shapes, dtype)
    return poses, jax.nn.sigmoid(logits), weights, beta_a, beta_u


def _run(operator, arguments, **options):
    with jax.numpy_dtype_promotion("strict"):
        return jax.jit(functools.partial(operator, **options))(*arguments)


@functools.cache
def _stored(operator):
    return jax.jit(functools.partial(operator, implementation="reference"))


@functools.cache
def _gradient(operator, implementation, **options):
    """Loss and outputs, and the gradients of all arguments; compiled once for every shape."""

    def loss(*arguments):
        poses, activations = operator(*arguments, implementation=implementation, **options)
        # A sum of different weights, lest symmetric mistakes cancel.
        total = jnp.sum(jnp.sin(3 * poses)) + jnp.sum(
            jnp.cos(5 * activations + jnp.arange(activations.size).reshape(activations.shape))
        )
        return total, (poses, activations)

    count = 4 if operator is em_routing else 5
    return jax.jit(jax.value_and_grad(loss, argnums=tuple(range(count)), has_aux=True))


def _route_by_hand(votes, activations, beta_a, beta_u, num_iters, final_lambda=0.01):
    """Procedure 1 of Hinton et al. 2018 with the densities written out: (I, J, K), (I,) to (J, K), (J,)."""
    inputs, outputs, dim = votes.shape
    assigned = np.full((inputs, outputs), 1 / outputs)
    mean, variance, active = np.zeros((outputs, dim)), np.zeros((outputs, dim)), np.zeros(outputs)
    for iteration in range(1, num_iters + 1):
        inverse_temperature = final_lambda * (1 - 0.95**iteration)
        for j in range(outputs):
            shares = [assigned[i, j] * activations[i] for i in range(inputs)]
            total = sum(shares)
            cost = 0.0
            for h in range(dim):
                mean[j, h] = sum(shares[i] * votes[i, j, h] for i in range(inputs)) / (total + EPS)
                spread = sum(shares[i] * (votes[i, j, h] - mean[j, h]) ** 2 for i in range(inputs))
                variance[j, h] = (spread + EPS) / (total + EPS) + EPS
                cost += (beta_u[j] + math.log(math.sqrt(variance[j, h]))) * total
            active[j] = 1 / (1 + math.exp(-inverse_temperature * (beta_a[j] - cost)))
        for i in range(inputs):
            density = np.zeros(outputs)
            for j in range(outputs):
                exponent = -np.sum((votes[i, j] - mean[j]) ** 2 / (2 * variance[j]))
                density[j] = math.exp(exponent) / math.sqrt(np.prod(2 * math.pi * variance[j]))
            assigned[i] = active * density / np.sum(active * density)
    return mean, active


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", cases.SMALL_VOTES)
@pytest.mark.usefixtures("double_precision")
def test_routed_votes_are_those_of_the_papers_loops(case, implementation):
    arguments = _votes(case, jnp.float64)
    options = {"num_iters": case.num_iters, "final_lambda": 0.3}
    poses, active = _run(em_routing, arguments, **options, implementation=implementation, block_size=2)
    assert poses.shape == (*case.positions, case.outputs, case.dim)
    votes, activations, beta_a, beta_u = map(np.asarray, arguments)
    for index in np.ndindex(case.positions):
        expected = _route_by_hand(votes[index], activations[index], beta_a, beta_u, **options)
        np.testing.assert_allclose(poses[index], expected[0], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(active[index], expected[1], rtol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", cases.SMALL_CAPSULES)
@pytest.mark.usefixtures("double_precision")
def test_routed_capsules_are_those_of_the_papers_loops(case, implementation):
    arguments = _capsules(case, jnp.float64)
    options = {"num_iters": case.num_iters, "final_lambda": 0.3}
    poses, active = _run(em_capsules, arguments, **options, implementation=implementation, block_size=2)
    assert poses.shape == (case.batch, case.outputs, case.rows, case.columns)
    given, activations, weights, beta_a, beta_u = map(np.asarray, arguments)
    for index in range(case.batch):
        votes = np.array([[given[index, i] @ w for w in row] for i, row in enumerate(weights)])
        flat = votes.reshape(case.inputs, case.outputs, -1)
        expected = _route_by_hand(flat, activations[index], beta_a, beta_u, **options)
        np.testing.assert_allclose(poses[index], expected[0].reshape(poses.shape[1:]), rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(active[index], expected[1], rtol=1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("operator", [em_routing, em_capsules])
@pytest.mark.usefixtures("double_precision")
def test_gradient_agrees_with_finite_differences(operator, implementation):
    def route(*arguments):
        return operator(*arguments, num_iters=2, final_lambda=0.3, implementation=implementation, block_size=2)

    arguments = (
        _votes(cases.TINY_VOTES, jnp.float64) if operator is em_routing else _capsules(cases.TINY_CAPSULES, jnp.float64)
    )
    check_grads(jax.jit(route), arguments, order=1, modes=["rev"], eps=1e-5)


# Few shapes, lest each example compile the reference anew.
@settings(max_examples=3, deadline=None)
@given(
    st.sampled_from([cases.Votes((3, 2), 7, 3, 2), cases.Votes((5,), 4, 1, 4, 2), cases.Votes((), 5, 4, 1)]),
    st.integers(1, 6),
    st.integers(0, 4),
)
def test_tiled_gradients_equal_those_of_all_votes_at_once(enable_double_precision, case, block, small):
    with enable_double_precision(), pytest.MonkeyPatch.context() as patch:
        # A working set of few votes, so that blocks of inputs neither cover all nor always divide them.
        vote = 8 * case.outputs * case.dim
        patch.setattr("capsfl_kernels.em.api.working_set", lambda **_: vote * (1 + small) * block)
        arguments = _votes(case, jnp.float64)
        expected = _gradient(em_routing, "reference", num_iters=case.num_iters)(*arguments)
        # Compiled anew, for what is cached was compiled under another working set.
        streamed = _gradient.__wrapped__(em_routing, "streamed", num_iters=case.num_iters, block_size=block)
        _close(streamed(*arguments), expected)


@settings(max_examples=3, deadline=None)
@given(
    st.sampled_from(
        [cases.Capsules(2, 7, 3, 2, 1, 3), cases.Capsules(3, 4, 1, 1, 3, 2, 2), cases.Capsules(1, 5, 4, 3, 2, 1)]
    ),
    st.integers(1, 8),
)
def test_streamed_gradients_equal_those_of_stored_votes(enable_double_precision, case, block):
    with enable_double_precision():
        arguments = _capsules(case, jnp.float64)
        expected = _gradient(em_capsules, "reference", num_iters=case.num_iters)(*arguments)
        got = _gradient(em_capsules, "streamed", num_iters=case.num_iters, block_size=block)(*arguments)
        _close(got, expected)


def _close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), got, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("trouble", ["identical votes", "no activation", "one active input", "far votes"])
def test_degenerate_votes_have_finite_values_and_gradients(trouble, implementation):
    votes, activations, beta_a, beta_u = _votes(cases.TINY_VOTES)
    if trouble == "identical votes":
        votes = jnp.full_like(votes, 0.7)
    elif trouble == "no activation":
        activations = jnp.zeros_like(activations)
    elif trouble == "one active input":
        activations = jnp.zeros_like(activations).at[..., 0].set(1)
    else:
        votes = votes.at[..., 0, :, :].mul(1e4)
    (value, _), grads = _gradient(em_routing, implementation)(votes, activations, beta_a, beta_u)
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_capsules_without_pose_and_activation_have_finite_gradients(implementation):
    poses, activations, weights, beta_a, beta_u = _capsules(cases.TINY_CAPSULES)
    nothing = jnp.zeros_like(poses), jnp.zeros_like(activations), weights, beta_a, beta_u
    (value, _), grads = _gradient(em_capsules, implementation)(*nothing)
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)
    np.testing.assert_array_equal(grads[0], jnp.zeros_like(poses))
    np.testing.assert_array_equal(grads[2], jnp.zeros_like(weights))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_variance_far_below_the_mean_keeps_its_digits_in_float32(implementation):
    # Votes near 100 that differ by 0.1: in float32 a mean of squares less a squared mean knows none of it.
    votes = 100 + 0.1 * jax.random.normal(jax.random.key(0), (2, 64, 1, 3))
    arguments = votes, jnp.ones((2, 64)), jnp.zeros(1), jnp.zeros(1)
    options = {"num_iters": 1, "final_lambda": 0.3}
    _, active = _run(em_routing, arguments, **options, implementation=implementation, block_size=1)
    given = np.asarray(votes, np.float64)
    for example, found in zip(given, active, strict=True):
        _, expected = _route_by_hand(example, np.ones(64), np.zeros(1), np.zeros(1), **options)
        np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_is_computed_in_float32(implementation):
    poses, activations, weights, beta_a, beta_u = _capsules(cases.Capsules(3, 24, 4, 2, 2, 2), jnp.bfloat16)
    arguments = (poses, activations, weights, beta_a, beta_u)
    wide = tuple(a.astype(jnp.float32) for a in arguments)
    got = _run(em_capsules, arguments, implementation=implementation, block_size=5)
    for short, long in zip(got, _stored(em_capsules)(*wide), strict=True):
        assert short.dtype == jnp.bfloat16
        np.testing.assert_allclose(short.astype(jnp.float32), long, atol=0.02)
    votes = jnp.einsum("bipq,ijqr->bijpr", poses, weights).reshape(3, 24, 4, 4)
    routed = _run(em_routing, (votes, activations, beta_a, beta_u), implementation=implementation)
    expected = _stored(em_routing)(votes.astype(jnp.float32), wide[1], *wide[3:])
    for short, long in zip(routed, expected, strict=True):
        assert short.dtype == jnp.bfloat16
        np.testing.assert_allclose(short.astype(jnp.float32), long, atol=0.02)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    ("operator", "make", "case"),
    [(em_routing, _votes, cases.WINDOWS), (em_capsules, _capsules, cases.MODERATE)],
    ids=["em_routing", "em_capsules"],
)
def test_temporary_memory_is_at_most_a_fifth_of_the_reference(operator, make, case, gradient):
    shapes = jax.eval_shape(lambda: make(case))

    def temporary(implementation):
        def loss(*arguments):
            poses, activations = operator(*arguments, implementation=implementation)
            return jnp.sum(poses**2) + jnp.sum(activations)

        function = jax.grad(loss, argnums=tuple(range(len(shapes)))) if gradient else loss
        usage = jax.jit(function).lower(*shapes).compile().memory_analysis()
        assert usage is not None
        return usage.temp_size_in_bytes

    assert temporary("streamed") <= temporary("reference") / 5


def test_any_number_of_batch_axes():
    poses, activations, weights, *betas = _capsules(cases.TINY_CAPSULES)
    for implementation in IMPLEMENTATIONS:
        (_, flat), _ = _gradient(em_capsules, implementation)(poses, activations, weights, *betas)
        axes = _run(em_capsules, (poses[:, None], activations[:, None], weights, *betas), implementation=implementation)
        alone = _run(em_capsules, (poses[1], activations[1], weights, *betas), implementation=implementation)
        for one, many, single in zip(flat, axes, alone, strict=True):
            assert many.shape == (one.shape[0], 1, *one.shape[1:])
            np.testing.assert_allclose(many[:, 0], one, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(single, one[1], rtol=1e-4, atol=1e-6)


def test_impossible_arguments_are_refused_with_both_shapes():
    votes, activations, beta_a, beta_u = _votes(cases.TINY_VOTES)
    with pytest.raises(ValueError, match=r"votes \(2, 2, 4, 3, 5\) and activations \(2, 4\) do not fit"):
        em_routing(votes, activations[0], beta_a, beta_u)
    with pytest.raises(ValueError, match=r"beta_u has shape \(2,\), but votes \(2, 2, 4, 3, 5\) asks for \(3,\)"):
        em_routing(votes, activations, beta_a, beta_u[:2])
    with pytest.raises(ValueError, match="num_iters=0 must be an integer"):
        em_routing(votes, activations, beta_a, beta_u, num_iters=0)
    with pytest.raises(ValueError, match=r"eps=0\.0 must be above zero"):
        em_routing(votes, activations, beta_a, beta_u, eps=0.0)
    with pytest.raises(ValueError, match="implementation='fast' is unknown; choose from reference, streamed"):
        em_routing(votes, activations, beta_a, beta_u, implementation="fast")
    poses, activations, weights, beta_a, beta_u = _capsules(cases.TINY_CAPSULES)
    with pytest.raises(ValueError, match=r"poses \(2, 5, 2, 3\) and weights \(5, 3, 2, 2\) do not fit"):
        em_capsules(poses, activations, weights[:, :, :2], beta_a, beta_u)
    with pytest.raises(ValueError, match=r"poses \(2, 5, 2, 3\) and activations \(2, 4\) do not fit"):
        em_capsules(poses, activations[:, :4], weights, beta_a, beta_u)
    with pytest.raises(ValueError, match=r"beta_a has shape \(1,\), but weights \(5, 3, 3, 2\) asks for \(3,\)"):
        em_capsules(poses, activations, weights, beta_a[:1], beta_u)
    with pytest.raises(ValueError, match="block_size=0"):
        em_capsules(poses, activations, weights, beta_a, beta_u, block_size=0)
