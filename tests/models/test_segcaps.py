"""SegCaps: the published sizes, honest ranges and gradients, and that it learns."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsfl.learning.losses import segmentation_loss
from capsfl.models.layers import ConvCapsules
from capsfl.models.segcaps import SegCaps, SegCapsConfig, divide_by_length

SMALL = SegCapsConfig(width=0.125)
LIGHT = SegCapsConfig(width=0.125, routed="resolution")
"""Every kind of layer, but routed only where the resolution changes: a step costs a third of R3's."""

# Parameters per layer, LaLonde & Bagci 2018 (R3).
PUBLISHED = {
    "conv1": 416,
    "primarycaps": 12_832,
    "conv_cap_2_1": 25_664,
    "conv_cap_2_2": 51_328,
    "conv_cap_3_1": 205_056,
    "conv_cap_3_2": 410_112,
    "conv_cap_4_1": 409_856,
    "deconv_cap_1_1": 131_328,
    "deconv_cap_1_2": 102_528,
    "deconv_cap_2_1": 32_832,
    "deconv_cap_2_2": 25_664,
    "deconv_cap_3_1": 8_224,
    "seg_caps": 272,
    "recon": 9_537,
}


def _shapes(config):
    """The network without its numbers, which at full width take seconds to draw."""
    return nnx.eval_shape(lambda: SegCaps(config, rngs=nnx.Rngs(0)))


def _count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


@jax.jit
def _forward(model, images, truth=None):
    return model(images, truth)


def _loss(graph, parameters, images, truth):
    return segmentation_loss(nnx.merge(graph, parameters)(images, truth), images, truth)


@pytest.fixture(scope="module")
def small():
    return nnx.split(SegCaps(SMALL, rngs=nnx.Rngs(0)), nnx.Param)


@pytest.fixture(scope="module")
def light():
    return nnx.split(SegCaps(LIGHT, rngs=nnx.Rngs(0)), nnx.Param)


@pytest.fixture(scope="module")
def gradient(light):
    graph, _ = light
    return jax.jit(jax.value_and_grad(lambda *arguments: _loss(graph, *arguments)))


def test_every_layer_has_the_published_number_of_parameters():
    model = _shapes(SegCapsConfig.r3())
    assert {name: _count(getattr(model, name)) for name in PUBLISHED} == PUBLISHED
    assert _count(model) == sum(PUBLISHED.values()) == 1_425_649


def test_without_reconstruction_the_head_is_gone():
    model = _shapes(SegCapsConfig(reconstruction=False))
    assert _count(model) == 1_416_112


def test_r1_routes_only_where_the_resolution_changes():
    model = _shapes(SegCapsConfig.r1())
    routed = {name for name in PUBLISHED if getattr(getattr(model, name), "num_iters", 1) == 3}
    assert routed == {"conv_cap_2_2", "conv_cap_3_2", "deconv_cap_1_1", "deconv_cap_2_1", "deconv_cap_3_1"}


def test_r3_routes_every_layer_after_the_first_two_capsule_layers():
    model = _shapes(SegCapsConfig.r3())
    unrouted = {name for name in PUBLISHED if getattr(getattr(model, name), "num_iters", 1) == 1}
    assert unrouted == {"conv1", "primarycaps", "conv_cap_2_1", "recon"}


def test_an_update_does_not_change_the_types_of_the_parameters(small):
    # A weakly typed parameter becomes a strong one in its first update, and the training step compiles twice.
    updated = jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf - 0.1 * jnp.square(leaf), tree), small[1])
    before, after = (
        [(leaf.dtype, getattr(leaf, "weak_type", False)) for leaf in jax.tree.leaves(tree)]
        for tree in (small[1], updated)
    )
    assert before == after == [(jnp.float32, False)] * len(before)


def test_output_has_the_shape_of_the_image_and_lengths_below_one(small):
    output = _forward(nnx.merge(*small), jax.random.normal(jax.random.key(0), (4, 32, 32, 1)))
    assert output.lengths.shape == output.reconstruction.shape == (4, 32, 32)
    assert 0 <= float(output.lengths.min()) <= float(output.lengths.max()) < 1
    assert 0 <= float(output.reconstruction.min()) <= float(output.reconstruction.max()) <= 1


