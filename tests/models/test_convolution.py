"""Convolution by slices and pooling against JAX's own, value and gradient, alone and with a kernel per hospital."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from capsfl.models.convolution import convolve, max_pool


def _convolved(images, kernel, strides, padding):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(images, kernel, (strides, strides), padding, dimension_numbers=dimensions)


def _pooled(images, size):
    window = (1, size, size, 1)
    return lax.reduce_window(images, -jnp.inf, lax.max, window, window, "VALID")


def _gradients(function, *arguments):
    def loss(*given):
        return jnp.sum(jnp.sin(function(*given)))

    return jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments)))))(*arguments)


@pytest.mark.parametrize(
    ("size", "kernel_size", "strides", "padding"),
    [((8, 7), 3, 1, "SAME"), ((9, 6), 5, 2, "SAME"), ((11, 8), 4, 3, "VALID"), ((7, 7), 2, 3, "VALID")],
)
def test_gradients_of_convolution_are_those_of_lax(size, kernel_size, strides, padding):
    images = jax.random.normal(jax.random.key(0), (2, *size, 3))
    kernel = jax.random.normal(jax.random.key(1), (kernel_size, kernel_size, 3, 4))
    found = _gradients(lambda i, k: convolve(i, k, strides=strides, padding=padding), images, kernel)
    expected = _gradients(lambda i, k: _convolved(i, k, strides, padding), images, kernel)
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4)


def test_a_kernel_per_hospital_gives_the_gradients_of_each_alone():
    images = jax.random.normal(jax.random.key(0), (3, 2, 6, 5, 2))
    kernels = jax.random.normal(jax.random.key(1), (3, 3, 3, 2, 4))
    together = jax.vmap(lambda i, k: _gradients(lambda a, b: convolve(a, b, strides=2), i, k))(images, kernels)
    for hospital in range(3):
        alone = _gradients(lambda a, b: _convolved(a, b, 2, "SAME"), images[hospital], kernels[hospital])
        for left, right in zip(together, alone, strict=True):
            np.testing.assert_allclose(left[hospital], right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("height", "width", "size"), [(6, 8, 2), (7, 5, 2), (9, 11, 3)])
def test_pooling_and_its_gradient_are_those_of_lax(height, width, size):
    # Whole numbers, so that windows hold equal pixels: the gradient must go to the first of them.
    drawn = jax.random.randint(jax.random.key(2), (2, height, width, 3), -2, 3)
    images = drawn.astype(jnp.float32)
    np.testing.assert_array_equal(max_pool(images, size), _pooled(images, size))
    (found,) = _gradients(lambda i: max_pool(i, size), images)
    (expected,) = _gradients(lambda i: _pooled(i, size), images)
    np.testing.assert_array_equal(found, expected)


def test_pooling_under_vmap_is_pooling_of_each():
    images = jax.random.normal(jax.random.key(3), (3, 2, 4, 4, 1))
    found = jax.vmap(lambda i: _gradients(max_pool, i)[0])(images)
    np.testing.assert_allclose(found[1], _gradients(max_pool, images[1])[0])


def test_images_smaller_than_a_window_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 2\): smaller than a window of 2 x 2"):
        max_pool(jnp.zeros((1, 1, 4, 2)))
