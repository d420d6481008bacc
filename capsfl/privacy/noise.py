"""Draws of noise whose support reaches far past the deltas that are accounted.

JAX inverts a float32 uniform of 23 bits, so its normal draws never leave 5.5 standard deviations, its Laplace draws
never 16 scales. Noise that ends is not the mechanism that is accounted: where a hospital's part pushes a coordinate
past the end, the release gives it away for certain, and with normal draws that happens with probability
P(N > 5.5 - 1/z), which is 1e-5 at z = 0.8 and 1e-3 at z = 0.42, in every round. Here an exponential draw comes from
64 bits; its square root is the radius of Box and Muller (1958), which ends at 9.4 standard deviations.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def standard_normal(key: Array, size: int, dtype: DTypeLike = jnp.float32) -> Array:
    """Returns `(size,)` independent draws of N(0, 1): sqrt(2 E) times cosine and sine of a uniform angle.

    Args:
        key: used for nothing else.
        size: number of draws.
        dtype: float32 or float64.
    """
    high, low, turn = jax.random.bits(key, (3, -(-size // 2)), jnp.uint32)
    radius = jnp.sqrt(jnp.asarray(2, dtype) * _exponential(high, low, dtype))
    angle = jnp.asarray(2 * math.pi * 2.0**-32, dtype) * turn.astype(dtype)
    return jnp.concatenate([radius * jnp.cos(angle), radius * jnp.sin(angle)])[:size]


def standard_laplace(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Returns independent Laplace draws of scale 1: an exponential draw with a random sign.

    Args:
        key: used for nothing else.
        shape: of the draws.
        dtype: float32 or float64.
    """
    high, low, sign = jax.random.bits(key, (3, *shape), jnp.uint32)
    magnitude = _exponential(high, low, dtype)
    return jnp.where(sign >> 31 == 0, magnitude, -magnitude)


def _exponential(high: Array, low: Array, dtype: DTypeLike) -> Array:
    """-ln(u) of a uniform u of 64 bits, at most 45.1; on whichever side of 1/2 keeps the relative precision."""
    above = (high >> 31).astype(bool)
    high, low = jnp.where(above, ~high, high), jnp.where(above, ~low, low)  # of 1 - u, bit for bit
    scale, half = jnp.asarray(2.0**-32, dtype), jnp.asarray(0.5, dtype)
    u = (high.astype(dtype) + (low.astype(dtype) + half) * scale) * scale
    return -jnp.where(above, jnp.log1p(-u), jnp.log(u))
