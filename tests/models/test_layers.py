"""The layers against independent loops and JAX's own convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from capsfl.models.layers import (
    Conv,
    ConvCapsules,
    DenseCapsules,
    EMCapsules,
    PrimaryCapsules,
    SelfAttentionCapsules,
    capsule_lengths,
    convolve,
)


def _convolved(images, kernel, strides, padding):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(images, kernel, (strides, strides), padding, dimension_numbers=dimensions)


@settings(max_examples=15, deadline=None)
@given(
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    kernel_size=st.integers(1, 5),
    strides=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.sampled_from(["SAME", "VALID"]),
    seed=st.integers(0, 2**16),
)
def test_convolution_by_slices_equals_lax(size, kernel_size, strides, channels, padding, seed):
    generator = np.random.default_rng(seed)
    images = jnp.asarray(generator.normal(size=(2, *size, channels[0])), jnp.float32)
    kernel = jnp.asarray(generator.normal(size=(kernel_size, kernel_size, *channels)), jnp.float32)
    found = jax.jit(convolve, static_argnames=("strides", "padding"))(images, kernel, strides=strides, padding=padding)
    np.testing.assert_allclose(found, _convolved(images, kernel, strides, padding), rtol=1e-4, atol=1e-4)


def test_convolution_by_slices_has_the_gradient_of_lax():
    images = jax.random.normal(jax.random.key(0), (2, 8, 7, 3))
    kernel = jax.random.normal(jax.random.key(1), (5, 5, 3, 4))

    def gradient(function):
        slopes = jax.grad(lambda i, k: jnp.sum(jnp.sin(function(i, k, 2, "SAME"))), argnums=(0, 1))
        return jax.jit(slopes)(images, kernel)

    found = gradient(lambda i, k, strides, padding: convolve(i, k, strides=strides, padding=padding))
    for left, right in zip(found, gradient(_convolved), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4)


def test_kernel_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="larger than the image"):
        convolve(jnp.zeros((1, 4, 4, 1)), jnp.zeros((5, 5, 1, 1)), padding="VALID")


def test_kernel_for_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 8, 8, 2\).*\(3, 3, 1, 4\)"):
        convolve(jnp.zeros((1, 8, 8, 2)), jnp.zeros((3, 3, 1, 4)))


def test_lengths_are_norms_with_zero_gradient_at_the_zero_vector():
    vectors = jnp.array([[0.0, 0.0], [0.3, 0.4]])
    np.testing.assert_allclose(capsule_lengths(vectors), [0.0, 0.5], rtol=1e-6)
    gradient = jax.grad(lambda v: jnp.sum(capsule_lengths(v)))(vectors)
    np.testing.assert_allclose(gradient, [[0.0, 0.0], [0.6, 0.8]], rtol=1e-6)


def test_primary_capsules_are_squashed_groups_of_channels():
    layer = PrimaryCapsules(3, 4, 5, 3, strides=2, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(1), (2, 9, 9, 3))
    capsules = np.asarray(layer(images), np.float64)
    assert capsules.shape == (2, 4 * 4 * 4, 5)
    channels = np.asarray(_convolved(images, layer.conv.kernel[...], 2, "VALID"), np.float64)
    expected = channels[1, 2, 3].reshape(4, 5)
    squares = np.sum(expected**2, axis=-1, keepdims=True)
    expected = squares / (1 + squares) * expected / np.sqrt(squares)
    np.testing.assert_allclose(capsules[1].reshape(4, 4, 4, 5)[2, 3], expected, rtol=1e-4, atol=1e-6)


def test_dense_capsules_follow_procedure_1_of_the_paper():
    layer = DenseCapsules(6, 3, 4, 5, num_iters=3, rngs=nnx.Rngs(0))
    inputs = jax.random.normal(jax.random.key(1), (2, 6, 3))
    weights = np.asarray(layer.weights[...], np.float64)
    for example, found in zip(np.asarray(inputs, np.float64), np.asarray(layer(inputs)), strict=True):
        votes = np.einsum("imkd,id->imk", weights, example)
        logits = np.zeros((6, 4))
        for _ in range(3):
            coupling = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            total = np.einsum("im,imk->mk", coupling, votes)
            squares = np.sum(total**2, axis=-1, keepdims=True)
            output = squares / (1 + squares) * total / np.sqrt(squares)
            logits += np.einsum("imk,mk->im", votes, output)
        np.testing.assert_allclose(found, output, rtol=1e-4, atol=1e-6)


def test_self_attention_capsules_follow_the_authors_code():
    layer = SelfAttentionCapsules(6, 3, 4, 5, rngs=nnx.Rngs(0))
    layer.bias[...] = 0.1 * jax.random.normal(jax.random.key(2), (6, 4))
    inputs = jax.random.normal(jax.random.key(1), (2, 6, 3))
    weights, bias = np.asarray(layer.weights[...], np.float64), np.asarray(layer.bias[...], np.float64)
    for example, found in zip(np.asarray(inputs, np.float64), np.asarray(layer(inputs)), strict=True):
        votes = np.einsum("imkd,id->imk", weights, example)
        agreement = np.einsum("imk,jmk->im", votes, votes) / np.sqrt(5)
        coupling = np.exp(agreement) / np.exp(agreement).sum(axis=1, keepdims=True) + bias
        total = np.einsum("im,imk->mk", coupling, votes)
        lengths = np.linalg.norm(total, axis=-1, keepdims=True)
        np.testing.assert_allclose(found, (1 - np.exp(-lengths)) * total / lengths, rtol=1e-4, atol=1e-6)


def test_self_attention_capsules_start_he_normal_over_all_inputs_and_outputs_without_a_prior():
    layer = SelfAttentionCapsules(16, 8, 10, 16, rngs=nnx.Rngs(0))
    assert layer.weights[...].shape == (16, 10, 16, 8)
    np.testing.assert_allclose(np.std(layer.weights[...]), np.sqrt(2 / (10 * 16 * 8)), rtol=0.02)
    np.testing.assert_array_equal(layer.bias[...], np.zeros((16, 10), np.float32))


def test_em_capsules_find_the_pose_that_most_votes_share():
    layer = EMCapsules(8, 2, num_iters=5, rngs=nnx.Rngs(0))
    pose = jax.random.normal(jax.random.key(1), (4, 4))
    weights = layer.weights[...]
    # Seven inputs agree on output 0, whatever their own pose; nobody agrees on output 1.
    layer.weights[...] = weights.at[:7, 0].set(jnp.eye(4)).at[7, 0].set(-2 * jnp.eye(4))
    poses, activations = layer(jnp.broadcast_to(pose, (3, 8, 4, 4)), jnp.ones((3, 8)))
    assert poses.shape == (3, 2, 4, 4)
    np.testing.assert_allclose(poses[0, 0], pose, atol=1e-3)
    assert (activations[:, 0] > activations[:, 1]).all()
    assert 0 <= float(activations.min()) <= float(activations.max()) <= 1


@pytest.mark.parametrize(("transpose", "size"), [(False, 4), (True, 16)])
def test_convolutional_capsules_change_the_resolution_by_the_stride(transpose, size):
    layer = ConvCapsules(3, 4, 6, 4, strides=2, transpose=transpose, rngs=nnx.Rngs(0))
    outputs = layer(jnp.ones((2, 5, 8, 8, 3)))
    assert outputs.shape == (2, 4, size, size, 6)
    assert 0 < float(capsule_lengths(outputs).min()) <= float(capsule_lengths(outputs).max()) < 1


def test_convolutional_capsules_start_he_normal_with_a_bias_of_a_tenth():
    layer = ConvCapsules(32, 8, 32, 5, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(np.std(layer.kernel[...]), np.sqrt(2 / (5 * 5 * 32)), rtol=0.02)
    np.testing.assert_array_equal(layer.bias[...], np.full((8, 32), 0.1, np.float32))


def test_plain_convolution_vmapped_over_hospitals_equals_a_loop():
    layers = [Conv(2, 3, 5, strides=2, rngs=nnx.Rngs(seed)) for seed in range(3)]
    graph, _ = nnx.split(layers[0])
    parameters = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[nnx.split(layer)[1] for layer in layers])
    images = jax.random.normal(jax.random.key(0), (3, 2, 8, 8, 2))
    together = jax.vmap(lambda p, i: nnx.merge(graph, p)(i))(parameters, images)
    apart = jnp.stack([layer(image) for layer, image in zip(layers, images, strict=True)])
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-6)
