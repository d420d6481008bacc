"""The non-linearity of capsules: keeps a vector's direction and maps its length into [0, 1)."""

from typing import Literal

import jax
import jax.numpy as jnp

from capsfl_kernels.arguments import accumulation_dtype

SquashKind = Literal["sabour", "exponential"]


def squash(x: jax.Array, axis: int = -1, *, kind: SquashKind = "sabour", eps: float = 1e-7) -> jax.Array:
    """Shrinks vectors to a length in [0, 1) without turning them; value and gradient are zero at zero.

    With ``n`` the length of a vector ``s``:

    * ``"sabour"``: ``n² / (1 + n²) · s / sqrt(n² + eps)`` (Sabour et al. 2017, equation 1);
    * ``"exponential"``: ``(1 − exp(−n)) · s / (n + eps)`` (Mazzia et al. 2021, Efficient-CapsNet).

    Args:
        x: Vectors along ``axis``, any other axes around them; bfloat16 is computed in float32.
        axis: The axis that holds the components of one vector.
        kind: Which of the two equations.
        eps: Keeps the division finite at the zero vector.

    Returns:
        An array of the shape and dtype of ``x``.

    Raises:
        ValueError: ``kind`` is not one of the two names, or ``x`` is not floating point.
    """
    s = x.astype(accumulation_dtype(x.dtype))
    squared = jnp.sum(s * s, axis=axis, keepdims=True)
    if kind == "sabour":
        scale = squared / (1 + squared) * jax.lax.rsqrt(squared + eps)
    elif kind == "exponential":
        # sqrt has an infinite slope at zero, and infinity times zero is NaN: take it where it is smooth.
        positive = squared > 0
        length = jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), 0)
        scale = -jnp.expm1(-length) / (length + eps)
    else:
        raise ValueError(f"squash: kind={kind!r} is unknown; choose 'sabour' or 'exponential'")
    return (s * scale).astype(x.dtype)
