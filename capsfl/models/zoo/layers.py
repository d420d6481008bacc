"""The layers that the networks of the zoo are made of; each knows its name in Keras, by which weights are found.

Convolutions run as shifted slices on CPU (`capsfl.models.convolution`), because hospitals are vmapped; depthwise ones
and overlapping pools do here, for the same reason.
"""

import functools
from math import gcd
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from capsfl.models import layers
from capsfl.models.convolution import convolve
from capsfl.models.zoo.config import NetworkConfig

# Wu & He 2018 (arXiv:1803.08494); fewer where the channels do not divide.
_GROUPS = 32

# Keras's default; ResNet and DenseNet have their own.
KERAS_EPSILON = 1e-3

# Numbers drawn at once: tens of millions in blocks of the size that small layers take would be thousands of calls.
_BLOCK = 1 << 18

Padding = Literal["SAME", "VALID"]
he_normal = functools.partial(layers.he_normal, block=_BLOCK)


class Conv(nnx.Module):
    """A convolution of `(batch, height, width, in_channels)`, he-normal weights, the bias at zero.

    `name` is the Keras layer's; a kernel may be oblong, `(height, width)`.
    """

    def __init__(
        self,
        name: str,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        *,
        strides: int = 1,
        padding: Padding = "SAME",
        bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.name = name
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        self.kernel = nnx.Param(he_normal(rngs.params(), (*size, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels, jnp.float32)) if bias else None
        self.strides = strides
        self.padding = padding

    def __call__(self, images: Array) -> Array:
        """Return `(batch, height', width', out_channels)`."""
        if self.kernel.shape[:2] == (1, 1):
            # A pixel in `strides` each way, and no window to gather.
            images, strides = images[:, :: self.strides, :: self.strides], 1
        else:
            strides = self.strides
        outputs = convolve(images, self.kernel[...], strides=strides, padding=self.padding)
        return outputs if self.bias is None else outputs + self.bias[...].reshape(1, 1, 1, -1)


class DepthwiseConv(nnx.Module):
    """A convolution of every channel with its own 3 x 3 kernel, he-normal weights, no bias."""

    def __init__(
        self, name: str, channels: int, *, strides: int = 1, padding: Padding = "SAME", rngs: nnx.Rngs
    ) -> None:
        self.name = name
        self.kernel = nnx.Param(he_normal(rngs.params(), (3, 3, 1, channels)))
        self.strides = strides
        self.padding: Padding = padding

    def __call__(self, images: Array) -> Array:
        """Return `(batch, height', width', channels)`."""
        return depthwise_convolve(images, self.kernel[...], strides=self.strides, padding=self.padding)


class SeparableConv(nnx.Module):
    """A depthwise convolution and a 1 x 1 convolution over its channels, which Keras counts as one layer."""

    def __init__(self, name: str, in_channels: int, out_channels: int, *, rngs: nnx.Rngs) -> None:
        self.name = name
        self.depthwise = nnx.Param(he_normal(rngs.params(), (3, 3, 1, in_channels)))
        self.pointwise = nnx.Param(he_normal(rngs.params(), (1, 1, in_channels, out_channels)))

    def __call__(self, images: Array) -> Array:
        """Return `(batch, height, width, out_channels)`."""
        return convolve(depthwise_convolve(images, self.depthwise[...]), self.pointwise[...])


class Dense(nnx.Module):
    """`(batch, inputs)` to `(batch, outputs)`, he-normal weights, the bias at zero."""

    def __init__(self, name: str, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        self.name = name
        self.kernel = nnx.Param(he_normal(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32))

    def __call__(self, features: Array) -> Array:
        """Return `(batch, outputs)`."""
        return features @ self.kernel[...] + self.bias[...][None]


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe & Szegedy 2015, arXiv:1502.03167) of the last axis, under a Keras name.

    In training the statistics of the batch, which the running ones follow; after `eval()` the running ones. Not
    Flax's: it stores a statistic by a call that searches all equations traced so far, which makes tracing quadratic
    in the depth: 26 s for the forward pass of DenseNet121.
    """

    def __init__(self, name: str, channels: int, *, momentum: float, epsilon: float, scale: bool = True) -> None:
        self.name = name
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32)) if scale else None
        self.bias = nnx.Param(jnp.zeros(channels, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(channels, jnp.float32))
        self.momentum = momentum
        self.epsilon = epsilon
        self.use_running_average = False

    def __call__(self, features: Array) -> Array:
        """Normalise `(batch, height, width, channels)`."""
        mean, var = self.mean[...], self.var[...]
        if not self.use_running_average:
            batch_mean, batch_var = jnp.mean(features, (0, 1, 2)), jnp.var(features, (0, 1, 2))
            self.mean.set_value(self.momentum * mean + (1 - self.momentum) * lax.stop_gradient(batch_mean))
            self.var.set_value(self.momentum * var + (1 - self.momentum) * lax.stop_gradient(batch_var))
            mean, var = batch_mean, batch_var
        slope = lax.rsqrt(var + self.epsilon)
        slope = slope if self.scale is None else slope * self.scale[...]
        rows = [row.reshape(1, 1, 1, -1) for row in (mean, slope, self.bias[...])]
        return (features - rows[0]) * rows[1] + rows[2]


def make_norm(
    config: NetworkConfig,
    name: str,
    channels: int,
    *,
    epsilon: float = KERAS_EPSILON,
    scale: bool = True,
    rngs: nnx.Rngs,
) -> BatchNorm | nnx.GroupNorm:
    """Build the normalisation that a network is configured with."""
    if config.norm == "batch":
        return BatchNorm(name, channels, momentum=config.batch_momentum, epsilon=epsilon, scale=scale)
    return nnx.GroupNorm(channels, gcd(channels, _GROUPS), epsilon=epsilon, use_scale=scale, rngs=rngs)


def depthwise_convolve(images: Array, kernel: Array, *, strides: int = 1, padding: Padding = "SAME") -> Array:
    """Convolve every channel of `(batch, height, width, channels)` with its own `(k, k, 1, channels)` kernel."""
    if jax.default_backend() != "cpu":
        return lax.conv_general_dilated(
            images,
            kernel,
            (strides, strides),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=images.shape[-1],
        )
    # Grouped convolutions are what XLA:CPU runs slowest, and under vmap they would be groups of groups.
    size = kernel.shape[0]
    if padding == "SAME":
        pads = lax.padtype_to_pads(images.shape[1:3], (size, size), (strides, strides), "SAME")
        images = jnp.pad(images, ((0, 0), *pads, (0, 0)))
    total: Array | None = None
    for y in range(size):
        rows = _every(images, y, size, strides, axis=1)
        for x in range(size):
            tap = _every(rows, x, size, strides, axis=2) * kernel[y, x].reshape(1, 1, 1, -1)
            total = tap if total is None else total + tap
    assert total is not None
    return total


def pad_zeros(images: Array, before: int, after: int) -> Array:
    """Add rows and columns of zeros to `(batch, height, width, channels)` on all four sides."""
    return jnp.pad(images, ((0, 0), (before, after), (before, after), (0, 0)))


def max_pool_3x3(images: Array, *, padding: Padding = "VALID") -> Array:
    """Keep the largest of 3 x 3 pixels at every second one; `SAME` rims never win.

    As shifted slices: the gradient of `lax.reduce_window` scatters one number after the other on CPU. Equal pixels
    share the gradient.
    """
    if padding == "SAME":
        pads = lax.padtype_to_pads(images.shape[1:3], (3, 3), (2, 2), "SAME")
        images = jnp.pad(images, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        images = functools.reduce(jnp.maximum, [_every(images, shift, 3, 2, axis=axis) for shift in range(3)])
    return images


def mean_pool_2x2(images: Array) -> Array:
    """Average every 2 x 2 pixels; a last odd row or column is left out."""
    batch, height, width, channels = images.shape
    whole = images[:, : height // 2 * 2, : width // 2 * 2]
    return whole.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def mean_pool_3x3(images: Array) -> Array:
    """Average the 3 x 3 pixels around every pixel, those of them that lie in the image."""
    height, width = images.shape[1:3]
    total = pad_zeros(images, 1, 1)
    for axis in (1, 2):
        total = functools.reduce(jnp.add, [_every(total, shift, 3, 1, axis=axis) for shift in range(3)])
    places = [np.arange(length) for length in (height, width)]
    inside = [3 - (place == 0) - (place == length - 1) for place, length in zip(places, (height, width), strict=True)]
    return total / np.outer(*inside).astype(np.float32).reshape(1, height, width, 1)


def _every(images: Array, start: int, size: int, strides: int, *, axis: int) -> Array:
    """What a window's tap sees along one axis: every `strides`-th row from `start`, as many as there are windows."""
    count = (images.shape[axis] - size) // strides + 1
    return lax.slice_in_dim(images, start, start + strides * (count - 1) + 1, strides, axis=axis)
