"""EM routing that sees a block of votes at a time, forward and backward, wherever the votes come from.

The share of input i in output j follows from the vote and the Gaussians of the iteration before, so nothing of
size I · J outlives its block: an iteration is one pass that gathers, for every output, the sum of its shares,
their mean and their squares about that mean. The backward pass repeats the passes from the sums of each
iteration; about a constant centre they are plain sums over blocks, and so are their gradients.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.em.mixture import Mixture, Sums, maximise, pull, share
from capsfl_kernels.em.reference import Routing
from capsfl_kernels.sums import sum_leading


class Source(Protocol):
    """Where the votes of a block come from; a block is a tree of arrays, and so are all gradients together."""

    def count(self) -> int:
        """How many blocks there are."""
        ...

    def take(self, index: jax.Array) -> Any:
        """The block of that index, in the dtype of the sums."""
        ...

    def vote(self, block: Any) -> tuple[jax.Array, jax.Array]:
        """Votes (block, J, K, batch) and activations (block, batch); differentiated by JAX."""
        ...

    def add(self, grads: Any, index: jax.Array, grad_block: Any) -> Any:
        """Adds the gradient of one block to those of all."""
        ...


class Trace(NamedTuple):
    """What the backward pass needs: centres, sums about them and Gaussians of every iteration, O(J · K) each."""

    centres: list[jax.Array]
    sums: list[Sums]
    mixtures: list[Mixture]


def forward(
    source: Source, nothing: jax.Array, beta_a: jax.Array, beta_u: jax.Array, routing: Routing
) -> tuple[tuple[jax.Array, jax.Array], Trace]:
    """Routes; returns poses (J, K, batch) and log activations (J, batch), and the trace.

    Args:
        source: The votes.
        nothing: Zeros (J, K, batch) to start sums from.
        beta_a: (J,).
        beta_u: (J,).
        routing: Static choices.
    """
    trace = Trace([], [], [])
    mixture, log_activation = None, nothing[:, 0]
    for iteration in range(routing.num_iters):
        if mixture is not None:
            trace.mixtures.append(mixture)
        centre, sums = _gather_pass(source, nothing, mixture)
        mixture, log_activation = maximise(sums, centre, beta_a, beta_u, iteration, routing)
        trace.centres.append(centre)
        trace.sums.append(sums)
    assert mixture is not None
    return (mixture.mean, log_activation), trace


def backward(
    source: Source,
    grads: Any,
    trace: Trace,
    beta_a: jax.Array,
    beta_u: jax.Array,
    routing: Routing,
    grad_outputs: tuple[jax.Array, jax.Array],
) -> tuple[Any, jax.Array, jax.Array]:
    """Gradients from those of the two outputs of `forward`.

    Returns those of the source's blocks, added to the grads handed in, of beta_a and of beta_u.
    """
    grad_mean, grad_log_activation = grad_outputs
    grad_mixture = Mixture(grad_mean, jnp.zeros_like(grad_mean), jnp.zeros_like(grad_log_activation))
    grad_beta_a, grad_beta_u = jnp.zeros_like(beta_a), jnp.zeros_like(beta_u)
    for iteration in reversed(range(routing.num_iters)):
        centre = trace.centres[iteration]

        def step(sums, beta_a, beta_u, centre=centre, iteration=iteration):
            return maximise(sums, centre, beta_a, beta_u, iteration, routing)

        transpose = jax.vjp(step, trace.sums[iteration], beta_a, beta_u)[1]
        grad_sums, more_beta_a, more_beta_u = transpose((grad_mixture, grad_log_activation))
        grad_beta_a, grad_beta_u = grad_beta_a + more_beta_a, grad_beta_u + more_beta_u
        mixture = trace.mixtures[iteration - 1] if iteration else None
        grad_mixture, grads = _gradient_pass(source, grads, mixture, centre, grad_sums)
        grad_log_activation = jnp.zeros_like(grad_log_activation)
    return grads, grad_beta_a, grad_beta_u


def _gather_pass(source: Source, nothing: jax.Array, mixture: Mixture | None) -> tuple[jax.Array, Sums]:
    """One pass over all votes: their mean, and their sums about it.

    Every block takes its squares about its own mean, and two blocks merge without a difference of squares
    (Chan, Golub & LeVeque 1983): a variance far below the squared mean keeps its digits.
    """

    def step(carry: tuple, index: jax.Array) -> tuple[tuple, None]:
        votes, activations = source.vote(source.take(index))
        shared = share(votes, activations, mixture)
        received = jnp.sum(shared, axis=0)
        # About the former mean first: sums of small numbers.
        origin = nothing if mixture is None else mixture.mean
        offset = sum_leading(lambda part, vote: part[:, None] * (vote - origin), shared, votes)
        mean = origin + offset * _reciprocal(received)[:, None]
        squares = sum_leading(lambda part, vote: part[:, None] * jnp.square(vote - mean), shared, votes)
        return _merge(carry, (received, mean, squares)), None

    start = (nothing[:, 0], nothing, nothing)
    received, centre, squares = lax.scan(step, start, jnp.arange(source.count()))[0]
    return centre, Sums(received, jnp.zeros_like(centre), squares)


def _merge(one: tuple, other: tuple) -> tuple:
    """Joins the received shares, the means and the squares about the mean of two parties."""
    received = one[0] + other[0]
    fraction = (other[0] * _reciprocal(received))[:, None]
    apart = other[1] - one[1]
    squares = one[2] + other[2] + jnp.square(apart) * (one[0][:, None] * fraction)
    return received, one[1] + apart * fraction, squares


def _reciprocal(received: jax.Array) -> jax.Array:
    """1 / x, or 0 where nothing was received."""
    positive = received > 0
    return jnp.where(positive, 1 / jnp.where(positive, received, 1), 0)


def _gradient_pass(
    source: Source, grads: Any, mixture: Mixture | None, centre: jax.Array, grad_sums: Sums
) -> tuple[Mixture, Any]:
    """Gradients of the Gaussians and, added to those so far, of the blocks, from that of the sums."""

    def step(carry: tuple[Mixture, Any], index: jax.Array) -> tuple[tuple[Mixture, Any], None]:
        total, grads = carry
        (votes, activations), transpose = jax.vjp(source.vote, source.take(index))
        *grad_vote, grad_mixture = pull(votes, activations, mixture, centre, grad_sums)
        if grad_mixture is not None:
            total = jax.tree.map(jnp.add, total, grad_mixture)
        return (total, source.add(grads, index, transpose(tuple(grad_vote))[0])), None

    start = Mixture(jnp.zeros_like(centre), jnp.zeros_like(centre), jnp.zeros_like(centre[:, 0]))
    return lax.scan(step, (start, grads), jnp.arange(source.count()))[0]
