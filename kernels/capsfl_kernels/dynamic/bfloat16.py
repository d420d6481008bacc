"""Float32 numbers as sums of bfloat16 ones, for matrix units that multiply nothing wider."""

import jax
import jax.numpy as jnp
from jax import lax

# Products of parts (i of the left, j of the right operand) by number of parts, smallest first so that they are not
# lost against the largest. Left out are those of the size of the rounding error of the whole.
PRODUCTS = {
    1: ((0, 0),),
    2: ((1, 0), (0, 1), (0, 0)),
    3: ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0)),
}


def count_parts(dtype: jnp.dtype, precision: lax.Precision) -> int:
    """Parts that carry `precision`: 3 hold all 24 bits of a float32, 2 hold 16, 1 is bfloat16 itself."""
    if dtype == jnp.bfloat16 or precision == lax.Precision.DEFAULT:
        return 1
    return 2 if precision == lax.Precision.HIGH else 3


def split(x: jax.Array, parts: int) -> list[jax.Array]:
    """Bfloat16 arrays of the shape of float32 `x` whose sum is `x` to 8 bits a part.

    Rounds by its bits, half away from zero: a compiler may take a conversion to bfloat16 and back for the
    identity, and then every part but the first would be zero.
    """
    pieces = []
    rest = x
    for part in range(parts):
        bits = lax.bitcast_convert_type(rest, jnp.int32)
        rounded = lax.bitcast_convert_type((bits + jnp.int32(0x8000)) & jnp.int32(-0x10000), jnp.float32)
        pieces.append(rounded.astype(jnp.bfloat16))
        if part < parts - 1:
            rest = rest - rounded
    return pieces
