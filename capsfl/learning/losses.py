"""Training losses; each is a mean over examples, in which an example of weight zero counts nothing."""

from typing import Literal

import jax.numpy as jnp
import optax
from jax import Array
from jax.nn import one_hot, relu

from capsfl.models.segcaps import SegCapsOutput

# Probabilities closer than this to 0 or 1 are clipped before the logarithm (Keras uses the same value).
_CLIP = 1e-7

# Sabour et al. 2017, section 4.1: the reconstruction must not dominate the margin loss.
RECONSTRUCTION_WEIGHT = 0.0005

# Default of the published SegCaps code, on the mean; the paper's 131.072 is 0.0005 times 512 * 512 pixels.
SEGMENTATION_RECONSTRUCTION_WEIGHT = 0.1


def weighted_mean(values: Array, weights: Array | None = None) -> Array:
    """Return the mean of `(batch,)` values under `(batch,)` weights, zero if all weights are zero.

    A value of weight zero may be anything, even not finite.

    Raises:
        ValueError: if the shapes differ.
    """
    if weights is None:
        return jnp.mean(values)
    if weights.shape != values.shape:
        raise ValueError(f"weights {weights.shape} do not fit a batch of {values.shape}; give one per example")
    weights = weights.astype(values.dtype)
    total = jnp.sum(weights)
    return jnp.sum(jnp.where(weights != 0, values, 0) * weights) / jnp.where(total > 0, total, 1)


def margin_loss(
    lengths: Array,
    labels: Array,
    weights: Array | None = None,
    *,
    positive_margin: float = 0.9,
    negative_margin: float = 0.1,
    absent_weight: float = 0.5,
) -> Array:
    """Return the margin loss of class capsules (Sabour et al. 2017, equation 4).

    `L = sum_k T_k max(0, m+ - |v_k|)^2 + lambda (1 - T_k) max(0, |v_k| - m-)^2`

    Args:
        lengths: `(batch, classes)` lengths of the class capsules.
        labels: `(batch,)` integer classes.
        weights: `(batch,)` weight of each example, or None for equal weights.
        positive_margin: m+, the length above which a present class costs nothing.
        negative_margin: m-, the length below which an absent class costs nothing.
        absent_weight: lambda, the weight of absent classes.

    Returns:
        The mean over examples.
    """
    present = one_hot(labels, lengths.shape[-1], dtype=lengths.dtype)
    missed = present * jnp.square(relu(positive_margin - lengths))
    raised = (1 - present) * jnp.square(relu(lengths - negative_margin))
    return weighted_mean(jnp.sum(missed + absent_weight * raised, axis=-1), weights)


def cross_entropy(logits: Array, labels: Array, weights: Array | None = None) -> Array:
    """Return the softmax cross-entropy of `(batch, classes)` logits and `(batch,)` integer classes.

    Args:
        logits: `(batch, classes)`.
        labels: `(batch,)` integer classes.
        weights: `(batch,)` weight of each example, or None for equal weights.

    Returns:
        The mean over examples.
    """
    return weighted_mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels), weights)


def reconstruction_loss(
    reconstruction: Array,
    images: Array,
    weights: Array | None = None,
    *,
    scale: float = RECONSTRUCTION_WEIGHT,
) -> Array:
    """Return the scaled SUM of squared differences over an image (Sabour et al. 2017, section 4.1).

    Args:
        reconstruction: `(batch, ...)` intensities in [0, 1].
        images: intensities in [0, 1], the same shape; add 0.5 to the windows of equation 1.
        weights: `(batch,)` weight of each example, or None for equal weights.
        scale: factor on the sum.

    Returns:
        The mean over examples.
    """
    return scale * weighted_mean(_over_pixels(jnp.sum, jnp.square(reconstruction - images)), weights)


def mean_squared_error(reconstruction: Array, images: Array, weights: Array | None = None) -> Array:
    """Return the mean over examples of the MEAN squared difference over the pixels of `(batch, ...)`."""
    return weighted_mean(_over_pixels(jnp.mean, jnp.square(reconstruction - images)), weights)


