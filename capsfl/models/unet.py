"""U-Net (Ronneberger et al. 2015, arXiv:1505.04597) and U-Net++ (Zhou et al. 2018, arXiv:1807.10165).

The baselines that SegCaps is measured against: they are called as it is and answer as it does. Convolutions keep the
size of the image, as nearly every later U-Net has them, where the first one lost a rim. Neither has dropout, so that
a training step is a function of its batch alone.
"""

from itertools import pairwise
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from pydantic import Field

from capsfl.models.convolution import max_pool
from capsfl.models.layers import Conv, he_normal
from capsfl.models.segcaps import SegCapsOutput
from capsfl.settings import Settings

# Wu & He 2018 (arXiv:1803.08494).
_GROUPS = 32
# With one channel in a group nothing but the instance norm would be left, which takes from every channel its mean over
# the image: how much of it is lung, say.
_LEAST_CHANNELS = 2


class _Config(Settings):
    """What both networks have in common."""

    width: Annotated[int, Field(gt=0)]
    """Channels at full resolution; they double with every level."""

    depth: Annotated[int, Field(ge=1, le=6)] = 4
    """How many times the resolution is halved."""

    norm: Literal["group", "none"] = "group"
    """What follows a convolution: group normalisation, which keeps examples apart and so allows clipping by patient,
    in 32 groups or in fewer, of two channels at least; or nothing, as published."""

    in_channels: Annotated[int, Field(gt=0)] = 1
    """Channels of the image: 1, or 5 neighbouring slices with the one to segment in the middle."""

    def channels(self) -> tuple[int, ...]:
        """Return the channels of every level, from full resolution down."""
        return tuple(self.width << level for level in range(self.depth + 1))


class UNetConfig(_Config):
    """Size of a U-Net; the defaults are the published 31.0 million parameters."""

    name: Literal["unet"] = "unet"
    """The network."""

    width: Annotated[int, Field(gt=0)] = 64
    """Channels at full resolution; they double with every level."""


class UNetPlusPlusConfig(_Config):
    """Size of a U-Net++; the defaults are the published 9.04 million parameters."""

    name: Literal["unet++"] = "unet++"
    """The network."""

    width: Annotated[int, Field(gt=0)] = 32
    """Channels at full resolution; they double with every level."""

    deep_supervision: bool = False
    """Whether every decoder at full resolution has a head of its own, whose probabilities are averaged (the paper's
    accurate mode), so that the loss reaches all of them at once."""


