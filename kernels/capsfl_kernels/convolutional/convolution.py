"""A convolution whose gradients stay fast on a CPU: inside loops, and with one kernel per example under vmap.

XLA:CPU has one fast convolution, for images (batch, height, width, channels) and kernels (height, width, in,
out). It brings other layouts into this one only outside of loops. The gradients that JAX derives have other
layouts, so within `lax.scan` they take the slow road (measured: 40 times the time and more). Here they are
written in the fast layout, and the gradient of the kernel, a long sum with a short result, is one matrix product
over gathered windows. A vmapped kernel becomes a grouped convolution, slow in every layout: here the examples
take turns.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from capsfl_kernels.arguments import accumulation_dtype, common_variation

Pads = tuple[tuple[int, int], tuple[int, int]]


class Window(NamedTuple):
    """Static choices of a convolution.

    Attributes:
        stride: Pixels between neighbouring windows.
        spacing: Distance to which the pixels of the image are pulled apart, zeros between; a spacing above one
            makes the adjoint of a strided convolution. Stride or spacing is one.
        padding: (before, after) for rows and columns, around the image pulled apart.
        precision: Of the products.
    """

    stride: int = 1
    spacing: int = 1
    padding: Pads = ((0, 0), (0, 0))
    precision: lax.PrecisionLike = None


def convolve(images: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Convolves images (batch, H, W, channels) with a kernel (k, k, channels, features), both of one dtype.

    Returns:
        (batch, H', W', features) in the dtype sums run in: float32, or float64 for float64.
    """
    images, kernel = common_variation(images, kernel)
    return _convolve(images, kernel, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(images: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    return in_turns(functools.partial(apply, window), foldable=True)(images, kernel)


def _forward(images: jax.Array, kernel: jax.Array, window: Window) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(images, kernel, window), (images, kernel)


def _backward(window: Window, residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, kernel = residuals
    grad = grad.astype(images.dtype)
    to_images = in_turns(functools.partial(grad_images, window, images.shape[1:3]), foldable=True)
    to_kernel = in_turns(functools.partial(grad_kernel, window, kernel.shape[:2]), foldable=False)
    return to_images(grad, kernel).astype(images.dtype), to_kernel(images, grad).astype(kernel.dtype)


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


def apply(window: Window, images: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of `convolve`, to be differentiated by `grad_images` and `grad_kernel`."""
    return lax.conv_general_dilated(
        images,
        kernel,
        (window.stride, window.stride),
        window.padding,
        (window.spacing, window.spacing),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=window.precision,
        preferred_element_type=accumulation_dtype(images.dtype),
    )


def grad_images(window: Window, size: tuple[int, ...], grad: jax.Array, kernel: jax.Array) -> jax.Array:
    """Gradient of images of ``size`` (H, W): stride and spacing change places and the kernel is turned."""
    padding = []
    for axis in range(2):
        before = kernel.shape[axis] - 1 - window.padding[axis][0]
        needed = (size[axis] - 1) * window.spacing + kernel.shape[axis]
        padding.append((before, needed - before - (grad.shape[1 + axis] - 1) * window.stride - 1))
    adjoint = Window(window.spacing, window.stride, (padding[0], padding[1]), window.precision)
    return apply(adjoint, grad, kernel[::-1, ::-1].transpose(0, 1, 3, 2))


def grad_kernel(window: Window, size: tuple[int, ...], images: jax.Array, grad: jax.Array) -> jax.Array:
    """Gradient of a kernel of ``size`` (k, k)."""
    before = tuple(first for first, _ in window.padding)
    if window.spacing == 1:
        return _correlate(images, grad, size, window.stride, before, window.precision)
    before = tuple(length - 1 - first for length, first in zip(size, before, strict=True))
    turned = _correlate(grad, images, size, window.spacing, before, window.precision)
    return turned[::-1, ::-1].transpose(0, 1, 3, 2)


def _correlate(
    fine: jax.Array,
    coarse: jax.Array,
    size: tuple[int, ...],
    stride: int,
    before: tuple[int, ...],
    precision: lax.PrecisionLike,
) -> jax.Array:
    """``R[p, q, a, b] = Σ fine[n, stride · y + p − before, stride · x + q − before, a] · coarse[n, y, x, b]``."""
    batch, rows, columns, features = coarse.shape
    padding = []
    for axis, length in enumerate((rows, columns)):
        after = (length - 1) * stride + size[axis] - before[axis] - fine.shape[1 + axis]
        padding.append((before[axis], after, 0))
    dtype = accumulation_dtype(fine.dtype)
    padded = lax.pad(fine, jnp.zeros((), fine.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
    if jax.default_backend() != "cpu":
        turned = lax.conv_general_dilated(
            padded.transpose(3, 1, 2, 0),
            coarse.transpose(1, 2, 0, 3),
            (1, 1),
            "VALID",
            rhs_dilation=(stride, stride),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=precision,
            preferred_element_type=dtype,
        )
        return turned.transpose(1, 2, 0, 3)
    # Windows as rows of a matrix, pixels along them: slices of whole planes, one axis after the other. The
    # barriers keep XLA from fusing slices and stacks into one gather of single numbers.
    planes = lax.optimization_barrier(padded.transpose(3, 0, 1, 2))
    across = [lax.slice_in_dim(planes, q, q + stride * (columns - 1) + 1, stride, axis=3) for q in range(size[1])]
    planes = lax.optimization_barrier(jnp.stack(across))
    down = [lax.slice_in_dim(planes, p, p + stride * (rows - 1) + 1, stride, axis=3) for p in range(size[0])]
    windows = jnp.stack(down).reshape(-1, batch * rows * columns)
    pixels = coarse.transpose(3, 0, 1, 2).reshape(features, -1)
    product = lax.dot_general(
        windows, pixels, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=dtype
    )
    return product.reshape(*size, -1, features)
