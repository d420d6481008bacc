"""U-Net and U-Net++: the published sizes, the interface of SegCaps, and that they learn."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsfl.learning.losses import segmentation_loss
from capsfl.models.unet import UNet, UNetConfig, UNetPlusPlus, UNetPlusPlusConfig

SMALL = {
    "unet": lambda: UNet(UNetConfig(width=8, depth=1), rngs=nnx.Rngs(0)),
    "unet++": lambda: UNetPlusPlus(UNetPlusPlusConfig(width=4, depth=2, deep_supervision=True), rngs=nnx.Rngs(0)),
}


@pytest.fixture(scope="module")
def network():
    return nnx.split(SMALL["unet++"](), nnx.Param)


@partial(jax.jit, static_argnums=0)
def _probability(graph, parameters, images):
    output = nnx.merge(graph, parameters)(images)
    assert output.reconstruction is None
    return output.lengths


def _count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        # Ronneberger et al. 2015, figure 1: its channels, with a 3 x 3 or 2 x 2 kernel each.
        (lambda rngs: UNet(UNetConfig(norm="none"), rngs=rngs), 31.03),
        # Zhou et al. 2018, table 3: U-Net of half the width, U-Net++.
        (lambda rngs: UNet(UNetConfig(width=32, norm="none"), rngs=rngs), 7.76),
        (lambda rngs: UNetPlusPlus(UNetPlusPlusConfig(norm="none"), rngs=rngs), 9.04),
    ],
    ids=["U-Net", "U-Net of half the width", "U-Net++"],
)
def test_networks_have_the_published_number_of_parameters(build, millions):
    assert round(_count(nnx.eval_shape(lambda: build(nnx.Rngs(0)))) / 1e6, 2) == millions


@pytest.mark.parametrize("depth", [1, 4])
def test_nodes_of_unet_plus_plus_see_every_node_before_them_in_their_row(depth):
    model = nnx.eval_shape(lambda: UNetPlusPlus(UNetPlusPlusConfig(width=2, depth=depth), rngs=nnx.Rngs(0)))
    assert [len(nodes) for nodes in model.nodes] == list(range(depth, 0, -1))
    inputs = [nodes[0].convs[0].kernel.shape[2] for nodes in model.nodes]
    assert inputs == [2 * (step + 1) for step in range(1, depth + 1)]


def test_any_size_divisible_by_eight_is_segmented(network):
    # 24 is no multiple of the 16 that four halvings need: the rim is added and cut back.
    deep = nnx.eval_shape(lambda: UNet(UNetConfig(width=2), rngs=nnx.Rngs(0)))
    output = jax.eval_shape(lambda model, images: model(images).lengths, deep, jnp.zeros((1, 24, 40, 1)))
    assert output.shape == (1, 24, 40)
    found = np.asarray(_probability(*network, jax.random.normal(jax.random.key(0), (2, 32, 32, 1))))
    assert found.shape == (2, 32, 32)
    assert 0 < found.min() < found.max() < 1


def test_a_patch_is_segmented_alike_alone_and_in_a_batch(network):
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 1))
    together, alone = _probability(*network, images), _probability(*network, images[::-1])[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert not np.allclose(together[0], together[1])


@pytest.mark.parametrize(
    ("width", "groups"),
    [(64, [32, 32, 32, 32, 32]), (32, [16, 32, 32, 32, 32]), (8, [4, 8, 16, 32, 32]), (3, [1, 3, 6, 12, 24])],
)
def test_a_group_has_two_channels_or_more_and_the_published_width_its_32_groups(width, groups):
    model = nnx.eval_shape(lambda: UNet(UNetConfig(width=width), rngs=nnx.Rngs(0)))
    assert [block.norms[0].num_groups for block in model.down] == groups


def test_learns_to_segment_disks():
    rows, columns = np.mgrid[:32, :32]
    centres = [(10, 12, 6), (20, 18, 7)]
    truth = np.stack([np.hypot(rows - y, columns - x) < radius for y, x, radius in centres])
    noise = np.random.default_rng(0).normal(scale=0.08, size=truth.shape)
    images = jnp.asarray(np.clip(-0.25 + 0.4 * truth + noise, -0.5, 0.5)[..., None], jnp.float32)
    truth = jnp.asarray(truth, jnp.float32)
    graph, parameters = nnx.split(SMALL["unet"](), nnx.Param)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(parameters)

    @jax.jit
    def update(parameters, state):
        slopes = jax.grad(lambda p: segmentation_loss(nnx.merge(graph, p)(images, truth), images, truth))(parameters)
        updates, state = optimizer.update(slopes, state)
        return optax.apply_updates(parameters, updates), state

    for _ in range(20):
        parameters, state = update(parameters, state)
    marked, expected = np.asarray(_probability(graph, parameters, images)) > 0.5, np.asarray(truth) > 0
    assert 2 * np.sum(marked & expected) / (marked.sum() + expected.sum()) > 0.9


def test_impossible_shapes_are_named(network):
    model = nnx.merge(*network)
    with pytest.raises(ValueError, match=r"images \(1, 32, 32, 3\): expected \(batch, height, width, 1\)"):
        model(jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match="divisible by 8; pad or crop"):
        model(jnp.zeros((1, 36, 32, 1)))
    with pytest.raises(ValueError, match=r"truth \(1, 16, 16\) does not fit"):
        model(jnp.zeros((1, 32, 32, 1)), jnp.zeros((1, 16, 16)))
