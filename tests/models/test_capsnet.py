"""CapsNet: the published sizes, the masking of the decoder, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsfl.learning.losses import margin_loss
from capsfl.models.capsnet import CapsNet, CapsNetConfig

TINY = CapsNetConfig(
    image_size=12,
    classes=2,
    conv_channels=4,
    conv_kernel=3,
    primary_capsules=2,
    primary_dim=4,
    primary_kernel=3,
    digit_dim=4,
    decoder=(8,),
)


def _count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def _shapes(config):
    return nnx.eval_shape(lambda: CapsNet(config, rngs=nnx.Rngs(0)))


@jax.jit
def _forward(model, images, labels=None):
    return model(images, labels)


@pytest.fixture(scope="module")
def tiny():
    return CapsNet(TINY, rngs=nnx.Rngs(0))


def test_mnist_network_has_the_published_number_of_parameters():
    model = _shapes(CapsNetConfig.mnist())
    parts = {"conv": 20_992, "primary": 5_308_672, "digit": 1_474_560, "decoder": 1_411_344}
    assert {name: _count(getattr(model, name)) for name in parts} == parts
    assert _count(model) == 8_215_568
    bare = CapsNetConfig(**{**CapsNetConfig.mnist().model_dump(), "reconstruction": False})
    assert _count(_shapes(bare)) == 6_804_224


def test_ct_network_is_small():
    assert _count(_shapes(CapsNetConfig.ct())) == 115_712


def test_mnist_network_classifies_and_reconstructs():
    model = CapsNet(CapsNetConfig.mnist(), rngs=nnx.Rngs(0))
    output = _forward(model, jax.random.uniform(jax.random.key(0), (2, 28, 28, 1)))
    assert output.capsules.shape == (2, 10, 16)
    assert output.reconstruction.shape == (2, 28, 28, 1)
    np.testing.assert_allclose(output.lengths, np.linalg.norm(output.capsules, axis=-1), rtol=1e-5)
    assert 0 < float(output.lengths.min()) <= float(output.lengths.max()) < 1


def test_decoder_sees_the_labelled_capsule_or_else_the_longest(tiny):
    images = jax.random.uniform(jax.random.key(0), (4, 12, 12, 1))
    free = _forward(tiny, images)
    longest = jnp.argmax(free.lengths, axis=-1)
    np.testing.assert_allclose(
        _forward(tiny, images, longest).reconstruction, free.reconstruction, rtol=1e-5, atol=1e-6
    )
    other = _forward(tiny, images, 1 - longest)
    np.testing.assert_allclose(other.lengths, free.lengths, rtol=1e-5)
    assert (np.abs(other.reconstruction - free.reconstruction).max(axis=(1, 2, 3)) > 1e-4).all()


def test_gradients_are_finite_for_zero_images(tiny):
    graph, parameters = nnx.split(tiny, nnx.Param)
    images, labels = jnp.zeros((2, 12, 12, 1)), jnp.array([0, 1])

    @jax.jit
    @jax.grad
    def gradient(parameters):
        output = nnx.merge(graph, parameters)(images, labels)
        return margin_loss(output.lengths, labels) + jnp.sum(output.reconstruction)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(parameters)))


def test_learns_to_tell_upright_from_lying_bars():
    generator = np.random.default_rng(0)
    images = generator.normal(scale=0.1, size=(64, 12, 12, 1)).astype(np.float32)
    labels = generator.integers(2, size=64)
    for image, label in zip(images, labels, strict=True):
        place = generator.integers(2, 10)
        image[(slice(2, 10), place) if label else (place, slice(2, 10))] += 1
    train, test = slice(0, 40), slice(40, 64)
    graph, parameters = nnx.split(CapsNet(TINY, rngs=nnx.Rngs(0)), nnx.Param)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(parameters)

    @jax.jit
    def update(parameters, state):
        def loss(parameters):
            output = nnx.merge(graph, parameters)(jnp.asarray(images[train]))
            return margin_loss(output.lengths, jnp.asarray(labels[train]))

        updates, state = optimizer.update(jax.grad(loss)(parameters), state)
        return optax.apply_updates(parameters, updates), state

    for _ in range(150):
        parameters, state = update(parameters, state)
    lengths = _forward(nnx.merge(graph, parameters), jnp.asarray(images[test])).lengths
    assert np.mean(np.argmax(lengths, axis=-1) == labels[test]) > 0.9


def test_vmapped_over_hospitals_equals_a_loop(tiny):
    graph, parameters = nnx.split(tiny, nnx.Param)
    hospitals = [jax.tree.map(lambda leaf, factor=factor: factor * leaf, parameters) for factor in (0.8, 1.2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *hospitals)
    images = jax.random.uniform(jax.random.key(0), (2, 3, 12, 12, 1))
    together = jax.jit(jax.vmap(lambda p, i: nnx.merge(graph, p)(i).lengths))(stacked, images)
    apart = [_forward(nnx.merge(graph, p), i).lengths for p, i in zip(hospitals, images, strict=True)]
    np.testing.assert_allclose(together, jnp.stack(apart), rtol=1e-5)


def test_impossible_shapes_are_named(tiny):
    with pytest.raises(ValueError, match=r"images \(2, 16, 16, 1\): expected \('batch', 12, 12, 1\)"):
        tiny(jnp.zeros((2, 16, 16, 1)))
    with pytest.raises(ValueError, match=r"labels \(3,\) do not fit images"):
        tiny(jnp.zeros((2, 12, 12, 1)), jnp.zeros(3, jnp.int32))


@pytest.mark.parametrize("size", [16, 24, 28])
def test_image_smaller_than_the_kernels_is_refused(size):
    assert CapsNetConfig.ct(image_size=29).primary_size() == 1
    with pytest.raises(ValueError, match=f"image_size {size}: capsnet needs at least 29 pixels a side"):
        CapsNetConfig.ct(image_size=size)
