"""Efficient-CapsNet: the published size, its normalisations, and that it learns."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsfl.learning.losses import margin_loss
from capsfl.models.efficient_capsnet import DepthwiseCapsules, EfficientCapsNet, EfficientCapsNetConfig

SMALL = {"conv_channels": (4, 4, 4, 8), "primary_dim": 4, "digit_dim": 4, "decoder": (8,)}


def _tiny(norm: Literal["batch", "group"] = "batch"):
    return EfficientCapsNetConfig(image_size=16, classes=2, norm=norm, **SMALL)


def _count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def _shapes(config):
    return nnx.eval_shape(lambda: EfficientCapsNet(config, rngs=nnx.Rngs(0)))


@nnx.jit
def _infer(model, images):
    return model(images, use_running_average=True)


@nnx.jit
def _train(model, images, labels):
    return model(images, labels)


def test_mnist_network_has_the_published_number_of_parameters():
    model = _shapes(EfficientCapsNetConfig.mnist())
    parts = {"convs": 130_112, "norms": 576, "primary": 10_496, "digit": 20_640, "decoder": 1_411_344}
    assert {name: _count(getattr(model, name)) for name in parts} == parts
    assert _count(model) - parts["decoder"] == 161_824


def test_ct_network_is_small_and_holds_nothing_but_parameters():
    model = _shapes(EfficientCapsNetConfig.ct())
    assert _count(model) == 37_520
    assert not jax.tree.leaves(nnx.state(model, nnx.BatchStat))


def test_depthwise_capsules_are_a_grouped_convolution_over_the_whole_image():
    layer = DepthwiseCapsules(5, 12, 4, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(1), (2, 5, 5, 12))
    outputs = jax.lax.conv_general_dilated(
        images,
        layer.kernel[...][:, :, None],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=12,
    )
    grouped = np.asarray(outputs, np.float64).reshape(2, 3, 4)
    lengths = np.linalg.norm(grouped, axis=-1, keepdims=True)
    np.testing.assert_allclose(layer(images), (1 - np.exp(-lengths)) * grouped / lengths, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_classifies_and_reconstructs(norm):
    model = EfficientCapsNet(_tiny(norm), rngs=nnx.Rngs(0))
    images = jax.random.uniform(jax.random.key(0), (3, 16, 16, 1))
    output = _infer(model, images)
    assert output.capsules.shape == (3, 2, 4)
    assert output.reconstruction.shape == images.shape
    np.testing.assert_allclose(output.lengths, np.linalg.norm(output.capsules, axis=-1), rtol=1e-5)
    assert 0 < float(output.lengths.min()) <= float(output.lengths.max()) < 1


def test_inference_takes_the_gathered_statistics_and_training_those_of_the_batch():
    model = EfficientCapsNet(_tiny(), rngs=nnx.Rngs(0))
    for norm in model.norms:
        assert isinstance(norm, nnx.BatchNorm)
        norm.momentum = 0.5
    images, labels = jax.random.uniform(jax.random.key(0), (4, 16, 16, 1)), jnp.zeros(4, jnp.int32)
    first = _infer(model, images).lengths
    trained = _train(model, images, labels).lengths
    assert np.abs(trained - first).max() > 1e-2
    for _ in range(20):
        _train(model, images, labels)
    np.testing.assert_allclose(_infer(model, images).lengths, trained, rtol=1e-3)
    np.testing.assert_allclose(_infer(model, images[:1]).lengths, trained[:1], rtol=1e-3)
    model.eval()
    np.testing.assert_allclose(_train(model, images[:1], labels[:1]).lengths, trained[:1], rtol=1e-3)


def test_group_normalisation_keeps_examples_apart():
    model = EfficientCapsNet(_tiny("group"), rngs=nnx.Rngs(0))
    images = jax.random.uniform(jax.random.key(0), (4, 16, 16, 1))
    together = _train(model, images, jnp.zeros(4, jnp.int32)).lengths
    np.testing.assert_allclose(_train(model, images[2:3], jnp.zeros(1, jnp.int32)).lengths, together[2:3], rtol=1e-4)


def test_input_is_centred_where_the_configuration_says_so():
    centred = _tiny("group").model_copy(update={"input_mean": 0.5, "input_deviation": 0.25})
    plain, told = (EfficientCapsNet(config, rngs=nnx.Rngs(0)) for config in (_tiny("group"), centred))
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 1))
    lengths = _infer(told, images).lengths
    np.testing.assert_allclose(lengths, _infer(plain, (images - 0.5) * 4).lengths, rtol=1e-4)
    assert np.abs(lengths - _infer(plain, images).lengths).max() > 1e-3
    with pytest.raises(ValueError, match="input_deviation"):
        EfficientCapsNetConfig(image_size=28, input_deviation=0.0)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_gradients_are_finite_for_zero_images(norm):
    graph, parameters, rest = nnx.split(EfficientCapsNet(_tiny(norm), rngs=nnx.Rngs(0)), nnx.Param, ...)
    images, labels = jnp.zeros((2, 16, 16, 1)), jnp.array([0, 1])

    @jax.jit
    @jax.grad
    def gradient(parameters):
        output = nnx.merge(graph, parameters, rest, copy=True)(images, labels)
        assert output.reconstruction is not None
        return margin_loss(output.lengths, labels) + jnp.sum(output.reconstruction)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(parameters)))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_training_fits_upright_and_lying_bars(norm):
    generator = np.random.default_rng(0)
    images = generator.normal(scale=0.1, size=(32, 16, 16, 1)).astype(np.float32)
    labels = generator.integers(2, size=32)
    for image, label in zip(images, labels, strict=True):
        place = generator.integers(3, 13)
        image[(slice(3, 13), place) if label else (place, slice(3, 13))] += 1
    graph, parameters, rest = nnx.split(EfficientCapsNet(_tiny(norm), rngs=nnx.Rngs(0)), nnx.Param, ...)
    optimizer = optax.adam(5e-3)
    state = optimizer.init(parameters)

    @jax.jit
    def update(parameters, rest, state):
        def loss(parameters):
            model = nnx.merge(graph, parameters, rest, copy=True)
            output = model(jnp.asarray(images))
            return margin_loss(output.lengths, jnp.asarray(labels)), nnx.split(model, nnx.Param, ...)[2]

        (value, gathered), grads = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(parameters, updates), gathered, state, value

    losses = []
    for _ in range(80):
        parameters, rest, state, value = update(parameters, rest, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 10
    model = nnx.merge(graph, parameters, rest)
    lengths = _train(model, jnp.asarray(images), jnp.asarray(labels)).lengths
    assert np.mean(np.argmax(lengths, axis=-1) == labels) > 0.9


def test_impossible_sizes_and_shapes_are_named():
    with pytest.raises(ValueError, match="image_size 10: efficient_capsnet needs at least 11 pixels a side"):
        EfficientCapsNetConfig(image_size=10)
    assert EfficientCapsNetConfig(image_size=11).primary_size() == 1
    with pytest.raises(ValueError, match="primary_dim 5 does not divide conv_channels 128"):
        EfficientCapsNetConfig(image_size=28, primary_dim=5)
    model = _shapes(_tiny())
    with pytest.raises(ValueError, match=r"images \(2, 12, 12, 1\): expected \('batch', 16, 16, 1\)"):
        model(jnp.zeros((2, 12, 12, 1)))
    with pytest.raises(ValueError, match=r"labels \(3,\) do not fit images"):
        model(jnp.zeros((2, 16, 16, 1)), jnp.zeros(3, jnp.int32))
