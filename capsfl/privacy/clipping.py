"""Bounding what one hospital can contribute: the sensitivity every epsilon rests on."""

import functools
import operator
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Tree = TypeVar("Tree")


def clip_by_global_norm(update: Tree, clip_norm: ArrayLike) -> tuple[Tree, Array]:
    """Scales a whole update to L2 norm at most S, by `min(1, S / norm)` (paper Eq 8; Geyer et al. 2017).

    The norm is that of all leaves flattened together, never per layer. Guarantee: whatever the input, the
    returned tree has L2 norm at most S up to float32 rounding, so adding or removing one hospital moves a sum
    of clipped updates by at most S, and replacing one by at most 2S.

    | update                            | clipped                                | norm       |
    |-----------------------------------|----------------------------------------|------------|
    | zero                              | zero                                   | 0          |
    | norm at most S                    | unchanged, bit for bit                 | its norm   |
    | norm above S                      | same direction, norm S                 | its norm   |
    | NaN, inf, or squares past float32 | zero: the hospital sits this round out | NaN or inf |

    Args:
        update: Arrays of any shapes. Leaves narrower than float32 come back as float32: rounding them again
            could exceed S.
        clip_norm: S > 0, a float or a traced scalar.

    Returns:
        The clipped update and the float32 norm `()` before clipping, not finite exactly when the update was
        discarded. The norm is private to the hospital: show it there, never record or release it.
    """
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), update)
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(wide)]
    norm = jnp.sqrt(functools.reduce(operator.add, squares, jnp.float32(0)))
    usable = jnp.isfinite(norm)
    bound = jnp.asarray(clip_norm, jnp.float32)
    scale = bound / jnp.maximum(norm, bound)  # exactly 1 up to S, and no division by a zero norm

    def clip(leaf: Array) -> Array:
        return jnp.where(usable, leaf * scale.astype(leaf.dtype), jnp.zeros_like(leaf))

    return jax.tree.map(clip, wide), norm
