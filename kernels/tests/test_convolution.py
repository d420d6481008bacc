"""The convolution under the capsules: gradients equal XLA's own, in the layout that is fast in loops."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels.convolutional.convolution import Window, convolve
from jax import lax


def _plain(images, kernel, stride, padding):
    return lax.conv_general_dilated(
        images, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("padding", [((0, 0), (0, 0)), ((2, 2), (1, 3))])
@pytest.mark.usefixtures("double_precision")
def test_value_and_gradients_equal_those_of_xla(stride, window, padding):
    keys = jax.random.split(jax.random.key(5), 2)
    images = jax.random.normal(keys[0], (3, 7, 6, 2), jnp.float64)
    kernel = jax.random.normal(keys[1], (window, window, 2, 4), jnp.float64)
    expected, expected_vjp = jax.vjp(lambda x, w: _plain(x, w, stride, padding), images, kernel)
    got, vjp = jax.vjp(lambda x, w: convolve(x, w, Window(stride=stride, padding=padding)), images, kernel)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
    cotangent = jax.random.normal(jax.random.key(6), got.shape, jnp.float64)
    for a, b in zip(vjp(cotangent), expected_vjp(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_every_convolution_inside_a_loop_has_the_layout_xla_is_fast_in():
    def gradients(convolution):
        def step(pair):
            return jax.grad(lambda x, w: jnp.sum(convolution(x, w) ** 2), argnums=(0, 1))(*pair)

        arguments = (jnp.ones((3, 2, 8, 8, 4)), jnp.ones((3, 5, 5, 4, 6)))
        compiled = jax.jit(lambda *a: lax.map(step, a)).lower(*arguments).compile().as_text()
        assert compiled is not None
        return re.findall(r" convolution\(.*dim_labels=(\w+->\w+)", compiled)

    ours = gradients(lambda x, w: convolve(x, w, Window(padding=((2, 2), (2, 2)))))
    assert len(ours) == 2, "the gradient of the kernel is a matrix product"
    assert set(ours) == {"b01f_01io->b01f"}
    # Should this fail, XLA has learned to do it alone, and `convolve` can go.
    assert set(gradients(lambda x, w: _plain(x, w, 1, "SAME"))) != {"b01f_01io->b01f"}


def test_a_kernel_per_example_makes_no_grouped_convolution():
    images, kernels = jnp.ones((3, 2, 8, 8, 4)), jnp.ones((3, 5, 5, 4, 6))

    def loss(x, w):
        return jnp.sum(convolve(x, w, Window()) ** 2)

    grad = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1)))).lower(images, kernels).as_text()
    assert "convolution" in grad
    assert set(re.findall(r"(?:feature|batch)_group_count = (\d+)", grad)) == {"1"}
