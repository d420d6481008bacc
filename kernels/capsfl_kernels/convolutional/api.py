"""The public operator `conv_capsules`."""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import (
    Gradient,
    accumulation_dtype,
    check_bias,
    check_capsules,
    check_routing,
    choose_implementation,
)
from capsfl_kernels.convolutional import reference, streamed
from capsfl_kernels.convolutional.geometry import Padding, plan
from capsfl_kernels.votes.tile import Routing


def conv_capsules(
    inputs: jax.Array | Sequence[jax.Array],
    kernel: jax.Array,
    bias: jax.Array | None = None,
    *,
    strides: int = 1,
    transpose: bool = False,
    padding: Padding = "SAME",
    num_iters: int = 3,
    gradient: Gradient = "full",
    implementation: str | Sequence[str] | None = None,
    block_size: int | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Convolves every type of capsule with one shared kernel and routes the votes at each position.

    The convolutional and deconvolutional capsules of SegCaps (LaLonde & Bagci 2018): the votes of input type
    i are ``û_i = conv(u_i, kernel)``, and they are routed by agreement over the types, every position for
    itself, as in `route_votes`. With one output type or one iteration the coupling is constant, and the votes
    are never formed: one convolution of the sum over types gives the same.

    Args:
        inputs: ``(..., I, H, W, A)``: types of capsules, height, width, dimension; any number of batch axes.
            Several arrays count as one joined on the axis I (a skip connection), and the streamed
            implementation never joins them.
        kernel: ``(k, k, A, M, K)``, shared by all input types.
        bias: ``(M, K)``, added before the squash in every iteration; None stands for zero.
        strides: Pixels between windows; where transposed, the factor by which the image grows.
        transpose: Runs the adjoint of the strided convolution (the weights of TensorFlow's
            ``conv2d_transpose`` and PyTorch's ``ConvTranspose2d``).
        padding: ``"SAME"`` gives ceil(H / strides) rows, or H · strides where transposed; ``"VALID"`` pads
            nothing.
        num_iters: Iterations of routing, at least 1.
        gradient: ``"full"`` differentiates every iteration, ``"last"`` takes the couplings as constants.
        implementation: ``"reference"`` stores the votes; ``"streamed"`` forms them one strip of rows at a
            time and again in the backward pass; a sequence is an order of preference; None chooses.
        block_size: Rows in a strip of the streamed implementation; None chooses.
        precision: Of the matrix products, as in `jax.lax.dot_general`.

    Returns:
        Output capsules ``(..., M, H', W', K)`` in the dtype of the inputs; bfloat16 accumulates in float32.

    Raises:
        ValueError: a shape, dtype or choice is impossible; the message names it.
    """
    arrays = tuple(inputs) if isinstance(inputs, Sequence) else (inputs,)
    if not arrays:
        raise ValueError("conv_capsules: inputs is an empty sequence; it needs at least one array")
    first = arrays[0]
    for array in arrays:
        if array.ndim < 4 or kernel.ndim != 5 or array.shape[-1] != kernel.shape[2]:
            raise ValueError(
                f"conv_capsules: inputs {array.shape} and kernel {kernel.shape} do not fit; "
                "they must be (..., I, H, W, A) and (k, k, A, M, K)"
            )
        check_capsules("conv_capsules", inputs=array, kernel=kernel)
        if array.dtype != first.dtype or (array.shape[:-4], array.shape[-3:]) != (first.shape[:-4], first.shape[-3:]):
            raise ValueError(
                f"conv_capsules: inputs {array.dtype.name}{array.shape} and {first.dtype.name}{first.shape} do not "
                "join; they may differ in the axis I alone"
            )
    check_routing("conv_capsules", num_iters, gradient, block_size)
    height, width, _ = first.shape[-3:]
    window, window_width, _, capsules, dim = kernel.shape
    if window != window_width:
        raise ValueError(f"conv_capsules: kernel {kernel.shape} is not square in its first two axes")
    if isinstance(strides, bool) or not isinstance(strides, int) or strides < 1:
        raise ValueError(f"conv_capsules: strides={strides!r} must be an integer of at least 1")
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"conv_capsules: padding={padding!r} is unknown; choose 'SAME' or 'VALID'")
    if padding == "VALID" and not transpose and window > min(height, width):
        raise ValueError(
            f"conv_capsules: kernel {kernel.shape} is larger than the image of inputs {first.shape}; "
            "use padding='SAME' or a smaller kernel"
        )
    check_bias("conv_capsules", bias, capsules, dim, f"kernel {kernel.shape}")
    geometry = plan((height, width), window, strides, transpose, padding)
    chosen = choose_implementation("conv_capsules", implementation, {"streamed": None, "reference": None})
    narrow = jnp.promote_types(first.dtype, kernel.dtype)
    dtype = accumulation_dtype(narrow)
    images = tuple(array.reshape(-1, *array.shape[-4:]).astype(narrow) for array in arrays)
    filters = kernel.astype(narrow)
    offset = jnp.zeros((capsules, dim), dtype) if bias is None else bias.astype(dtype)
    if capsules == 1 or num_iters == 1:
        # The coupling is 1 / M whatever the votes are, and convolution is linear: sum before, not after.
        total = functools.reduce(operator.add, [jnp.sum(array, axis=1, keepdims=True) for array in images])
        images, num_iters = (total,), 1
    if chosen == "reference":
        joined = jnp.concatenate(images, axis=1)
        routed = reference.route(
            joined, filters, offset, geometry, num_iters=num_iters, gradient=gradient, precision=precision
        )
    else:
        routing = Routing(num_iters, False, gradient)
        routed = streamed.route(images, filters, offset, geometry, routing, block_size, precision)
    return routed.reshape(*first.shape[:-4], *routed.shape[1:]).astype(first.dtype)
