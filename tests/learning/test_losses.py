"""The losses against the formulas of their papers, and what padding and extremes may do to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfl.learning.losses import (
    margin_loss,
    mean_squared_error,
    reconstruction_loss,
    segmentation_loss,
    soft_dice_loss,
    weighted_bce,
    weighted_mean,
)
from capsfl.models.segcaps import SegCapsOutput


def _masks(seed, shape=(3, 4, 5)):
    generator = np.random.default_rng(seed)
    probabilities = generator.uniform(0.05, 0.95, size=shape).astype(np.float32)
    return probabilities, (generator.uniform(size=shape) < 0.4).astype(np.float32)


def test_margin_loss_is_equation_4_of_sabour():
    lengths = np.array([[0.95, 0.05, 0.3], [0.2, 0.6, 0.0]], np.float32)
    # Present above 0.9 and absent below 0.1 cost nothing.
    first = 0.5 * (0.3 - 0.1) ** 2
    second = (0.9 - 0.6) ** 2 + 0.5 * (0.2 - 0.1) ** 2
    found = margin_loss(jnp.asarray(lengths), jnp.array([0, 1]))
    assert float(found) == pytest.approx((first + second) / 2, rel=1e-6)


def test_reconstruction_counts_the_sum_and_segmentation_the_mean():
    reconstruction, images = jnp.full((2, 4, 4, 1), 0.5), jnp.zeros((2, 4, 4, 1))
    assert float(reconstruction_loss(reconstruction, images)) == pytest.approx(0.0005 * 16 * 0.25)
    assert float(mean_squared_error(reconstruction, images)) == pytest.approx(0.25)


def test_weighted_cross_entropy_is_the_formula():
    probabilities, truth = _masks(0)
    expected = -np.mean(3 * truth * np.log(probabilities) + (1 - truth) * np.log(1 - probabilities))
    found = weighted_bce(jnp.asarray(probabilities), jnp.asarray(truth), positive_weight=3.0)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_soft_dice_is_the_formula_for_each_example():
    probabilities, truth = _masks(1)
    terms = [1 - (2 * (p * t).sum() + 1) / ((p**2).sum() + (t**2).sum() + 1) for p, t in zip(*_masks(1), strict=True)]
    found = soft_dice_loss(jnp.asarray(probabilities), jnp.asarray(truth))
    assert float(found) == pytest.approx(np.mean(terms), rel=1e-5)


def test_soft_dice_of_equal_masks_is_zero_even_when_empty():
    truth = jnp.stack([jnp.zeros((4, 4)), jnp.ones((4, 4))])
    assert float(soft_dice_loss(truth, truth)) == 0


def test_segmentation_loss_is_the_sum_of_its_parts():
    probabilities, truth = _masks(2)
    images = jax.random.uniform(jax.random.key(3), (*truth.shape, 5)) - 0.5
    reconstruction = probabilities**2
    found = segmentation_loss(SegCapsOutput(probabilities, reconstruction), images, truth, positive_weight=2.0)
    parts = float(weighted_bce(probabilities, truth, positive_weight=2.0) + soft_dice_loss(probabilities, truth))
    parts += 0.1 * float(np.mean((reconstruction - truth * (images[..., 2] + 0.5)) ** 2))
    assert float(found) == pytest.approx(parts, rel=1e-5)
    bare = segmentation_loss(SegCapsOutput(probabilities, None), images, truth, reconstruction_weight=100.0)
    assert float(bare) == pytest.approx(
        float(weighted_bce(probabilities, truth) + soft_dice_loss(probabilities, truth))
    )


def test_dice_over_the_batch_pools_the_pixels():
    probabilities, truth = _masks(4)
    output, images = SegCapsOutput(probabilities, None), jnp.zeros((*truth.shape, 1))
    found = segmentation_loss(output, images, truth, dice_over="batch")
    dice = (2 * (probabilities * truth).sum() + 1) / ((probabilities**2).sum() + truth.sum() + 1)
    assert float(found) == pytest.approx(float(weighted_bce(probabilities, truth)) + 1 - dice, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(real=st.integers(1, 4), padded=st.integers(0, 3), seed=st.integers(0, 1000))
def test_padded_examples_count_nothing(real, padded, seed):
    probabilities, truth = _masks(seed, (real + padded, 4, 4))
    weights = np.r_[np.ones(real), np.zeros(padded)].astype(np.float32)
    labels = np.arange(real + padded) % 4
    for loss in (
        weighted_bce,
        soft_dice_loss,
        mean_squared_error,
        reconstruction_loss,
        lambda p, t, w=None: margin_loss(p[:, 0], labels[: len(p)], w),
        lambda p, t, w=None: segmentation_loss(SegCapsOutput(p, p), p[..., None], t, w),
        lambda p, t, w=None: segmentation_loss(SegCapsOutput(p, p), p[..., None], t, w, dice_over="batch"),
    ):
        found = loss(probabilities, truth, weights)
        np.testing.assert_allclose(found, loss(probabilities[:real], truth[:real]), rtol=1e-5)


def test_a_batch_of_padding_alone_costs_nothing_and_has_no_gradient():
    weights = jnp.zeros(3)
    loss, slope = jax.value_and_grad(lambda values: weighted_mean(values, weights))(jnp.ones(3))
    assert loss == 0
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("length", [0.0, 1.0])
@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_values_and_gradients_are_finite_at_lengths_zero_and_one(length, truth):
    lengths, mask = jnp.full((2, 4, 4), length), jnp.full((2, 4, 4), truth)
    images = jnp.zeros((2, 4, 4, 1))

    def segmentation(lengths):
        return segmentation_loss(SegCapsOutput(lengths, lengths), images, mask)

    def margin(lengths):
        return margin_loss(lengths[:, 0], jnp.zeros(2, jnp.int32))

    for loss in (segmentation, margin):
        value, slope = jax.value_and_grad(loss)(lengths)
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


def test_weights_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"weights \(2,\) do not fit a batch of \(3,\)"):
        weighted_mean(jnp.ones(3), jnp.ones(2))