class UNet(nnx.Module):
    """An encoder, a decoder, and the encoder's features handed across at every resolution."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs) -> None:
        channels = config.channels()
        inputs = (config.in_channels, *channels[:-1])
        self.in_channels = config.in_channels
        self.down = nnx.List([_Block(i, c, config.norm, rngs=rngs) for i, c in zip(inputs, channels, strict=True)])
        upwards = list(pairwise(reversed(channels)))
        self.rise = nnx.List([_Rise(deep, c, rngs=rngs) for deep, c in upwards])
        self.up = nnx.List([_Block(2 * c, c, config.norm, rngs=rngs) for _, c in upwards])
        self.head = Conv(channels[0], 1, 1, rngs=rngs)

    def __call__(self, images: Array, truth: Array | None = None) -> SegCapsOutput:
        """Segment images.

        Args:
            images: `(batch, height, width, in_channels)`, window intensities of equation 1, in [-0.5, 0.5].
            truth: `(batch, height, width)` or None; not looked at, for the network reconstructs nothing.

        Returns:
            The probability of the foreground `(batch, height, width)` as `lengths`, and no reconstruction.

        Raises:
            ValueError: if height or width is not divisible by 8, or the shapes do not fit.
        """
        _check(images, truth, self.in_channels)
        features, skips = _pad(images, len(self.down) - 1), []
        for level, block in enumerate(self.down):
            features = block(max_pool(features) if level else features)
            skips.append(features)
        for rise, block, skip in zip(self.rise, self.up, reversed(skips[:-1]), strict=True):
            features = block(jnp.concatenate([skip, rise(features)], axis=-1))
        return SegCapsOutput(_probability(self.head, features, images), None)


class UNetPlusPlus(nnx.Module):
    """A U-Net whose skips are decoders themselves: node (i, j) sees all nodes (i, <j) and, from below, (i+1, j-1)."""

    def __init__(self, config: UNetPlusPlusConfig, *, rngs: nnx.Rngs) -> None:
        channels = config.channels()
        inputs = (config.in_channels, *channels[:-1])
        self.in_channels = config.in_channels
        self.down = nnx.List([_Block(i, c, config.norm, rngs=rngs) for i, c in zip(inputs, channels, strict=True)])
        self.rise, self.nodes = nnx.List([]), nnx.List([])
        for step in range(1, len(channels)):
            levels = list(pairwise(channels[: len(channels) - step + 1]))
            self.rise.append(nnx.List([_Rise(deep, c, rngs=rngs) for c, deep in levels]))
            self.nodes.append(nnx.List([_Block((step + 1) * c, c, config.norm, rngs=rngs) for c, _ in levels]))
        heads = config.depth if config.deep_supervision else 1
        self.heads = nnx.List([Conv(channels[0], 1, 1, rngs=rngs) for _ in range(heads)])

    def __call__(self, images: Array, truth: Array | None = None) -> SegCapsOutput:
        """Segment images, as `UNet` does."""
        _check(images, truth, self.in_channels)
        features = _pad(images, len(self.down) - 1)
        rows: list[list[Array]] = []
        for level, block in enumerate(self.down):
            features = block(max_pool(features) if level else features)
            rows.append([features])
        for rise, nodes in zip(self.rise, self.nodes, strict=True):
            # Row i + 1 is read before it grows in this step.
            raised = [up(rows[level + 1][-1]) for level, up in enumerate(rise)]
            for row, below, node in zip(rows, raised, nodes, strict=False):
                row.append(node(jnp.concatenate([*row, below], axis=-1)))
        decoders = rows[0][-len(self.heads) :]
        found = [_probability(head, one, images) for head, one in zip(self.heads, decoders, strict=True)]
        return SegCapsOutput(sum(found[1:], found[0]) / len(found), None)


class _Block(nnx.Module):
    """Two 3 x 3 convolutions, each followed by the normalisation, if any, and a ReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, *, rngs: nnx.Rngs) -> None:
        inputs = (in_channels, out_channels)
        self.convs = nnx.List([Conv(channels, out_channels, 3, rngs=rngs) for channels in inputs])
        groups = _groups(out_channels)
        kept = inputs if norm == "group" else ()
        self.norms = nnx.List([nnx.GroupNorm(out_channels, groups, rngs=rngs) for _ in kept])

    def __call__(self, features: Array) -> Array:
        for index, conv in enumerate(self.convs):
            features = conv(features)
            if self.norms:
                features = self.norms[index](features)
            features = jax.nn.relu(features)
        return features


def _groups(channels: int) -> int:
    """The most groups of equal size, up to 32, that hold two channels or more; one where there are no two."""
    most = max(1, min(_GROUPS, channels // _LEAST_CHANNELS))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


class _Rise(nnx.Module):
    """A 2 x 2 transposed convolution of stride 2: every pixel becomes four, one matrix product."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(he_normal(rngs.params(), (2, 2, in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels))

    def __call__(self, features: Array) -> Array:
        batch, height, width, channels = features.shape
        kernel = self.kernel[...].transpose(2, 0, 1, 3)
        pixels = (features @ kernel.reshape(channels, -1)).reshape(batch, height, width, *kernel.shape[1:])
        raised = pixels.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, -1)
        return raised + self.bias[...].reshape(1, 1, 1, -1)


def _check(images: Array, truth: Array | None, channels: int) -> None:
    if images.ndim != 4 or images.shape[-1] != channels:
        raise ValueError(f"images {images.shape}: expected (batch, height, width, {channels})")
    if images.shape[1] % 8 or images.shape[2] % 8:
        raise ValueError(f"images {images.shape}: height and width must be divisible by 8; pad or crop them")
    if truth is not None and truth.shape != images.shape[:3]:
        raise ValueError(f"truth {truth.shape} does not fit images {images.shape}; expected {images.shape[:3]}")


def _pad(images: Array, depth: int) -> Array:
    """Repeat the last row and column until every level halves exactly; the answer is cut back."""
    rest = [-size % (1 << depth) for size in images.shape[1:3]]
    return jnp.pad(images, ((0, 0), (0, rest[0]), (0, rest[1]), (0, 0)), mode="edge") if any(rest) else images


def _probability(head: Conv, features: Array, images: Array) -> Array:
    """The foreground's probability at the pixels of the images, `(batch, height, width)`."""
    height, width = images.shape[1:3]
    return jax.nn.sigmoid(head(features)[:, :height, :width, 0])
