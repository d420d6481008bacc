"""The precision an accelerator kernel's matrix products run in."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def resolve_precision(dtype: Any, precision: lax.PrecisionLike) -> lax.Precision:
    """Returns what `precision` asks for; where nothing is asked, float32 stays float32.

    JAX takes None as leave to round float32 to bfloat16 on a TPU and to TensorFloat-32 on a GPU. The logits of a
    routing grow with every iteration and pass through an exponential, so the kernels take None as float32 unless
    the default of JAX was changed (`jax.default_matmul_precision`).

    Args:
        dtype: Of inputs and weights; bfloat16 products are exact in float32 at any precision.
        precision: As in `jax.lax.dot_general`.

    Raises:
        ValueError: `precision` is a pair or an algorithm, which the kernels do not offer.
    """
    if jnp.dtype(dtype) == jnp.bfloat16:
        return lax.Precision.DEFAULT
    if precision is None:
        default = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
        precision = default or lax.Precision.HIGHEST
    try:
        return lax.Precision(precision)
    except ValueError as error:
        raise ValueError(f"precision={precision!r} is not one of jax.lax.Precision") from error
