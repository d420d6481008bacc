"""Self-attention routing with stored votes: the plain form that the other implementation must equal."""

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.squash import squash


def route(inputs: jax.Array, weights: jax.Array, bias: jax.Array, *, precision: lax.PrecisionLike) -> jax.Array:
    """Routes inputs (batch, N, D) through weights (N, M, K, D) to (batch, M, K) in the dtype of the bias (N, M)."""
    votes = jnp.einsum("bnd,nmkd->bnmk", inputs, weights, precision=precision, preferred_element_type=bias.dtype)
    total = jnp.sum(votes, axis=1)
    agreement = jnp.einsum("bnmk,bmk->bnm", votes, total) / votes.shape[3] ** 0.5
    coupling = jax.nn.softmax(agreement, axis=2) + bias[None]
    return squash(jnp.einsum("bnm,bnmk->bmk", coupling, votes), kind="exponential")
