"""A convolutional network with as many weights as a capsule network, to hold beside it."""

from typing import Any

import jax
from flax import nnx
from jax import Array
from jax import numpy as jnp

from capsfl.models.layers import Conv

CHANNELS = (32, 64, 64, 128)
KERNELS = (5, 3, 3, 3)
STRIDES = (1, 1, 1, 2)


class PlainDigits(nnx.Module):
    """The four convolutions of Efficient-CapsNet, then mean over positions, a hidden layer, dropout-free, and logits.

    Args:
        hidden: units of the hidden layer.
        width: factor on the convolutions' channels.
        rngs: of the weights.
    """

    def __init__(self, hidden: int, *, width: int = 1, rngs: nnx.Rngs) -> None:
        self.image_shape = (None, None, 1)
        widths = [width * channels for channels in CHANNELS]
        stages = list(zip((1, *widths[:-1]), widths, KERNELS, STRIDES, strict=True))
        self.convs = nnx.List([Conv(a, b, k, strides=s, padding="VALID", rngs=rngs) for a, b, k, s in stages])
        self.norms = nnx.List([nnx.BatchNorm(channels, epsilon=1e-3, rngs=rngs) for channels in widths])
        self.hidden = nnx.Linear(widths[-1], hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Maps `(batch, side, side, 1)` to logits `(batch, 10)`."""
        features = images
        for conv, norm in zip(self.convs, self.norms, strict=True):
            features = jax.nn.relu(norm(conv(features)))
        return self.out(jax.nn.relu(self.hidden(jnp.mean(features, axis=(1, 2)))))


def count_weights(network: Any) -> int:
    """Returns the number of trained values outside a decoder, which only training sees."""
    state = nnx.state(network, nnx.Param)
    if "decoder" in state:
        del state["decoder"]
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def plain_of_size(weights: int, *, rngs: nnx.Rngs) -> PlainDigits:
    """Builds the plain network whose number of weights is nearest to another's.

    Its convolutions are as wide as fits, and the hidden layer takes what is left: a hidden layer alone would grow to
    tens of thousands of units on a hundred features, and such a network would be an easy rival.
    """

    def count(hidden: int, width: int) -> int:
        return count_weights(nnx.eval_shape(lambda: PlainDigits(hidden, width=width, rngs=nnx.Rngs(0))))

    width = 1
    while count(1, width + 1) <= weights:
        width += 1
    bare = count(1, width)
    return PlainDigits(max(1, 1 + round((weights - bare) / (count(2, width) - bare))), width=width, rngs=rngs)
