"""Convolutional capsules in tiles: votes exist for some rows of an image at a time, forward and backward.

The residuals of a layer are its inputs. Its backward pass forms the votes of each tile again, differentiates
their routing, and adds the gradients of the tile into those of the kernel and of the image, where the rows that
neighbouring tiles both read meet. A tile is a strip of rows of one image, or several whole images where they
are small.

Under vmap with a kernel per example (one model per hospital) the examples take turns, so a vmap costs the
memory of one of them; see `convolution` for why that is also the fast way.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import common_variation, working_set
from capsfl_kernels.convolutional.convolution import Window, apply, grad_images, grad_kernel, in_turns
from capsfl_kernels.convolutional.geometry import Geometry
from capsfl_kernels.votes import tile
from capsfl_kernels.votes.tile import Routing


class _Layer(NamedTuple):
    """Static choices: the convolution, the routing, images and output rows of a tile, precision of products."""

    geometry: Geometry
    routing: Routing
    images: int
    rows: int
    precision: lax.PrecisionLike

    @property
    def strips(self) -> int:
        """Tiles that an image is cut into."""
        return -(-self.geometry.output[0] // self.rows)

    @property
    def reading(self) -> "_Reading":
        """Rows of the image that a tile reads, and the convolution that it runs over them."""
        window, stride, transpose, ((first, _), columns), _ = self.geometry
        if not transpose:
            span = (self.rows - 1) * stride + window
            return _Reading(first, self.rows * stride, span, Window(stride, 1, ((0, 0), columns), self.precision))
        # Row `o` of the output sees the rows o − first to o − first + window − 1 of the image pulled apart.
        above = first // stride
        span = (self.rows - 1 + window - 1 - first) // stride + above + 1
        before = first - above * stride
        after = self.rows + window - 1 - before - (span - 1) * stride - 1
        convolution = Window(1, stride, ((before, after), columns), self.precision)
        return _Reading(above, self.rows // stride, span, convolution)


class _Reading(NamedTuple):
    """Rows of an image that the tiles read.

    Attributes:
        above: Rows of zeros that the first tile reads above the image.
        step: Rows from one tile to the next.
        span: Rows of one tile; those beyond `step` are also read by the next.
        window: The convolution of one tile.
    """

    above: int
    step: int
    span: int
    window: Window


def route(
    inputs: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    geometry: Geometry,
    routing: Routing,
    block_size: int | None,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Routes inputs (batch, I, H, W, A) through kernel (k, k, A, M, K) to (batch, M, H', W', K)."""
    images, rows = _choose_tile(inputs.shape, bias, geometry, block_size)
    if geometry.transpose:
        kernel = kernel[::-1, ::-1]
    inputs, kernel, bias = common_variation(inputs, kernel, bias)
    return _route(inputs, kernel, bias, _Layer(geometry, routing, images, rows, precision))


