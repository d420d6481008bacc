"""The Hopper kernels of dynamic routing on the GPU itself; emulated runs are in test_mosaic_gpu.

JAX_PLATFORMS=cuda pytest kernels/tests/test_on_gpu.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels.dynamic import cases, mosaic_gpu, reference
from capsfl_kernels.votes.tile import Routing
from jax import lax

_SHAPE = (1, 16, 1, 16, 4)  # batch, N, M, K, D of no more than one thread block
pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu" or mosaic_gpu.obstacle(*_SHAPE, jnp.float32) is not None,
    reason="needs a Hopper GPU and JAX_PLATFORMS=cuda",
)

SHAPES = {
    "tiny": cases.TINY,
    "one output": cases.ONE_OUTPUT,
    "one input": cases.SINGLE_INPUT,
    "many classes": cases.MANY_CLASSES,
    "blocks and tiles": cases.Case(batch=65, inputs=35, depth=2, capsules=2, dim=3),
    "wide": cases.Case(batch=70, inputs=50, depth=16, capsules=3, dim=64),
    "moderate": cases.MODERATE,
    "digits": cases.DIGITS,
    "many inputs": cases.MANY_INPUTS,
}


def _arguments(case: cases.Case, dtype):
    generator = np.random.default_rng(7)
    inputs = generator.standard_normal((case.batch, case.inputs, case.depth))
    # Sums of N votes of this size stay where the squash is neither linear nor flat.
    weights = generator.standard_normal((case.inputs, case.capsules, case.dim, case.depth)) / np.sqrt(case.inputs)
    bias = generator.standard_normal((case.capsules, case.dim)) / 10
    return jnp.asarray(inputs, dtype), jnp.asarray(weights, dtype), jnp.asarray(bias, jnp.float32)


def _with_gradients(route):
    def loss(*arguments):
        output = route(*arguments)
        return jnp.sum(jnp.sin(3 * output)), output

    def run(*arguments):
        (_, output), grads = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*arguments)
        return output, grads

    return jax.jit(run)


def _expected(routing: Routing, arguments):
    """Stored votes in float64."""
    with jax.enable_x64(True):
        doubled = [jnp.asarray(np.asarray(x, np.float64)) for x in arguments]
        stored = functools.partial(reference.route, **routing._asdict(), precision=lax.Precision.HIGHEST)
        return jax.tree.map(np.asarray, _with_gradients(stored)(*doubled))


def _differences(got, expected) -> list[float]:
    """Of the output and of each gradient, relative to its norm."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return [float(np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)) for a, b in pairs]


@pytest.mark.parametrize("gradient", ["full", "last"])
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_value_and_gradients_are_those_of_float64(name, leaky, gradient, record_property):
    arguments = _arguments(SHAPES[name], jnp.float32)
    routing = Routing(SHAPES[name].num_iters, leaky, gradient)
    run = _with_gradients(functools.partial(mosaic_gpu.route, routing=routing))
    differences = _differences(run(*arguments), _expected(routing, arguments))
    record_property("differences", differences)
    assert max(differences) < 2e-5, differences


@pytest.mark.parametrize("name", ["tiny", "blocks and tiles", "digits"])
def test_bfloat16_is_within_its_own_rounding(name):
    arguments = _arguments(SHAPES[name], jnp.bfloat16)
    routing = Routing(SHAPES[name].num_iters, False, "full")
    run = _with_gradients(functools.partial(mosaic_gpu.route, routing=routing))
    differences = _differences(run(*arguments), _expected(routing, arguments))
    assert max(differences) < 3e-2, differences


def test_runs_under_vmap_and_gives_the_same_twice():
    arguments = _arguments(cases.DIGITS._replace(batch=32), jnp.float32)
    route = jax.jit(functools.partial(mosaic_gpu.route, routing=Routing(3, False, "full")))
    once = route(*arguments)
    np.testing.assert_array_equal(route(*arguments), once)
    halves = arguments[0].reshape(2, 16, *arguments[0].shape[1:])
    mapped = jax.jit(jax.vmap(route, in_axes=(0, None, None)))(halves, *arguments[1:])
    np.testing.assert_allclose(mapped.reshape(once.shape), once, atol=2e-5)
