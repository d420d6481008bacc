"""The operators mean the same under vmap, jax.checkpoint, lax.scan, and spread over devices."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels import (
    conv_capsules,
    dynamic_routing,
    em_capsules,
    em_routing,
    route_votes,
    self_attention_routing,
)

HOSPITALS = 3
# What JAX makes of a transformed operator is in question here, not how well XLA polishes it.
UNPOLISHED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# The first iteration, from no logits, and one further one: all kinds that there are.
ITERATIONS = 2


def _stack(*shapes):
    # NumPy draws, for JAX would compile a generator for every shape.
    generator = np.random.default_rng(17)
    return tuple(jnp.asarray(generator.standard_normal((HOSPITALS, *shape)), jnp.float32) for shape in shapes)


def _em_routing(votes, beta_a, beta_u, *, implementation):
    """EM routing whose activations are read off the votes, poses and activations in one array."""
    activations = jax.nn.sigmoid(votes[..., 0, 0])
    poses, active = em_routing(votes, activations, beta_a, beta_u, num_iters=ITERATIONS, implementation=implementation)
    return jnp.concatenate([poses, active[..., None]], axis=-1)


def _em_capsules(inputs, weights, beta_a, beta_u, *, implementation):
    """EM capsules whose activations are read off the poses, poses and activations in one array."""
    activations = jax.nn.sigmoid(inputs[..., 0, 0])
    poses, active = em_capsules(
        inputs, activations, weights, beta_a, beta_u, num_iters=ITERATIONS, implementation=implementation
    )
    return jnp.concatenate([poses.reshape(*active.shape, -1), active[..., None]], axis=-1)


OPERATORS = {
    "dynamic_routing": (
        functools.partial(dynamic_routing, num_iters=ITERATIONS),
        _stack((2, 5, 3), (5, 4, 6, 3), (4, 6)),
    ),
    "route_votes": (functools.partial(route_votes, num_iters=ITERATIONS), _stack((7, 4, 3, 5), (3, 5))),
    "conv_capsules": (
        functools.partial(conv_capsules, num_iters=ITERATIONS),
        _stack((2, 3, 6, 5, 2), (3, 3, 2, 2, 3), (2, 3)),
    ),
    "self_attention_routing": (self_attention_routing, _stack((2, 5, 3), (5, 4, 6, 3), (5, 4))),
    "em_routing": (_em_routing, _stack((7, 4, 3, 5), (3,), (3,))),
    "em_capsules": (_em_capsules, _stack((2, 5, 2, 3), (5, 3, 3, 2), (3,), (3,))),
}


def _loss(operator, implementation):
    return lambda *arguments: jnp.sum(jnp.sin(3 * operator(*arguments, implementation=implementation)))


def _gradient(function, arguments):
    """`function`, a loss, with its gradients by every one of the arguments."""
    return jax.value_and_grad(function, argnums=tuple(range(len(arguments))))


def _compile(function):
    return jax.jit(function, compiler_options=UNPOLISHED)


@functools.cache
def _compiled_reference(name):
    operator, arguments = OPERATORS[name]
    return _compile(_gradient(_loss(operator, "reference"), arguments))


@functools.cache
def _one_after_the_other(name, own_weights):
    """Losses and gradients of the stored form, one hospital after the other."""
    first, *rest = OPERATORS[name][1]
    picks = [(first[i], *(a[i if own_weights else 0] for a in rest)) for i in range(HOSPITALS)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(_compiled_reference(name)(*pick) for pick in picks))


def _close(got, expected):
    # Squash has a steep gradient at short vectors: what rounding does there is measured by the array's own size.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3 * float(np.abs(b).max())), got, expected
    )


@pytest.mark.parametrize("implementation", ["reference", "streamed"])
@pytest.mark.parametrize("own_weights", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_vmap_is_one_after_the_other(name, own_weights, implementation):
    operator, (first, *rest) = OPERATORS[name]
    given = (first, *(a if own_weights else a[0] for a in rest))
    axes = (0, *[0 if own_weights else None] * len(rest))
    got = _compile(jax.vmap(_gradient(_loss(operator, implementation), given), in_axes=axes))(*given)
    _close(got, _one_after_the_other(name, own_weights))


@pytest.mark.parametrize("name", OPERATORS)
def test_gradient_of_a_vmap_is_the_vmap_of_the_gradient(name):
    operator, arguments = OPERATORS[name]
    loss = jax.vmap(_loss(operator, "streamed"))
    _, got = _compile(_gradient(lambda *a: jnp.sum(loss(*a)), arguments))(*arguments)
    _close(got, _one_after_the_other(name, True)[1])


@pytest.mark.parametrize("implementation", ["reference", "streamed"])
@pytest.mark.parametrize("name", OPERATORS)
def test_checkpoint_and_scan_change_nothing(name, implementation):
    operator, arguments = OPERATORS[name]
    gradient = _gradient(jax.checkpoint(_loss(operator, implementation)), arguments)
    got = _compile(lambda *a: jax.lax.map(lambda one: gradient(*one), a))(*arguments)
    _close(got, _one_after_the_other(name, True))


def test_pmap_and_shard_map_over_four_devices():
    script = Path(__file__).with_name("on_four_devices.py")
    flags = ["xla_force_host_platform_device_count=4", *(f"{name}={value}" for name, value in UNPOLISHED.items())]
    environment = os.environ | {"XLA_FLAGS": " ".join(f"--{flag}" for flag in flags), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(OPERATORS)
