"""A convolution whose gradients stay fast on a CPU: inside loops, and with one kernel per example under vmap.

XLA:CPU has one fast convolution, for images (batch, height, width, channels) and kernels (height, width, in,
out). It brings other layouts into this one only outside of loops. The gradients that JAX derives have other
layouts, so within `lax.scan` they take the slow road (measured: 40 times the time and more). Here they are
written in the fast layout. A vmapped kernel becomes a grouped convolution, slow in every layout: here the
examples take turns.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.custom_batching import custom_vmap

from capsfl_kernels.arguments import accumulation_dtype, common_variation

Pads = tuple[tuple[int, int], tuple[int, int]]


class _Window(NamedTuple):
    """Static choices of a convolution."""

    stride: int
    padding: Pads
    precision: lax.PrecisionLike


def convolve(
    images: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    padding: Pads = ((0, 0), (0, 0)),
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Convolves images (batch, H, W, channels) with a kernel (k, k, channels, features), both of one dtype.

    Returns:
        (batch, H', W', features) in the dtype sums run in: float32, or float64 for float64.
    """
    images, kernel = common_variation(images, kernel)
    return _convolve(images, kernel, _Window(stride, padding, precision))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(images: jax.Array, kernel: jax.Array, window: _Window) -> jax.Array:
    def run(images: jax.Array, kernel: jax.Array) -> jax.Array:
        return _plain(images, kernel, window.precision, window.padding, stride=window.stride)

    return in_turns(run, foldable=True)(images, kernel)


def _forward(images: jax.Array, kernel: jax.Array, window: _Window) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(images, kernel, window), (images, kernel)


def _backward(window: _Window, residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, kernel = residuals
    grad = grad.astype(images.dtype)
    grad_images = in_turns(functools.partial(_grad_images, window, images.shape[1:3]), foldable=True)
    grad_kernel = in_turns(functools.partial(_grad_kernel, window, kernel.shape[:2]), foldable=False)
    return (
        grad_images(grad, kernel).astype(images.dtype),
        grad_kernel(images, grad).astype(kernel.dtype),
    )


_convolve.defvjp(_forward, _backward)


def in_turns(run: Callable, *, foldable: bool) -> Callable:
    """Gives a function a vmap that runs the examples one after the other.

    Args:
        run: A function of arrays, to an array or a tuple of arrays.
        foldable: Whether axis 0 of the first argument and of the result is a batch whose entries do not meet;
            a vmap over the first argument alone then makes that batch longer instead.
    """
    call = custom_vmap(run)

    @call.def_vmap
    def _(size: int, batched: list[bool], *arguments: jax.Array) -> tuple[Any, Any]:
        if foldable and batched[0] and not any(batched[1:]):
            first, *rest = arguments
            result = call(first.reshape(-1, *first.shape[2:]), *rest)
            return result.reshape(size, -1, *result.shape[1:]), True

        def single(entries: list[jax.Array]) -> Any:
            given = iter(entries)
            return call(*(next(given) if many else whole for many, whole in zip(batched, arguments, strict=True)))

        stacked = [array for many, array in zip(batched, arguments, strict=True) if many]
        results = lax.map(single, stacked)
        return results, jax.tree.map(lambda _: True, results)

    return call


def _grad_images(window: _Window, size: tuple[int, ...], grad: jax.Array, kernel: jax.Array) -> jax.Array:
    """The gradient spread by the stride meets the turned kernel."""
    spread = [(length - 1) * window.stride + 1 for length in grad.shape[1:3]]
    padding = []
    for axis in range(2):
        before = kernel.shape[axis] - 1 - window.padding[axis][0]
        padding.append((before, size[axis] + kernel.shape[axis] - 1 - spread[axis] - before))
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    return _plain(grad, turned, window.precision, padding, image_dilation=window.stride)


def _grad_kernel(window: _Window, size: tuple[int, ...], images: jax.Array, grad: jax.Array) -> jax.Array:
    """The images, channels as batch, meet the gradient as a kernel with holes of the stride."""
    spread = [(length - 1) * window.stride + 1 for length in grad.shape[1:3]]
    padding = []
    for axis in range(2):
        before = window.padding[axis][0]
        padding.append((before, size[axis] - 1 + spread[axis] - images.shape[1 + axis] - before))
    turned = _plain(
        images.transpose(3, 1, 2, 0),
        grad.transpose(1, 2, 0, 3),
        window.precision,
        padding,
        kernel_dilation=window.stride,
    )
    return turned.transpose(1, 2, 0, 3)


def _plain(
    images: jax.Array,
    kernel: jax.Array,
    precision: lax.PrecisionLike,
    padding: Any,
    *,
    stride: int = 1,
    image_dilation: int = 1,
    kernel_dilation: int = 1,
) -> jax.Array:
    return lax.conv_general_dilated(
        images,
        kernel,
        (stride, stride),
        padding,
        (image_dilation, image_dilation),
        (kernel_dilation, kernel_dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
        preferred_element_type=accumulation_dtype(images.dtype),
    )
