"""Fully connected capsules with stored votes: the plain form that the other implementations must equal."""

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import Gradient
from capsfl_kernels.votes import reference


def route(
    inputs: jax.Array,
    weights: jax.Array,
    bias: jax.Array,
    *,
    num_iters: int,
    leaky: bool,
    gradient: Gradient,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Routes inputs (batch, N, D) through weights (N, M, K, D) to (batch, M, K) in the dtype of the bias."""
    votes = jnp.einsum("bnd,nmkd->bnmk", inputs, weights, precision=precision, preferred_element_type=bias.dtype)
    return reference.route(votes, bias, num_iters=num_iters, leaky=leaky, gradient=gradient)
