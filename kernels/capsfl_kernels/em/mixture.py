"""The two steps of EM routing with the batch on the minor axis, so that all small axes are summed as whole vectors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from capsfl_kernels.em.reference import Routing


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
    distance = jnp.sum(jnp.square(votes - mixture.mean[None]) * mixture.precision[None], axis=2)
    logits = mixture.prior[None] - distance
    raised = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    return raised * (activations / jnp.sum(raised, axis=1))[:, None]


def pull(
    votes: jax.Array, activations: jax.Array, mixture: Mixture | None, centre: jax.Array, grad: Sums
) -> tuple[jax.Array, jax.Array, Mixture | None]:
    """Gradients of votes, activations and mixture from that of the sums about a constant centre.

    The reverse of ``Sums(Σ r, Σ r (V − c), Σ r (V − c)²)`` with ``r = share(votes, activations, mixture)``; by
    hand, since it needs a third of the passes over the block that the transpose of the single steps needs.
    """
    centred = votes - centre[None]
    slope = grad.first[None] + grad.second[None] * centred
    grad_shared = grad.received[None] + jnp.sum(slope * centred, axis=2)
    shared = share(votes, jnp.ones_like(activations), mixture)
    grad_activations = jnp.sum(shared * grad_shared, axis=1)
    weighted = shared * activations[:, None]
    grad_votes = weighted[:, :, None] * (slope + grad.second[None] * centred)
    if mixture is None:
        return grad_votes, grad_activations, None
    grad_logits = weighted * (grad_shared - grad_activations[:, None])
    apart = votes - mixture.mean[None]
    pulled = grad_logits[:, :, None] * apart
    towards = 2 * mixture.precision
    grad_mixture = Mixture(
        mean=towards * jnp.sum(pulled, axis=0),
        precision=-jnp.sum(pulled * apart, axis=0),
        prior=jnp.sum(grad_logits, axis=0),
    )
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
