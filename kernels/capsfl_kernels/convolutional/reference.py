"""Convolutional capsules with stored votes: XLA's convolution, then plain routing."""

import jax
from jax import lax

from capsfl_kernels.arguments import Gradient
from capsfl_kernels.convolutional.geometry import Geometry
from capsfl_kernels.votes import reference


def route(
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    geometry: Geometry,
    *,
    num_iters: int,
    gradient: Gradient,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Routes inputs (batch, I, H, W, A) through kernel (k, k, A, M, K) to (batch, M, H', W', K)."""
    batch, types, height, width, depth = inputs.shape
    capsules, dim = bias.shape
    if geometry.transpose:
        kernel = kernel[::-1, ::-1]
    votes = lax.conv_general_dilated(
        inputs.reshape(batch * types, height, width, depth),
        kernel.reshape(*kernel.shape[:3], capsules * dim),
        window_strides=(1, 1) if geometry.transpose else (geometry.stride,) * 2,
        padding=geometry.padding,
        lhs_dilation=(geometry.stride,) * 2 if geometry.transpose else (1, 1),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    ).astype(bias.dtype)
    _, out_height, out_width, _ = votes.shape
    positions = (
        votes.reshape(batch, types, out_height, out_width, capsules, dim)
        .transpose(0, 2, 3, 1, 4, 5)
        .reshape(-1, types, capsules, dim)
    )
    routed = reference.route(positions, bias, num_iters=num_iters, leaky=False, gradient=gradient)
    return routed.reshape(batch, out_height, out_width, capsules, dim).transpose(0, 3, 1, 2, 4)