def test_five_slices_give_one_mask():
    model = _shapes(SegCapsConfig(in_channels=5))
    output = jax.eval_shape(_forward, model, jax.ShapeDtypeStruct((1, 8, 8, 5), jnp.float32))
    assert output.lengths.shape == (1, 8, 8)


def test_truth_hides_the_background_from_the_reconstruction_alone(small):
    model = nnx.merge(*small)
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 1))
    truth = jnp.zeros((4, 32, 32)).at[0, 4:8, 4:8].set(1)
    seen, hidden = _forward(model, images, truth), _forward(model, images, jnp.zeros((4, 32, 32)))
    np.testing.assert_array_equal(seen.lengths, hidden.lengths)
    differs = np.asarray(seen.reconstruction != hidden.reconstruction)
    assert differs.any()
    assert not differs[np.asarray(truth) == 0].any()


@pytest.mark.parametrize("value", [0.0, -0.5, 0.5])
@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_gradients_are_finite_for_constant_images(light, gradient, value, foreground):
    images = jnp.full((4, 32, 32, 1), value)
    loss, slopes = gradient(light[1], images, jnp.full((4, 32, 32), foreground))
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_with_norm_every_layer_starts_at_votes_of_about_unit_length():
    model = SegCaps(SegCapsConfig(width=0.125, norm="length", num_iters=1, reconstruction=False), rngs=nnx.Rngs(0))
    names = [str(name) for name, layer in nnx.iter_children(model) if isinstance(layer, ConvCapsules)]

    @jax.jit
    def first_lengths(model, images):
        found = {}

        def watch(name, layer):
            def route(capsules):
                outputs = layer(capsules)
                # Undo the squash, whose length is n n / (1 + n n).
                lengths = jnp.linalg.norm(outputs, axis=-1)
                found[name] = jnp.sqrt(jnp.mean(lengths / (1 - lengths)))
                return outputs

            return route

        for name in names:
            setattr(model, name, watch(name, getattr(model, name)))
        model(images)
        return found

    found = {
        name: float(value)
        for name, value in first_lengths(model, jax.random.uniform(jax.random.key(0), (4, 32, 32, 1)) - 0.5).items()
    }
    assert len(found) == 12
    assert 0.1 < found.pop("seg_caps") < 0.7
    assert all(0.4 < length < 2.5 for length in found.values()), found


def test_norm_adds_no_parameter_and_the_published_network_is_without():
    assert _count(_shapes(SegCapsConfig(norm="length"))) == 1_425_649
    assert SegCapsConfig().norm == SegCapsConfig.r1().norm == "none"
    with pytest.raises(ValueError, match=r"weights = 'a.hdf5': belong to the published network; leave norm"):
        SegCapsConfig(weights="a.hdf5", norm="length")


def test_dividing_by_length_keeps_examples_apart_and_survives_zeros():
    capsules = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 5)) * jnp.array([1e-2, 30.0]).reshape(2, 1, 1, 1, 1)
    scaled = divide_by_length(capsules)
    np.testing.assert_allclose(jnp.mean(jnp.sum(scaled**2, -1), axis=(1, 2, 3)), 1, rtol=1e-2)
    np.testing.assert_array_equal(scaled[:1], divide_by_length(capsules[:1]))
    assert not divide_by_length(jnp.zeros((1, 1, 2, 2, 2))).any()


def test_learns_to_segment_disks(light, gradient):
    rows, columns = np.mgrid[:32, :32]
    centres = [(10, 12, 6), (20, 18, 7), (16, 9, 5), (14, 22, 8)]
    truth = np.stack([np.hypot(rows - y, columns - x) < radius for y, x, radius in centres])
    noise = np.random.default_rng(0).normal(scale=0.08, size=truth.shape)
    images = jnp.asarray(np.clip(-0.25 + 0.4 * truth + noise, -0.5, 0.5)[..., None], jnp.float32)
    truth = jnp.asarray(truth, jnp.float32)

    graph, parameters = light
    optimizer = optax.adam(1e-2)
    state = optimizer.init(parameters)

    @jax.jit
    def update(slopes, parameters, state):
        updates, state = optimizer.update(slopes, state)
        return optax.apply_updates(parameters, updates), state

    for _ in range(60):
        _, slopes = gradient(parameters, images, truth)
        parameters, state = update(slopes, parameters, state)
    prediction = np.asarray(_forward(nnx.merge(graph, parameters), images).lengths) > 0.5
    expected = np.asarray(truth) > 0
    assert 2 * np.sum(prediction & expected) / (prediction.sum() + expected.sum()) > 0.9


