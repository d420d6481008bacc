"""Plain convolution and pooling, in the layout that a processor multiplies fastest."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

# Inside, images are (channels, height, width, batch): a shift of an image is then a copy of long runs, a convolution
# one product with the positions minor, and pooling works on whole vectors. XLA lays the arrays between two layers
# out so, whatever their logical order, so the transpositions here cost nothing but where a network begins and ends.
_INSIDE = (3, 1, 2, 0)
_OUTSIDE = (3, 1, 2, 0)


def convolve(images: Array, kernel: Array, *, strides: int = 1, padding: str = "SAME") -> Array:
    """Convolve `(batch, height, width, in)` with `(k, k, in, out)` to `(batch, height', width', out)`.

    On CPU the kernel's taps are gathered as shifted slices and multiplied at once. With one kernel per
    hospital (`vmap`) a convolution becomes a grouped one, which XLA:CPU runs 2 to 8 times slower than one
    batched matrix product; and inside a loop, such as that over local steps, it leaves its fast convolution
    altogether. Elsewhere this is `lax.conv_general_dilated`.

    Raises:
        ValueError: if the channels of images and kernel differ or the kernel is larger than the image.
    """
    if images.ndim != 4 or kernel.ndim != 4 or images.shape[-1] != kernel.shape[2]:
        raise ValueError(
            f"images {images.shape} and kernel {kernel.shape}: expected (batch, height, width, in) and (k, k, in, out)"
        )
    if jax.default_backend() == "cpu":
        return _convolve_by_slices(images, kernel, strides, padding)
    return lax.conv_general_dilated(
        images, kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def smallest_side(stages: Sequence[tuple[int, int]]) -> int:
    """Side in pixels of the smallest image that unpadded convolutions, as `(kernel, stride)`, leave a position of."""
    side = 1
    for kernel, stride in reversed(stages):
        side = (side - 1) * stride + kernel
    return side


def max_pool(images: Array, size: int = 2) -> Array:
    """Keep the largest of every `size` x `size` pixels of `(batch, height, width, channels)`.

    Rows and columns beyond the last whole window are left out. The gradient goes to the first of equal pixels, as
    that of `lax.reduce_window` does, which XLA:CPU runs 20 times slower: it scatters one number after the other.

    Raises:
        ValueError: if the images are smaller than a window.
    """
    height, width = images.shape[1] // size * size, images.shape[2] // size * size
    if not height or not width:
        raise ValueError(f"images {images.shape}: smaller than a window of {size} x {size}")
    if jax.default_backend() == "cpu":
        largest: Any = _pool(size, images[:, :height, :width].transpose(_INSIDE))
        return largest.transpose(_OUTSIDE)
    window = (1, size, size, 1)
    return lax.reduce_window(images, -jnp.inf, lax.max, window, window, "VALID")


def _convolve_by_slices(images: Array, kernel: Array, strides: int, padding: str) -> Array:
    size_y, size_x, _, channels_out = kernel.shape
    batch, height, width, _ = images.shape
    if size_y == size_x == strides == 1:
        return images @ kernel[0, 0]
    pads = lax.padtype_to_pads((height, width), (size_y, size_x), (strides, strides), padding)
    inside = jnp.pad(images.transpose(_INSIDE), ((0, 0), *pads, (0, 0)))
    if inside.shape[1] < size_y or inside.shape[2] < size_x:
        raise ValueError(f"kernel {kernel.shape} is larger than the image {(height, width)}; use a smaller kernel")
    windows: Any = _windows((size_y, size_x), strides, inside)
    outputs = lax.dot_general(
        kernel.reshape(-1, channels_out), windows.reshape(kernel[..., 0].size, -1), (((0,), (0,)), ((), ()))
    )
    return outputs.reshape(channels_out, *windows.shape[2:4], batch).transpose(_OUTSIDE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _windows(size: tuple[int, int], strides: int, images: Array) -> Array:
    """Gather `(channels, height, width, batch)` as `(taps, channels, height', width', batch)`."""
    channels, height, width, batch = images.shape
    rows, columns = ((length - taps) // strides + 1 for length, taps in zip((height, width), size, strict=True))
    # One axis after the other: 2 k slices instead of k^2, which halves the time to compile.
    shifted = [lax.slice_in_dim(images, x, x + strides * (columns - 1) + 1, strides, axis=2) for x in range(size[1])]
    across = jnp.concatenate(shifted, axis=0)
    shifted = [lax.slice_in_dim(across, y, y + strides * (rows - 1) + 1, strides, axis=1) for y in range(size[0])]
    return jnp.concatenate(shifted, axis=0).reshape(-1, channels, rows, columns, batch)


def _windows_forward(size: tuple[int, int], strides: int, images: Array) -> Any:
    return _windows(size, strides, images), images.shape[1:3]


def _windows_backward(size: tuple[int, int], strides: int, extent: tuple[int, int], gradient: Array) -> tuple[Array]:
    """Add every tap's slice in its place, one after the other in one array, where XLA would pad and add them all."""
    taps, channels, rows, columns, batch = gradient.shape
    # With an axis per phase of the stride, a strided slice is a plain one.
    blocks = [-(-length // strides) for length in extent]
    zeros = jnp.zeros((channels, blocks[0], strides, blocks[1], strides, batch), gradient.dtype)

    def add(tap: Array, total: Array) -> Array:
        y, x = tap // size[1], tap % size[1]
        place = (0, y // strides, y % strides, x // strides, x % strides, 0)
        slice_ = lax.dynamic_slice(total, place, (channels, rows, 1, columns, 1, batch))
        return lax.dynamic_update_slice(total, slice_ + gradient[tap][:, :, None, :, None], place)

    total = lax.fori_loop(0, taps, add, zeros)
    total = total.reshape(channels, blocks[0] * strides, blocks[1] * strides, batch)
    return (total[:, : extent[0], : extent[1]],)


_windows.defvjp(_windows_forward, _windows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool(size: int, images: Array) -> Array:
    return functools.reduce(jnp.maximum, _pixels(size, images))


def _pixels(size: int, images: Array) -> Sequence[Array]:
    """The pixels of every window, first to last: `size`² arrays `(channels, height', width', batch)`."""
    channels, height, width, batch = images.shape
    blocks = images.reshape(channels, height // size, size, width // size, size, batch)
    return [blocks[:, :, y, :, x] for y in range(size) for x in range(size)]


def _pool_forward(size: int, images: Array) -> Any:
    largest = _pool(size, images)
    return largest, (images, largest)


def _pool_backward(size: int, saved: tuple[Array, Array], gradient: Array) -> tuple[Array]:
    images, largest = saved
    _, height, width, _ = images.shape
    first = jnp.full(largest.shape, size * size - 1)
    for index, pixel in reversed(list(enumerate(_pixels(size, images)))[:-1]):
        first = jnp.where(pixel == largest, index, first)

    def spread(array: Array) -> Array:
        return jnp.repeat(jnp.repeat(array, size, axis=1), size, axis=2)

    rows, columns = jnp.arange(height) % size, jnp.arange(width) % size
    own = (size * rows[:, None] + columns[None, :]).reshape(1, height, width, 1)
    # Selected at full size: a selection by blocks, reshaped, is computed anew for every reader and not in vectors.
    return (jnp.where(spread(first) == own, spread(gradient), 0),)


_pool.defvjp(_pool_forward, _pool_backward)
