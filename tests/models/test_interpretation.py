"""Moved capsules draw what the decoder draws, and the couplings shown are those that the network routes by."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from capsfl_kernels import conv_capsules, squash
from flax import nnx

from capsfl.models.efficient_capsnet import EfficientCapsNet, EfficientCapsNetConfig
from capsfl.models.interpretation import capsule_grid, coupling_maps, route_with_couplings
from capsfl.models.layers import ConvCapsules
from capsfl.models.segcaps import SegCaps, SegCapsConfig

TINY = EfficientCapsNetConfig(image_size=16, conv_channels=(4, 4, 4, 16), classes=3, decoder=(8,))
IMAGES = jnp.asarray(np.random.default_rng(1).random((2, 16, 16, 1)), jnp.float32)


def drawn(make: Callable[[], nnx.Module], scale: float = 0.3) -> Any:
    """A network with weights drawn by NumPy, where the network's own draw would compile for seconds."""
    generator = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(make))

    def draw(leaf):
        return jnp.asarray(scale * generator.standard_normal(leaf.shape), jnp.float32)

    return nnx.merge(graph, jax.tree.map(draw, state))


@pytest.fixture(scope="module")
def network():
    """An Efficient-CapsNet with batch normalisation, in training, so that every pass moves its statistics."""
    return drawn(lambda: EfficientCapsNet(TINY, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def grid(network):
    return capsule_grid(network, IMAGES)


@pytest.fixture(scope="module")
def answer(network, grid):
    graph, state = nnx.split(network)
    return jax.jit(lambda state, images: nnx.merge(graph, state)(images))(state, IMAGES)


def test_the_middle_of_every_row_is_the_reconstruction_itself(grid, answer):
    assert grid.reconstructions.shape == (2, 16, 11, 16, 16, 1)
    expected = np.broadcast_to(answer.reconstruction[:, None], (2, 16, 16, 16, 1))
    np.testing.assert_allclose(grid.reconstructions[:, :, 5], expected, atol=1e-6)
    np.testing.assert_array_equal(grid.chosen, np.argmax(answer.lengths, axis=-1))
    np.testing.assert_allclose(np.linalg.norm(grid.capsule, axis=-1), np.max(answer.lengths, axis=-1), rtol=1e-5)


def test_a_cell_is_what_the_decoder_draws_of_one_moved_number(network, grid, answer):
    np.testing.assert_allclose(grid.tweaks, np.linspace(-0.25, 0.25, 11), atol=1e-7)
    row, step, picture = 7, 9, 1
    chosen = int(grid.chosen[picture])
    moved = np.zeros((3, 16), np.float32)
    moved[chosen] = answer.capsules[picture, chosen]
    moved[chosen, row] += 0.2
    expected = network.decoder(moved.reshape(1, -1)).reshape(16, 16, 1)
    np.testing.assert_allclose(grid.reconstructions[picture, row, step], expected, atol=1e-6)
    assert np.ptp(grid.reconstructions, axis=2).max() > 1e-3


def test_a_label_chooses_the_capsule_that_moves(network, grid, answer):
    labels = (grid.chosen + 1) % 3
    other = capsule_grid(network, IMAGES, labels)
    np.testing.assert_array_equal(other.chosen, labels)
    np.testing.assert_allclose(other.capsule, np.asarray(answer.capsules)[np.arange(2), labels], atol=1e-6)


def test_looking_at_a_network_leaves_it_as_it_is(network):
    before = jax.tree.map(np.array, nnx.state(network))
    capsule_grid(network, IMAGES)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(network))


def test_a_network_without_a_decoder_is_refused():
    bare = TINY.model_copy(update={"reconstruction": False})
    with pytest.raises(ValueError, match="no decoder; train it with reconstruction = true"):
        capsule_grid(nnx.eval_shape(lambda: EfficientCapsNet(bare, rngs=nnx.Rngs(0))), IMAGES)


def unsquash(capsules):
    """The vector s that `squash` shortens to s |s| / (1 + |s|^2)."""
    length = jnp.linalg.norm(capsules, axis=-1, keepdims=True)
    return capsules / jnp.maximum(length, 1e-12) * jnp.sqrt(length / (1 - length))


@pytest.mark.parametrize("transpose", [False, True], ids=["down", "up"])
def test_couplings_belong_to_the_routing_that_the_layer_does(transpose):
    size = 4 if transpose else 5
    layer = drawn(lambda: ConvCapsules(4, 3, 5, size, strides=2, transpose=transpose, rngs=nnx.Rngs(0)))
    capsules = jnp.asarray(np.random.default_rng(4).standard_normal((1, 3, 4, 6, 4)), jnp.float32)

    @jax.jit
    def both(capsules):
        outputs, couplings = route_with_couplings(layer, capsules)
        kernel, bias = layer.kernel[...], layer.bias[...]

        def reference(capsules, bias, num_iters):
            return conv_capsules(
                capsules, kernel, bias, strides=2, transpose=transpose, num_iters=num_iters, implementation="reference"
            )

        # A child that routes alone and once gives every parent a third of its vote: one picture for each child.
        alone = reference(capsules.swapaxes(0, 1), None, 1)
        votes = 3 * unsquash(alone)
        total = jnp.einsum("imhw,imhwk->mhwk", couplings[0], votes) + bias[:, None, None]
        return outputs, couplings, squash(total)[None], reference(capsules, bias, 3)

    outputs, couplings, coupled, expected = both(capsules)
    np.testing.assert_allclose(outputs, expected, atol=2e-6)
    np.testing.assert_allclose(coupled, expected, atol=2e-4)
    np.testing.assert_allclose(couplings.sum(axis=2), 1, atol=1e-6)
    assert np.ptp(couplings) > 0.1


def test_coupling_maps_of_segcaps_follow_the_network():
    config = SegCapsConfig(width=0.13, routed="resolution", reconstruction=False)
    model = drawn(lambda: SegCaps(config, implementation="reference", rngs=nnx.Rngs(0)))
    images = jnp.asarray(np.random.default_rng(2).random((1, 16, 24, 1)) - 0.5, jnp.float32)
    # Compiled together, what both have in common is compiled once; to run it once it need not be fast.
    maps, expected = jax.jit(
        lambda images: (coupling_maps(model, images), model(images).lengths),
        compiler_options={"xla_backend_optimization_level": 0},
    )(images)
    found = {layer.name: (layer.sources, layer.couplings.shape[1:]) for layer in maps.layers}
    assert list(found.items()) == [
        ("conv_cap_2_2", ((4,), (4, 4, 4, 6))),
        ("conv_cap_3_2", ((8,), (8, 8, 2, 3))),
        ("deconv_cap_1_1", ((8,), (8, 8, 4, 6))),
        ("deconv_cap_2_1", ((4,), (4, 4, 8, 12))),
        ("deconv_cap_3_1", ((4,), (4, 2, 16, 24))),
    ]
    for layer in maps.layers:
        np.testing.assert_allclose(layer.couplings.sum(axis=2), 1, atol=1e-6)
        assert layer.lengths.shape == (1, *layer.couplings.shape[2:])
        assert 0 <= layer.lengths.min() <= layer.lengths.max() <= 1
    np.testing.assert_allclose(maps.lengths, expected, atol=1e-5)
    assert isinstance(model.conv_cap_2_2, ConvCapsules)


def test_every_layer_of_r3_that_has_a_choice_is_shown():
    def names(config):
        model = drawn(lambda: SegCaps(config, rngs=nnx.Rngs(0)))
        images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
        shapes = jax.eval_shape(lambda array: coupling_maps(model, array), images)
        return {layer.name: layer.sources for layer in shapes.layers}

    found = names(SegCapsConfig(width=0.13, reconstruction=False))
    assert len(found) == 9
    assert found["deconv_cap_1_2"] == (8, 8)
    assert found["deconv_cap_2_2"] == (4, 4)
    assert not names(SegCapsConfig(width=0.13, num_iters=1, reconstruction=False))