def _choose_tile(
    shape: tuple[int, ...], bias: jax.Array, geometry: Geometry, block_size: int | None
) -> tuple[int, int]:
    """Images and output rows of one tile, so that its votes fit the working set."""
    batch, types, *_ = shape
    height, width = geometry.output
    unit = geometry.stride if geometry.transpose else 1  # rows of output that one more row of the image gives
    budget = working_set(cpu=2 << 20, accelerator=256 << 20)
    affordable = max(1, budget // (bias.dtype.itemsize * types * width * bias.size))
    rows = min(block_size or affordable, height)
    if rows == height:
        return _largest_divisor(batch, max(1, affordable // height)), -(-height // unit) * unit
    steps = -(-height // unit)
    return 1, unit * _largest_divisor(steps, max(1, rows // unit))


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`; where all are small, `limit`, and the last tile is padded."""
    divisor = next(n for n in range(min(limit, number), 0, -1) if number % n == 0)
    return divisor if 2 * divisor > limit else min(limit, number)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _route(inputs: jax.Array, kernel: jax.Array, bias: jax.Array, layer: _Layer) -> jax.Array:
    return in_turns(functools.partial(_run, layer), foldable=True)(inputs, kernel, bias)


def _forward(
    inputs: jax.Array, kernel: jax.Array, bias: jax.Array, layer: _Layer
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _route(inputs, kernel, bias, layer), (inputs, kernel, bias)


def _backward(
    layer: _Layer, residuals: tuple[jax.Array, jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return in_turns(functools.partial(_run_backward, layer), foldable=False)(*residuals, grad)


_route.defvjp(_forward, _backward)


def _run(layer: _Layer, inputs: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    batch, types, _, width, depth = inputs.shape
    (height, out_width), reading = layer.geometry.output, layer.reading
    images = _largest_divisor(batch, layer.images)
    padded = _pad_inputs(inputs, images, layer)
    matrix = kernel.reshape(*kernel.shape[:3], -1)

    def step(number: jax.Array, output: jax.Array) -> jax.Array:
        image, strip = images * (number // layer.strips), number % layer.strips
        start = (image, 0, strip * reading.step, 0, 0)
        pixels = lax.dynamic_slice(padded, start, (images, types, reading.span, width, depth))
        routed = tile.route(_vote(pixels, matrix, bias, layer), bias, layer.routing)
        rows = routed.reshape(images, layer.rows, out_width, *bias.shape).transpose(0, 3, 1, 2, 4)
        return lax.dynamic_update_slice(output, rows.astype(output.dtype), (image, 0, strip * layer.rows, 0, 0))

    capsules, dim = bias.shape
    shape = (padded.shape[0], capsules, layer.strips * layer.rows, out_width, dim)
    output, _ = common_variation(jnp.zeros(shape, inputs.dtype), padded)
    output = lax.fori_loop(0, padded.shape[0] // images * layer.strips, step, output)
    return output[:batch, :, :height]


def _run_backward(
    layer: _Layer, inputs: jax.Array, kernel: jax.Array, bias: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    batch, types, image_height, width, depth = inputs.shape
    (height, out_width), reading = layer.geometry.output, layer.reading
    capsules, dim = bias.shape
    images = _largest_divisor(batch, layer.images)
    padded = _pad_inputs(inputs, images, layer)
    below = layer.strips * layer.rows - height
    grad = jnp.pad(grad, ((0, padded.shape[0] - batch), (0, 0), (0, below), (0, 0), (0, 0)))
    matrix = kernel.reshape(*kernel.shape[:3], -1)

    def step(number: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        grad_padded, grad_matrix, grad_bias = totals
        image, strip = images * (number // layer.strips), number % layer.strips
        start, extent = (image, 0, strip * reading.step, 0, 0), (images, types, reading.span, width, depth)
        pixels = lax.dynamic_slice(padded, start, extent)
        rows = lax.dynamic_slice(
            grad, (image, 0, strip * layer.rows, 0, 0), (images, capsules, layer.rows, out_width, dim)
        )
        grad_routed = rows.astype(bias.dtype).transpose(0, 2, 3, 1, 4).reshape(images, -1, capsules, dim)
        votes = _vote(pixels, matrix, bias, layer)
        grad_votes, tile_bias = tile.differentiate(votes, bias, grad_routed, layer.routing)
        grad_image = grad_votes.astype(inputs.dtype).reshape(images * types, layer.rows, out_width, -1)
        tile_pixels = grad_images(reading.window, (reading.span, width), grad_image, matrix)
        tile_matrix = grad_kernel(
            reading.window, kernel.shape[:2], pixels.reshape(-1, reading.span, width, depth), grad_image
        )
        known = lax.dynamic_slice(grad_padded, start, extent)
        grad_padded = lax.dynamic_update_slice(grad_padded, known + tile_pixels.reshape(extent), start)
        return grad_padded, grad_matrix + tile_matrix, grad_bias + tile_bias

    zeros = (jnp.zeros(padded.shape, bias.dtype), jnp.zeros(matrix.shape, bias.dtype), jnp.zeros_like(bias))
    *totals, _ = common_variation(*zeros, padded)
    count = padded.shape[0] // images * layer.strips
    grad_padded, grad_matrix, grad_bias = lax.fori_loop(0, count, step, tuple(totals))
    grad_inputs = lax.slice_in_dim(grad_padded[:batch], reading.above, reading.above + image_height, axis=2)
    return grad_inputs.astype(inputs.dtype), grad_matrix.astype(kernel.dtype).reshape(kernel.shape), grad_bias


def _vote(pixels: jax.Array, matrix: jax.Array, bias: jax.Array, layer: _Layer) -> jax.Array:
    """Votes (images, I, positions, M, K) of one tile (images, I, rows, W, A)."""
    images, types, *image = pixels.shape
    votes = apply(layer.reading.window, pixels.reshape(images * types, *image), matrix)
    return votes.reshape(images, types, -1, *bias.shape)


def _pad_inputs(inputs: jax.Array, images: int, layer: _Layer) -> jax.Array:
    """Adds what the first and last tiles read beyond the image, and images of zeros that fill the last tile."""
    reading, (batch, _, height, _, _) = layer.reading, inputs.shape
    below = (layer.strips - 1) * reading.step + reading.span - reading.above - height
    filling = -batch % images
    # A stride or a valid padding may leave rows that no window reads.
    rows = (reading.above, max(below, 0), 0)
    return lax.pad(
        inputs, jnp.zeros((), inputs.dtype), [(0, filling, 0), (0, 0, 0), rows, (0, 0, 0), (0, 0, 0)]
    )