def test_streamed_gradient_equals_that_of_stored_votes():
    def gradient(implementation):
        graph, parameters = nnx.split(SegCaps(LIGHT, implementation=implementation, rngs=nnx.Rngs(0)))
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), parameters)
        images = jax.random.normal(jax.random.key(4), (1, 16, 16, 1), jnp.float64)
        truth = (images[..., 0] > 0).astype(jnp.float64)
        return jax.jit(jax.grad(lambda p: segmentation_loss(nnx.merge(graph, p)(images, truth), images, truth)))(wide)

    with jax.enable_x64(True):
        pairs = zip(jax.tree.leaves(gradient("streamed")), jax.tree.leaves(gradient("reference")), strict=True)
        for got, expected in pairs:
            assert got.dtype == jnp.float64
            assert np.linalg.norm(got - expected) <= 1e-10 * np.linalg.norm(expected)


@pytest.mark.torture
@pytest.mark.skipif("CAPSFL_TORTURE" not in os.environ, reason="compiles the whole network: `make torture`")
def test_a_step_at_512_pixels_needs_less_than_400_mib():
    graph, parameters = nnx.split(_shapes(SegCapsConfig.r3()))
    images = jax.ShapeDtypeStruct((1, 512, 512, 1), jnp.float32)
    truth = jax.ShapeDtypeStruct((1, 512, 512), jnp.float32)

    def loss(parameters, images, truth):
        return segmentation_loss(nnx.merge(graph, parameters)(images, truth), images, truth)

    usage = jax.jit(jax.value_and_grad(loss)).lower(parameters, images, truth).compile().memory_analysis()
    assert usage is not None
    assert usage.temp_size_in_bytes <= 400 << 20


def test_vmapped_over_hospitals_equals_a_loop(small):
    graph = small[0]
    hospitals = [jax.tree.map(lambda leaf, factor=factor: factor * leaf, small[1]) for factor in (0.9, 1.1)]
    images = jax.random.uniform(jax.random.key(0), (2, 4, 32, 32, 1)) - 0.5
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *hospitals)
    together = jax.jit(jax.vmap(lambda p, i: nnx.merge(graph, p)(i).lengths))(stacked, images)
    apart = [_forward(nnx.merge(graph, p), i).lengths for p, i in zip(hospitals, images, strict=True)]
    np.testing.assert_allclose(together, jnp.stack(apart), rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "truth", "message"),
    [
        ((1, 20, 16, 1), None, r"\(1, 20, 16, 1\).*divisible by 8"),
        ((1, 16, 16, 3), None, r"\(1, 16, 16, 3\): expected \(batch, height, width, 1\)"),
        ((16, 16, 1), None, r"\(16, 16, 1\): expected"),
        ((1, 16, 16, 1), (1, 16, 8), r"truth \(1, 16, 8\) does not fit images"),
    ],
)
def test_impossible_shapes_are_named(small, images, truth, message):
    model = nnx.merge(*small)
    with pytest.raises(ValueError, match=message):
        model(jnp.zeros(images), None if truth is None else jnp.zeros(truth))


def test_narrow_networks_keep_two_channels():
    model = _shapes(SegCapsConfig(width=0.01, num_iters=1))
    assert model.conv1.kernel.shape == (5, 5, 1, 2)
    assert model.seg_caps.kernel.shape == (1, 1, 2, 1, 2)


@pytest.mark.parametrize("settings", [{"width": 0.0}, {"width": -1.0}, {"num_iters": 2}, {"in_channels": 0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SegCapsConfig(**settings)
