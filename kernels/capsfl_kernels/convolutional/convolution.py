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
        padding: (before, after) for rows and columns of zeros around the image.
        precision: Of the products.
    """

    stride: int = 1
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
    return in_turns(functools.partial(apply, window), folding=1)(images, kernel)


def _forward(images: jax.Array, kernel: jax.Array, window: Window) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(images, kernel, window), (images, kernel)


def _backward(window: Window, residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, kernel = residuals
    grad = grad.astype(images.dtype)
    to_images = in_turns(functools.partial(grad_images, window, images.shape[1:3]), folding=1)
    to_kernel = in_turns(functools.partial(grad_kernel, window, kernel.shape[:2]), folding=0)
    return to_images(grad, kernel).astype(images.dtype), to_kernel(images, grad).astype(kernel.dtype)


_convolve.defvjp(_forward, _backward)


def in_turns(run: Callable, *, folding: int) -> Callable:
    """Gives a function a vmap that runs the examples one after the other.

    Args:
        run: A function of arrays, to an array or a tuple of arrays.
        folding: Number of first arguments that, with the one array returned, have as axis 0 a batch whose
            entries do not meet; a vmap over them alone then makes that batch longer instead. 0 for none.
    """
    call = custom_vmap(run)

    @call.def_vmap
    def _(size: int, batched: list[bool], *arguments: jax.Array) -> tuple[Any, Any]:
        if any(batched[:folding]) and not any(batched[folding:]):
            folded = []
            for many, array in zip(batched, arguments[:folding], strict=False):
                whole = array if many else jnp.broadcast_to(array, (size, *array.shape))
                folded.append(whole.reshape(-1, *whole.shape[2:]))
            result = call(*folded, *arguments[folding:])
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
    return _apply(images, kernel, window.precision, window.padding, stride=window.stride)


def grad_images(window: Window, size: tuple[int, ...], grad: jax.Array, kernel: jax.Array) -> jax.Array:
    """Gradient of images of ``size`` (H, W): the gradient, pulled apart by the stride, meets the turned kernel."""
    padding = []
    for axis in range(2):
        before = kernel.shape[axis] - 1 - window.padding[axis][0]
        spread = (grad.shape[1 + axis] - 1) * window.stride + 1
        padding.append((before, size[axis] + kernel.shape[axis] - 1 - spread - before))
    turned = kernel[::-1, ::-1].transpose(0, 1, 3, 2)
    return _apply(grad, turned, window.precision, padding, image_dilation=window.stride)


def grad_kernel(window: Window, size: tuple[int, ...], images: jax.Array, grad: jax.Array) -> jax.Array:
    """Gradient of a kernel of ``size`` (k, k): products of windows and gradient summed over all pixels."""
    batch, rows, columns, features = grad.shape
    stride, padding = window.stride, []
    for axis, length in enumerate((rows, columns)):
        before = window.padding[axis][0]
        padding.append((before, (length - 1) * stride + size[axis] - before - images.shape[1 + axis], 0))
    padded = lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), *padding, (0, 0, 0)])
    if jax.default_backend() != "cpu":
        # The images, channels as batch, meet the gradient as a kernel with holes of the stride.
        channels, taps = padded.transpose(3, 1, 2, 0), grad.transpose(1, 2, 0, 3)
        product = _apply(channels, taps, window.precision, "VALID", kernel_dilation=stride)
        return product.transpose(1, 2, 0, 3)
    # Windows as rows of a matrix, pixels along them: slices of whole planes, one axis after the other. The
    # barriers keep XLA from fusing slices and stacks into one gather of single numbers.
    planes = lax.optimization_barrier(padded.transpose(3, 0, 1, 2))
    across = [lax.slice_in_dim(planes, q, q + stride * (columns - 1) + 1, stride, axis=3) for q in range(size[1])]
    planes = lax.optimization_barrier(jnp.stack(across))
    down = [lax.slice_in_dim(planes, p, p + stride * (rows - 1) + 1, stride, axis=3) for p in range(size[0])]
    windows = jnp.stack(down).reshape(-1, batch * rows * columns)
    pixels = grad.transpose(3, 0, 1, 2).reshape(features, -1)
    product = lax.dot_general(
        windows,
        pixels,
        (((1,), (1,)), ((), ())),
        precision=window.precision,
        preferred_element_type=accumulation_dtype(images.dtype),
    )
    return product.reshape(*size, -1, features)


def _apply(
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
