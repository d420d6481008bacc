"""Convolutional capsules in strips of rows: votes exist for one strip at a time, forward and backward.

The residuals of a layer are its inputs. Its backward pass forms the votes of each strip again, differentiates
the strip, adds up the gradient of the kernel and lays the strips' input gradients over each other.

Under vmap with a kernel per example (one model per hospital) the examples take turns, so a vmap costs the
memory of one of them; see `convolution` for why that is also the fast way.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from capsfl_kernels.arguments import common_variation, working_set
from capsfl_kernels.convolutional.convolution import convolve, in_turns
from capsfl_kernels.convolutional.geometry import Geometry
from capsfl_kernels.votes.streamed import Routing


class _Layer(NamedTuple):
    """Static choices: the convolution, the routing, rows of windows in a strip, precision of the products."""

    geometry: Geometry
    routing: Routing
    rows: int
    precision: lax.PrecisionLike

    @property
    def phases(self) -> int:
        """A transposed convolution of stride s is s · s interleaved convolutions of stride one."""
        return self.geometry.stride if self.geometry.transpose else 1

    @property
    def step(self) -> int:
        """Pixels between neighbouring windows."""
        return 1 if self.geometry.transpose else self.geometry.stride

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        height, width = self.geometry.output
        return -(-height // self.phases), -(-width // self.phases)

    @property
    def strips(self) -> int:
        return -(-self.grid[0] // self.rows)


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
    batch, types = inputs.shape[:2]
    layer = _Layer(geometry, routing, 1, precision)
    height, width = layer.grid
    budget = working_set(cpu=2 << 20, accelerator=256 << 20)  # votes of one strip
    row_bytes = bias.dtype.itemsize * layer.phases**2 * batch * types * width * bias.size
    rows = min(block_size or max(1, budget // row_bytes), height)
    strips = -(-height // rows)
    inputs, kernel, bias = common_variation(inputs, kernel, bias)
    return _route(inputs, kernel, bias, layer._replace(rows=-(-height // strips)))


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
    matrix = _arrange(kernel, layer)
    routed = lax.map(lambda strip: _route_strip(strip, matrix, bias, layer), _cut(inputs, layer))
    return _assemble(routed, layer)


def _run_backward(
    layer: _Layer, inputs: jax.Array, kernel: jax.Array, bias: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    strips, cut_vjp = jax.vjp(lambda x: _cut(x, layer), inputs)
    matrix, arrange_vjp = jax.vjp(lambda w: _arrange(w, layer), kernel)

    def step(
        totals: tuple[jax.Array, jax.Array], block: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        strip, strip_grad = block
        _, vjp = jax.vjp(lambda s, m, b: _route_strip(s, m, b, layer), strip, matrix, bias)
        grad_strip, grad_matrix, grad_bias = vjp(strip_grad)
        return (totals[0] + grad_matrix.astype(totals[0].dtype), totals[1] + grad_bias), grad_strip

    start = (jnp.zeros_like(matrix, dtype=bias.dtype), jnp.zeros_like(bias))
    (grad_matrix, grad_bias), grad_strips = lax.scan(step, start, (strips, _disassemble(grad, layer)))
    return cut_vjp(grad_strips)[0], arrange_vjp(grad_matrix.astype(kernel.dtype))[0], grad_bias


def _route_strip(strip: jax.Array, matrix: jax.Array, bias: jax.Array, layer: _Layer) -> jax.Array:
    """Routes one strip (batch, I, rows, columns, A) to (batch, rows of windows, columns, phases, M, K)."""
    batch, types, *image = strip.shape
    rows, (_, width), phases = layer.rows, layer.grid, layer.phases**2
    votes = convolve(strip.reshape(batch * types, *image), matrix, stride=layer.step, precision=layer.precision)
    positions = votes.reshape(batch, types, rows * width * phases, *bias.shape)
    routed = layer.routing.run(positions.transpose(0, 2, 1, 3, 4).reshape(-1, types, *bias.shape), bias)
    return routed.reshape(batch, rows, width, phases, *bias.shape)


def _taps(layer: _Layer) -> tuple[int, np.ndarray]:
    """Along one axis: the image pixel of a first window's first tap, and each phase's index into the kernel.

    The index array is (phases, taps). Where a phase has no use for a tap, its index is the size of the
    kernel's window, one past the end, where `_arrange` puts a zero.
    """
    window, stride, transpose, ((first, _), _), _ = layer.geometry
    if not transpose:
        return -first, np.arange(window)[None]
    # Output s · r + a sees the dilated pixel s · r + a + p − first through the flipped tap p; pixel r + d of
    # the image is the dilated pixel s · (r + d).
    phase = np.arange(stride)[:, None]
    lowest = -(first // stride)
    highest = (stride - 1 + window - 1 - first) // stride
    tap = stride * np.arange(lowest, highest + 1)[None] + first - phase
    return lowest, np.where((tap >= 0) & (tap < window), window - 1 - tap, window)


def _arrange(kernel: jax.Array, layer: _Layer) -> jax.Array:
    """Kernel (k, k, A, M, K) as that of an ordinary convolution (taps, taps, A, phases · phases · M · K)."""
    if layer.geometry.transpose:
        _, index = _taps(layer)
        kernel = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0), (0, 0)))
        # (row phase, row tap, column phase, column tap, A, M, K)
        kernel = kernel[index][:, :, index].transpose(1, 3, 4, 0, 2, 5, 6)
    return kernel.reshape(*kernel.shape[:3], -1)


def _cut(inputs: jax.Array, layer: _Layer) -> jax.Array:
    """Padded strips (strips, batch, I, rows, columns, A) of inputs (batch, I, H, W, A); they overlap."""
    first, index = _taps(layer)
    window, step = index.shape[1], layer.step
    block = layer.rows * step
    height = block - step + window  # of a strip
    blocks = layer.strips - 1 + -(-height // block)
    first_column = first if layer.geometry.transpose else -layer.geometry.padding[1][0]
    columns = (layer.grid[1] - 1) * step + window
    _, _, image_height, image_width, _ = inputs.shape
    padded = lax.pad(
        inputs,
        jnp.zeros((), inputs.dtype),
        [
            (0, 0, 0),
            (0, 0, 0),
            (-first, blocks * block - image_height + first, 0),
            (-first_column, columns - image_width + first_column, 0),
            (0, 0, 0),
        ],
    )
    parts = padded.reshape(*inputs.shape[:2], blocks, block, columns, inputs.shape[4]).transpose(2, 0, 1, 3, 4, 5)
    pieces = []
    for start in range(0, height, block):
        piece = parts[start // block : start // block + layer.strips]
        pieces.append(piece[:, :, :, : height - start])
    return jnp.concatenate(pieces, axis=3)


def _assemble(strips: jax.Array, layer: _Layer) -> jax.Array:
    """Output (batch, M, H', W', K) from routed strips (strips, batch, rows, columns, phases, M, K)."""
    side, (out_height, out_width) = layer.phases, layer.geometry.output
    count, batch, rows, width, _, capsules, dim = strips.shape
    parts = strips.reshape(count, batch, rows, width, side, side, capsules, dim)
    image = parts.transpose(1, 6, 0, 2, 4, 3, 5, 7).reshape(batch, capsules, -1, width * side, dim)
    return image[:, :, :out_height, :out_width]


def _disassemble(image: jax.Array, layer: _Layer) -> jax.Array:
    """The transpose of `_assemble`."""
    side, (_, width) = layer.phases, layer.grid
    batch, capsules, height, out_width, dim = image.shape
    rows = layer.strips * layer.rows * side
    padded = jnp.pad(image, ((0, 0), (0, 0), (0, rows - height), (0, width * side - out_width), (0, 0)))
    parts = padded.reshape(batch, capsules, layer.strips, layer.rows, side, width, side, dim)
    return parts.transpose(2, 0, 3, 5, 4, 6, 1, 7).reshape(
        layer.strips, batch, layer.rows, width, side**2, capsules, dim
    )
