"""pmap and shard_map change nothing; test_transformations runs this in a process with four devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from capsfl_kernels import (
    conv_capsules,
    dynamic_routing,
    em_capsules,
    em_routing,
    route_votes,
    self_attention_routing,
)
from jax.sharding import AxisType, PartitionSpec

DEVICES = 4
# The first iteration, from no logits, and one further one: all kinds that there are.
ITERATIONS = 2


def check(operator, *shapes: tuple[int, ...]) -> None:
    """Shards axis 0 of the first argument over the devices, the others replicated, and compares."""
    # NumPy draws, for JAX would compile a generator for every shape.
    generator = np.random.default_rng(0)
    arguments = [jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes]
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
    specs = (PartitionSpec("devices"), *[PartitionSpec()] * (len(shapes) - 1))
    positions = tuple(range(len(shapes)))

    def loss(implementation):
        return lambda *a: jnp.sum(jnp.sin(3 * operator(*a, implementation=implementation)))

    expected = jax.jit(jax.value_and_grad(loss("reference"), argnums=positions))(*arguments)

    # A gradient taken inside: JAX sums the gradients of replicated arguments over the devices.
    def local(*a):
        value, grads = jax.value_and_grad(loss("streamed"), argnums=positions)(*a)
        return jax.lax.psum(value, "devices"), grads

    inside = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(PartitionSpec(), specs))
    _close(jax.jit(inside)(*arguments), expected)

    # A gradient taken outside, through the shard_map.
    total = jax.shard_map(
        lambda *a: jax.lax.psum(loss("streamed")(*a), "devices"),
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec(),
    )
    _close(jax.jit(jax.value_and_grad(total, argnums=positions))(*arguments), expected)

    first, *rest = arguments
    split = first.reshape(DEVICES, -1, *first.shape[1:])
    grad = jax.pmap(
        lambda *a: jax.value_and_grad(loss("streamed"), argnums=positions)(*a),
        in_axes=(0, *[None] * len(rest)),
    )
    value, (grad_first, *grad_rest) = grad(split, *rest)
    joined = np.asarray(grad_first).reshape(first.shape)
    _close((np.sum(value), (joined, *(np.sum(np.asarray(g), axis=0) for g in grad_rest))), expected)


def _close(got, expected) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4), got, expected)


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


if __name__ == "__main__":
    assert jax.device_count() == DEVICES
    check(functools.partial(dynamic_routing, num_iters=ITERATIONS), (4, 5, 3), (5, 4, 6, 3), (4, 6))
    print("dynamic_routing")
    check(functools.partial(route_votes, num_iters=ITERATIONS), (8, 4, 3, 5), (3, 5))
    print("route_votes")
    check(functools.partial(conv_capsules, num_iters=ITERATIONS), (4, 3, 6, 5, 2), (3, 3, 2, 2, 3), (2, 3))
    print("conv_capsules")
    check(self_attention_routing, (4, 5, 3), (5, 4, 6, 3), (5, 4))
    print("self_attention_routing")
    check(_em_routing, (8, 4, 3, 5), (3,), (3,))
    print("em_routing")
    check(_em_capsules, (4, 5, 2, 3), (5, 3, 3, 2), (3,), (3,))
    print("em_capsules")
