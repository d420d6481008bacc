"""EM routing of stored votes as the paper writes it (Hinton et al. 2018, procedure 1), differentiated by JAX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """Static choices of an EM routing."""

    num_iters: int
    final_lambda: float
    eps: float

    def inverse_temperature(self, iteration: int) -> float:
        """λ of an iteration counted from 0; the schedule is that of the authors' answer to their reviewers."""
        return self.final_lambda * (1 - 0.95 ** (iteration + 1))


class Mixture(NamedTuple):
    """The Gaussians of the output capsules; all but the logarithm have an axis for the pose's components."""

    mean: jax.Array
    variance: jax.Array
    log_activation: jax.Array


def route(
    votes: jax.Array, activations: jax.Array, beta_a: jax.Array, beta_u: jax.Array, routing: Routing
) -> tuple[jax.Array, jax.Array]:
    """Routes votes (B, I, J, K) and activations (B, I) to poses (B, J, K) and log activations (B, J)."""
    mixture = None
    for iteration in range(routing.num_iters):
        if mixture is None:
            shared = jnp.broadcast_to(activations[:, :, None] / votes.shape[2], votes.shape[:3])
        else:
            shared = _expect(votes, mixture) * activations[:, :, None]
        mixture = _maximise(votes, shared, beta_a, beta_u, iteration, routing)
    assert mixture is not None
    return mixture.mean, mixture.log_activation


def _maximise(
    votes: jax.Array, shared: jax.Array, beta_a: jax.Array, beta_u: jax.Array, iteration: int, routing: Routing
) -> Mixture:
    """The M step: the Gaussian of every output capsule from its share (B, I, J) of the votes."""
    received = jnp.sum(shared, axis=1)
    weight = 1 / (received + routing.eps)
    mean = jnp.einsum("bij,bijk->bjk", shared, votes) * weight[:, :, None]
    squares = jnp.einsum("bij,bijk->bjk", shared, jnp.square(votes - mean[:, None]))
    variance = (squares + routing.eps) * weight[:, :, None] + routing.eps
    cost = (votes.shape[3] * beta_u[None] + jnp.sum(jnp.log(variance), axis=2) / 2) * received
    return Mixture(mean, variance, jax.nn.log_sigmoid(routing.inverse_temperature(iteration) * (beta_a[None] - cost)))


def _expect(votes: jax.Array, mixture: Mixture) -> jax.Array:
    """The E step: how probably each input capsule belongs to each output capsule, (B, I, J)."""
    mean, variance, log_activation = mixture
    distance = jnp.sum(jnp.square(votes - mean[:, None]) / variance[:, None], axis=3)
    prior = log_activation - jnp.sum(jnp.log(variance), axis=2) / 2
    return jax.nn.softmax(prior[:, None] - distance / 2, axis=2)
