"""Convolutional capsules in tiles: votes exist for some rows of an image at a time, forward and backward.

The residuals of a layer are its inputs. Its backward pass forms the votes of each tile again, differentiates
their routing, and adds the gradients of the tile into those of the kernel and of the image, where the rows that
neighbouring tiles both read meet. A tile is a strip of rows of one image, or several whole images where they
are small.

Under vmap with a kernel per example (one model per hospital) the examples take turns, so a vmap costs the
memory of one of them; see `convolution` for why that is also the fast way.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from capsfl_kernels.arguments import common_variation, working_set
from capsfl_kernels.convolutional.convolution import Window, apply, grad_images, grad_kernel, in_turns
from capsfl_kernels.convolutional.geometry import Geometry
from capsfl_kernels.votes import tile
from capsfl_kernels.votes.tile import Routing


class _Layer(NamedTuple):
    """Static choices: the convolution, the routing, images and rows of windows of a tile, precision of products."""

    geometry: Geometry
    routing: Routing
    images: int
    rows: int
    precision: lax.PrecisionLike

    @property
    def side(self) -> int:
        """A transposed convolution of stride s is s · s ordinary ones, each for the output of one phase."""
        return self.geometry.stride if self.geometry.transpose else 1

    @property
    def step(self) -> int:
        """Pixels between neighbouring windows."""
        return 1 if self.geometry.transpose else self.geometry.stride

    @property
    def window(self) -> Window:
        """The convolution of one tile, whose pixels come with the rows of zeros around them.

        It adds the columns of zeros itself, so that no gradient is computed for them; only the phases of a
        transposed one, each with columns of its own, read those from the image.
        """
        columns = (0, 0) if self.geometry.transpose else self.geometry.padding[1]
        return Window(self.step, ((0, 0), columns), self.precision)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of windows, of each phase."""
        height, width = self.geometry.output
        return -(-height // self.side), -(-width // self.side)

    @property
    def strips(self) -> int:
        """Tiles of each phase that an image is cut into."""
        return -(-self.grid[0] // self.rows)

    @property
    def taps(self) -> np.ndarray:
        """The kernel's rows (columns) that a phase uses, (side, taps).

        Output ``s · r + a`` sees through tap p the pixel ``(s · r + a + p − first) / s``, where that is a whole
        number. Phases may differ in how many taps they have: a missing one is numbered k, past the kernel's end,
        where `_arrange` puts a zero.
        """
        window, stride, transpose, ((first, _), _), _ = self.geometry
        if not transpose:
            return np.arange(window)[None]
        tap = (first - np.arange(stride)[:, None]) % stride + stride * np.arange(-(-window // stride))
        return np.minimum(tap, window)

    def offsets(self, axis: int) -> np.ndarray:
        """Pixel (row for axis 0, else column) that the first tile of each phase begins with, (side,)."""
        _, stride, transpose, padding, _ = self.geometry
        first = padding[axis][0]
        if not transpose:
            return np.array([-first if axis == 0 else 0])
        phase = np.arange(stride)
        return (phase + (first - phase) % stride - first) // stride

    def place(self, number: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """First image, strip and phase of a tile."""
        phases = self.side**2
        tile = number // phases
        return self.images * (tile // self.strips), tile % self.strips, number % phases


def route(
    inputs: tuple[jax.Array, ...],
    kernel: jax.Array,
    bias: jax.Array,
    geometry: Geometry,
    routing: Routing,
    block_size: int | None,
    precision: lax.PrecisionLike,
) -> jax.Array:
    """Routes inputs (batch, I, H, W, A) through kernel (k, k, A, M, K) to (batch, M, H', W', K).

    Several arrays of inputs count as one, joined on the axis I; their types may differ in number.
    """
    types = sum(array.shape[1] for array in inputs)
    layer = _choose_tile(_Layer(geometry, routing, 1, 1, precision), inputs[0].shape[0], types, bias, block_size)
    return _route(layer, *common_variation(kernel, bias, *inputs))


def _choose_tile(layer: _Layer, batch: int, types: int, bias: jax.Array, block_size: int | None) -> _Layer:
    """Sets images and rows of a tile so that its votes fit the working set."""
    height, width = layer.grid
    budget = working_set(cpu=3 << 20, accelerator=256 << 20)
    affordable = max(1, budget // (bias.dtype.itemsize * types * width * bias.size))
    rows = min(block_size or affordable, height)
    images = _largest_divisor(batch, affordable // height) if rows == height else 1
    return layer._replace(images=images, rows=_largest_divisor(height, rows))


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor up to a limit; where all are far below, the limit, and the last tile is padded."""
    limit = min(max(limit, 1), number)
    divisor = next(n for n in range(limit, 0, -1) if number % n == 0)
    return divisor if 2 * divisor > limit else limit


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route(layer: _Layer, kernel: jax.Array, bias: jax.Array, *inputs: jax.Array) -> jax.Array:
    def run(*arguments: jax.Array) -> jax.Array:
        return _run(layer, arguments[:-2], *arguments[-2:])

    return in_turns(run, folding=len(inputs))(*inputs, kernel, bias)


def _forward(
    layer: _Layer, kernel: jax.Array, bias: jax.Array, *inputs: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _route(layer, kernel, bias, *inputs), (kernel, bias, *inputs)


def _backward(layer: _Layer, residuals: tuple[jax.Array, ...], grad: jax.Array) -> tuple[jax.Array, ...]:
    def run(grad: jax.Array, kernel: jax.Array, bias: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, ...]:
        return _run_backward(layer, inputs, kernel, bias, grad)

    return in_turns(run, folding=0)(grad, *residuals)


_route.defvjp(_forward, _backward)


def _run(layer: _Layer, inputs: tuple[jax.Array, ...], kernel: jax.Array, bias: jax.Array) -> jax.Array:
    images = _largest_divisor(inputs[0].shape[0], layer.images)  # a vmap may have made the batch longer
    layer = layer._replace(images=images)
    padded = [_pad(array, layer) for array in inputs]
    kernels = _arrange(kernel, layer)

    def step(number: jax.Array, output: jax.Array) -> jax.Array:
        image, strip, phase = layer.place(number)
        pixels = _read(padded, _start(layer, number), layer)
        routed = tile.route(
            _vote(pixels, lax.dynamic_index_in_dim(kernels, phase, keepdims=False), bias, layer), bias, layer.routing
        )
        rows = routed.reshape(images, layer.rows, layer.grid[1], *bias.shape).transpose(0, 3, 1, 2, 4)
        return lax.dynamic_update_slice(
            output, rows[None].astype(output.dtype), (phase, image, 0, strip * layer.rows, 0, 0)
        )

    filled, (capsules, dim) = padded[0].shape[0], bias.shape
    shape = (layer.side**2, filled, capsules, layer.strips * layer.rows, layer.grid[1], dim)
    output = _zeros(shape, inputs[0].dtype, padded[0])
    return _join_phases(lax.fori_loop(0, _count(layer, filled), step, output), inputs[0].shape[0], layer)


def _run_backward(
    layer: _Layer, inputs: tuple[jax.Array, ...], kernel: jax.Array, bias: jax.Array, grad: jax.Array
) -> tuple[jax.Array, ...]:
    batch, (capsules, dim) = inputs[0].shape[0], bias.shape
    images = _largest_divisor(batch, layer.images)
    layer = layer._replace(images=images)
    # Without the barrier XLA keeps the padded image of the forward pass for this one, beside the image itself.
    inputs, grad = lax.optimization_barrier((inputs, grad))
    padded = [_pad(array, layer) for array in inputs]
    filled = padded[0].shape[0]
    phases = _split_phases(grad, filled, layer)
    kernels, arrange_vjp = jax.vjp(lambda weights: _arrange(weights, layer), kernel)
    bounds = list(itertools.accumulate(array.shape[1] for array in inputs))

    def step(number: jax.Array, totals: tuple) -> tuple:
        grads_padded, grad_kernels, grad_bias = totals
        image, strip, phase = layer.place(number)
        start = _start(layer, number)
        pixels = _read(padded, start, layer)
        weights = lax.dynamic_index_in_dim(kernels, phase, keepdims=False)
        rows = lax.dynamic_slice(
            phases,
            (phase, image, 0, strip * layer.rows, 0, 0),
            (1, images, capsules, layer.rows, layer.grid[1], dim),
        )[0]
        grad_routed = rows.astype(bias.dtype).transpose(0, 2, 3, 1, 4).reshape(images, -1, capsules, dim)
        votes = _vote(pixels, weights, bias, layer)
        grad_votes, tile_bias = tile.differentiate(votes, bias, grad_routed, layer.routing)
        grad_image = grad_votes.astype(weights.dtype).reshape(-1, layer.rows, layer.grid[1], capsules * dim)
        flat = pixels.reshape(-1, *pixels.shape[2:])
        tile_kernel = grad_kernel(layer.window, weights.shape[:2], flat, grad_image)
        tile_pixels = grad_images(layer.window, flat.shape[1:3], grad_image, weights).reshape(pixels.shape)
        added = []
        for array, part in zip(grads_padded, jnp.split(tile_pixels, bounds[:-1], axis=1), strict=True):
            known = lax.dynamic_slice(array, start, part.shape)
            added.append(lax.dynamic_update_slice(array, known + part, start))
        of_phase = lax.dynamic_index_in_dim(grad_kernels, phase) + tile_kernel[None]
        return added, lax.dynamic_update_index_in_dim(grad_kernels, of_phase, phase, 0), grad_bias + tile_bias

    zeros = [_zeros(array.shape, bias.dtype, grad) for array in (*padded, kernels, bias)]
    totals = lax.fori_loop(0, _count(layer, filled), step, (zeros[:-2], *zeros[-2:]))
    grads_padded, grad_kernels, grad_bias = totals
    (grad_kernel_,) = arrange_vjp(grad_kernels.astype(kernel.dtype))
    return grad_kernel_, grad_bias, *(_unpad(g, x, layer) for g, x in zip(grads_padded, inputs, strict=True))


def _count(layer: _Layer, filled: int) -> int:
    """Tiles of a batch of `filled` images."""
    return filled // layer.images * layer.strips * layer.side**2


def _start(layer: _Layer, number: jax.Array) -> tuple:
    """Where in the padded inputs (batch, I, rows, columns, A) a tile begins."""
    image, strip, phase = layer.place(number)
    corner = []
    for axis, index in enumerate((phase // layer.side, phase % layer.side)):
        offsets = layer.offsets(axis)
        corner.append(lax.dynamic_index_in_dim(jnp.asarray(offsets - offsets.min()), index, keepdims=False))
    row, column = corner
    return image, 0, strip * layer.rows * layer.step + row, column, 0


def _read(padded: list[jax.Array], start: tuple, layer: _Layer) -> jax.Array:
    """The pixels (images, I, rows, columns, A) of one tile."""
    taps = layer.taps.shape[1]
    span = (layer.rows - 1) * layer.step + taps
    parts = []
    for array in padded:
        _, types, _, width, depth = array.shape
        width = layer.grid[1] + taps - 1 if layer.geometry.transpose else width
        parts.append(lax.dynamic_slice(array, start, (layer.images, types, span, width, depth)))
    return jnp.concatenate(parts, axis=1)


def _vote(pixels: jax.Array, weights: jax.Array, bias: jax.Array, layer: _Layer) -> jax.Array:
    """Votes (images, I, positions, M, K) of one tile."""
    images, types, *image = pixels.shape
    votes = apply(layer.window, pixels.reshape(images * types, *image), weights)
    return votes.reshape(images, types, -1, *bias.shape)


def _arrange(kernel: jax.Array, layer: _Layer) -> jax.Array:
    """Kernel (k, k, A, M, K) as those of the phases: (phases, taps, taps, A, M · K)."""
    if layer.geometry.transpose:
        flipped = jnp.pad(kernel[::-1, ::-1], ((0, 1), (0, 1), (0, 0), (0, 0), (0, 0)))
        kernel = flipped[layer.taps][:, :, layer.taps].transpose(0, 2, 1, 3, 4, 5, 6)
    taps = layer.taps.shape[1]
    return kernel.reshape(layer.side**2, taps, taps, kernel.shape[-3], -1)


def _pad(inputs: jax.Array, layer: _Layer) -> jax.Array:
    """Adds the zeros that windows at the border see, and images and rows of zeros that fill the last tile."""
    batch, _, *size, _ = inputs.shape
    # The convolution of an ordinary tile adds the columns itself.
    windows = (layer.strips * layer.rows, layer.grid[1]) if layer.geometry.transpose else (layer.strips * layer.rows,)
    padding = [(0, 0, 0), (0, 0, 0)]
    for axis, number in enumerate(windows):
        offsets = layer.offsets(axis)
        end = int(offsets.max()) + (number - 1) * layer.step + layer.taps.shape[1]
        # A stride or a valid padding may leave pixels that no window sees.
        padding[axis] = (-int(offsets.min()), max(end - size[axis], 0), 0)
    filling = (0, -batch % layer.images, 0)
    return lax.pad(inputs, jnp.zeros((), inputs.dtype), [filling, (0, 0, 0), *padding, (0, 0, 0)])


def _unpad(padded: jax.Array, inputs: jax.Array, layer: _Layer) -> jax.Array:
    """The transpose of `_pad`, in the dtype of the inputs."""
    batch, _, height, width, _ = inputs.shape
    row, column = int(-layer.offsets(0).min()), int(-layer.offsets(1).min())
    return padded[:batch, :, row : row + height, column : column + width].astype(inputs.dtype)


def _join_phases(phases: jax.Array, batch: int, layer: _Layer) -> jax.Array:
    """Output (batch, M, H', W', K) from (phases, batch, M, rows, columns, K), cut to size."""
    side, (height, width) = layer.side, layer.geometry.output
    _, filled, capsules, rows, columns, dim = phases.shape
    parts = phases.reshape(side, side, filled, capsules, rows, columns, dim).transpose(2, 3, 4, 0, 5, 1, 6)
    image = parts.reshape(filled, capsules, rows * side, columns * side, dim)
    return image[:batch, :, :height, :width]


def _split_phases(image: jax.Array, filled: int, layer: _Layer) -> jax.Array:
    """The transpose of `_join_phases`."""
    side, (_, columns), rows = layer.side, layer.grid, layer.strips * layer.rows
    batch, capsules, height, width, dim = image.shape
    below, right = rows * side - height, columns * side - width
    padded = jnp.pad(image, ((0, filled - batch), (0, 0), (0, below), (0, right), (0, 0)))
    parts = padded.reshape(filled, capsules, rows, side, columns, side, dim).transpose(3, 5, 0, 1, 2, 4, 6)
    return parts.reshape(side**2, filled, capsules, rows, columns, dim)


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, after: jax.Array) -> jax.Array:
    """Zeros that cannot be made before `after` is there.

    XLA:CPU schedules whatever depends on nothing first. The empty sums of every layer of a network would take
    their memory at the start of its forward pass (measured on SegCaps: 200 MiB of 490).
    """
    one_number = after[(0,) * after.ndim].astype(dtype)
    zero = jnp.where(jnp.sin(one_number) > 2, one_number, 0)  # never more than 1, but XLA does not know
    return jnp.broadcast_to(zero, shape)