def weighted_bce(
    probabilities: Array, truth: Array, weights: Array | None = None, *, positive_weight: float = 1.0
) -> Array:
    """Return the binary cross-entropy whose foreground counts `positive_weight` times (LaLonde & Bagci 2018).

    `-(w t log p + (1 - t) log(1 - p))`, the mean over pixels; p is clipped, so that 0 and 1 stay finite.

    Args:
        probabilities: `(batch, ...)` in [0, 1].
        truth: 0 or 1, the same shape.
        weights: `(batch,)` weight of each example, or None for equal weights.
        positive_weight: background pixels per foreground pixel in the training set, or 1.

    Returns:
        The mean over examples.
    """
    truth = truth.astype(probabilities.dtype)
    clipped = jnp.clip(probabilities, _CLIP, 1 - _CLIP)
    pixels = -(positive_weight * truth * jnp.log(clipped) + (1 - truth) * jnp.log1p(-clipped))
    return weighted_mean(_over_pixels(jnp.mean, pixels), weights)


def soft_dice_loss(probabilities: Array, truth: Array, weights: Array | None = None, *, smooth: float = 1.0) -> Array:
    """Return one minus the soft Dice coefficient of each example (Milletari et al. 2016, V-Net, equation 1).

    `1 - (2 sum p t + smooth) / (sum p^2 + sum t^2 + smooth)`, which is zero where both are empty.

    Args:
        probabilities: `(batch, ...)` in [0, 1].
        truth: 0 or 1, the same shape.
        weights: `(batch,)` weight of each example, or None for equal weights.
        smooth: pixels added to both sides of the fraction.

    Returns:
        The mean over examples.
    """
    truth = truth.astype(probabilities.dtype)
    overlap = _over_pixels(jnp.sum, probabilities * truth)
    sizes = _over_pixels(jnp.sum, jnp.square(probabilities) + jnp.square(truth))
    return weighted_mean(1 - (2 * overlap + smooth) / (sizes + smooth), weights)


def segmentation_loss(
    output: SegCapsOutput,
    images: Array,
    truth: Array,
    weights: Array | None = None,
    *,
    positive_weight: float = 1.0,
    dice_over: Literal["example", "batch"] = "example",
    reconstruction_weight: float = SEGMENTATION_RECONSTRUCTION_WEIGHT,
) -> Array:
    """Return weighted cross-entropy + Dice + 0.1 times the reconstruction's mean squared error.

    LaLonde & Bagci 2018, section 2.2, with the weights of their code. The reconstruction is compared with the
    foreground of the middle channel only, moved from the window of equation 1 to [0, 1].

    Args:
        output: what the network says about the images.
        images: `(batch, height, width, channels)` windows of equation 1, in [-0.5, 0.5].
        truth: `(batch, height, width)`, 0 or 1.
        weights: `(batch,)` weight of each example, or None for equal weights.
        positive_weight: factor on the foreground in the cross-entropy.
        dice_over: one Dice per example, or one over all pixels of the batch. Per example, an empty patch asks for
            an empty answer at full strength; where half the patches are empty, a network that starts small gives
            up on the others, and squash has no gradient at zero to come back by.
        reconstruction_weight: factor on the mean squared error.

    Returns:
        The mean over examples.
    """
    loss = weighted_bce(output.lengths, truth, weights, positive_weight=positive_weight)
    if dice_over == "batch":
        shown = 1.0 if weights is None else (weights > 0).astype(truth.dtype).reshape(-1, 1, 1)
        loss += soft_dice_loss((output.lengths * shown)[None], (truth * shown)[None])
    else:
        loss += soft_dice_loss(output.lengths, truth, weights)
    if output.reconstruction is not None:
        foreground = truth.astype(images.dtype) * (images[..., images.shape[-1] // 2] + 0.5)
        loss += reconstruction_weight * mean_squared_error(output.reconstruction, foreground, weights)
    return loss


def _over_pixels(reduce, values: Array) -> Array:
    return reduce(values, axis=tuple(range(1, values.ndim)))
