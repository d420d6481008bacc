"""The two steps of EM routing with the batch on the minor axis, so that all small axes are summed as whole vectors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from capsfl_kernels.em.reference import Routing
from capsfl_kernels.sums import sum_leading, sum_mapped


class Mixture(NamedTuple):
    """The Gaussians of the output capsules as the next E step wants them.

    Mean and precision 1 / (2 σ²) are (J, K, batch), the prior log a − Σ log σ is (J, batch).
    """

    mean: jax.Array
    precision: jax.Array
    prior: jax.Array


class Sums(NamedTuple):
    """Of all votes V and shares r about a centre c: Σ r (J, batch), Σ r (V − c) and Σ r (V − c)² (J, K, batch)."""

    received: jax.Array
    first: jax.Array
    second: jax.Array


def share(votes: jax.Array, activations: jax.Array, mixture: Mixture | None) -> jax.Array:
    """The E step: what every output gets of every input's activation.

    Args:
        votes: (inputs, J, K, batch).
        activations: (inputs, batch).
        mixture: The Gaussians of the iteration before; None shares equally.

    Returns:
        (inputs, J, batch); the sum over J is the activation.
    """
    if mixture is None:
        return jnp.broadcast_to(activations[:, None] / votes.shape[1], (*votes.shape[:2], votes.shape[3]))

    def distance(vote: jax.Array, mean: jax.Array, precision: jax.Array) -> jax.Array:
        return jnp.square(vote - mean[None]) * precision[None]

    logits = mixture.prior[None] - sum_mapped(distance, (2, 1, 1), votes, mixture.mean, mixture.precision)
    raised = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    received = activations / sum_mapped(_itself, (1,), raised)
    return raised * received[:, None]


def pull(
    votes: jax.Array, activations: jax.Array, mixture: Mixture | None, centre: jax.Array, grad: Sums
) -> tuple[jax.Array, jax.Array, Mixture | None]:
    """Gradients of votes, activations and mixture from that of the sums about a constant centre.

    The reverse of ``Sums(Σ r, Σ r (V − c), Σ r (V − c)²)`` with ``r = share(votes, activations, mixture)``; by
    hand, since it needs a third of the passes over the block that the transpose of the single steps needs.
    """

    def along(vote: jax.Array, centre: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        centred = vote - centre[None]
        return (first[None] + second[None] * centred) * centred

    grad_shared = grad.received[None] + sum_mapped(along, (2, 1, 1, 1), votes, centre, grad.first, grad.second)
    shared = share(votes, jnp.ones_like(activations), mixture)
    grad_activations = sum_mapped(jnp.multiply, (1, 1), shared, grad_shared)
    weighted = shared * activations[:, None]
    slope = grad.first[None] + 2 * grad.second[None] * (votes - centre[None])
    grad_votes = weighted[:, :, None] * slope
    if mixture is None:
        return grad_votes, grad_activations, None
    grad_logits = weighted * (grad_shared - grad_activations[:, None])
    mean, towards = mixture.mean, 2 * mixture.precision
    grad_mixture = Mixture(
        mean=towards * sum_leading(lambda logit, vote: logit[:, None] * (vote - mean), grad_logits, votes),
        precision=-sum_leading(lambda logit, vote: logit[:, None] * jnp.square(vote - mean), grad_logits, votes),
        prior=jnp.sum(grad_logits, axis=0),
    )
    pulled = grad_logits[:, :, None] * (votes - mean[None])
    return grad_votes - pulled * towards[None], grad_activations, grad_mixture


def maximise(
    sums: Sums, centre: jax.Array, beta_a: jax.Array, beta_u: jax.Array, iteration: int, routing: Routing
) -> tuple[Mixture, jax.Array]:
    """The M step: the Gaussians, and the logarithm of the activations (J, batch), from the sums about a centre."""
    received, first, second = sums
    weight = 1 / (received + routing.eps)
    mean = (centre * received[:, None] + first) * weight[:, None]
    apart = mean - centre
    squares = second - 2 * apart * first + jnp.square(apart) * received[:, None]
    variance = (squares + routing.eps) * weight[:, None] + routing.eps
    log_deviation = jnp.sum(jnp.log(variance), axis=1) / 2
    cost = (centre.shape[1] * beta_u[:, None] + log_deviation) * received
    evidence = routing.inverse_temperature(iteration) * (beta_a[:, None] - cost)
    log_activation = jax.nn.log_sigmoid(evidence)
    return Mixture(mean, 1 / (2 * variance), log_activation - log_deviation), log_activation


def _itself(x: jax.Array) -> jax.Array:
    return x
