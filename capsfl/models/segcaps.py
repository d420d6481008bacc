"""SegCaps: a U-shaped capsule network that segments one image (LaLonde & Bagci 2018, arXiv:1804.04241)."""

from functools import partial
from math import gcd
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from pydantic import Field, model_validator

from capsfl.models.layers import Conv, ConvCapsules, capsule_lengths
from capsfl.settings import Settings

# Rows of the image that the reconstruction head handles at once.
_RECONSTRUCTED_ROWS = 8

# Added to mean square lengths, so that an image of zeros divides nothing by zero.
_LENGTH_FLOOR = 1e-6

# Length, before its squash, at which the last capsule of a network with `norm` starts: a foreground of a tenth.
_FIRST_LENGTH = 1 / 3


class SegCapsConfig(Settings):
    """Size and routing of a SegCaps network; the defaults are the published R3."""

    name: Literal["segcaps"] = "segcaps"
    """The network."""

    width: Annotated[float, Field(gt=0)] = 1.0
    """Factor on every capsule dimension and on the channels of the first and the reconstruction layers."""

    num_iters: Literal[1, 3] = 3
    """Routing iterations of the routed layers; 1 weighs all votes equally, which needs no votes at all."""

    routed: Literal["every", "resolution"] = "every"
    """Layers that route `num_iters` times: every one (R3), or those that change the resolution (R1)."""

    in_channels: Annotated[int, Field(gt=0)] = 1
    """Channels of the image: 1, or 5 neighbouring slices with the one to segment in the middle."""

    reconstruction: bool = True
    """Whether the network also reconstructs the segmented part of the image, as a regulariser."""

    norm: Literal["none", "length"] = "none"
    """What becomes of capsules before they vote: nothing, as published, or `length`, division by the root mean square
    length of the layer in the same example. A squash makes short vectors shorter still, so that an image moves the
    middle layers of the published network a tenth as far as the first one at the start, and their biases hide it.
    Kernels then start at votes whose sum has unit length, and the last capsule at a third; no parameter is added."""

    weights: str = ""
    """File of weights that the authors' code has saved (`.hdf5`), to start from; empty to start from random ones. They
    have seen other intensities than the window's, so they are a beginning and no result."""

    @model_validator(mode="after")
    def _published(self) -> "SegCapsConfig":
        if self.weights and self.norm != "none":
            raise ValueError(
                f'weights = {self.weights!r}: belong to the published network; leave norm = "{self.norm}" out'
            )
        return self

    @classmethod
    def r3(cls) -> "SegCapsConfig":
        """Return the published R3: three iterations in every layer after the first two."""
        return cls()

    @classmethod
    def r1(cls) -> "SegCapsConfig":
        """Return the published R1: three iterations only where the resolution changes, one elsewhere."""
        return cls(routed="resolution")


class SegCapsOutput(NamedTuple):
    """What SegCaps says about a batch of images."""

    lengths: Array
    """Probability of the foreground, `(batch, height, width)`, the length of the last capsule, in [0, 1)."""

    reconstruction: Array | None
    """Intensity of the foreground in [0, 1], `(batch, height, width)`, or None without that head."""


class SegCaps(nnx.Module):
    """The thirteen-layer SegCaps; 1,425,649 parameters at width 1.

    Layers carry the names of the published code. Capsules are laid out
    `(batch, capsules, height, width, dim)`, so the types of a skip follow on axis 1; they are read in
    place, never concatenated.
    `implementation` is that of `capsfl_kernels.conv_capsules`, None the fastest.
    """

    def __init__(self, config: SegCapsConfig, *, implementation: str | None = None, rngs: nnx.Rngs) -> None:
        def scale(size: int) -> int:
            return max(2, round(config.width * size))

        small, medium, large = scale(16), scale(32), scale(64)
        resizing = config.num_iters
        keeping = config.num_iters if config.routed == "every" else 1

        capsules = partial(ConvCapsules, implementation=implementation, rngs=rngs)
        same = partial(capsules, num_iters=keeping)
        down = partial(capsules, strides=2, num_iters=resizing)
        up = partial(down, transpose=True)

        self.conv1 = Conv(config.in_channels, small, 5, rngs=rngs)
        # The published networks never route the first two layers.
        self.primarycaps = capsules(small, 2, small, 5, strides=2, num_iters=1)
        self.conv_cap_2_1 = capsules(small, 4, small, 5, num_iters=1)
        self.conv_cap_2_2 = down(small, 4, medium, 5)
        self.conv_cap_3_1 = same(medium, 8, medium, 5)
        self.conv_cap_3_2 = down(medium, 8, large, 5)
        self.conv_cap_4_1 = same(large, 8, medium, 5)
        self.deconv_cap_1_1 = up(medium, 8, medium, 4)
        self.deconv_cap_1_2 = same(medium, 4, medium, 5)
        self.deconv_cap_2_1 = up(medium, 4, small, 4)
        self.deconv_cap_2_2 = same(small, 4, small, 5)
        self.deconv_cap_3_1 = up(small, 2, small, 4)
        self.seg_caps = same(small, 1, small, 1)
        self.recon = ReconstructionHead(small, scale(64), scale(128), rngs=rngs) if config.reconstruction else None
        self.norm = config.norm
        if config.norm == "length":
            self._start_at_unit_length()

    def _start_at_unit_length(self) -> None:
        """Scale the kernels so that equally weighted votes, of inputs of unit length, sum to unit length."""
        for layer, children in (
            (self.primarycaps, 1),
            (self.conv_cap_2_1, self.primarycaps.capsules),
            (self.conv_cap_2_2, self.conv_cap_2_1.capsules),
            (self.conv_cap_3_1, self.conv_cap_2_2.capsules),
            (self.conv_cap_3_2, self.conv_cap_3_1.capsules),
            (self.conv_cap_4_1, self.conv_cap_3_2.capsules),
            (self.deconv_cap_1_1, self.conv_cap_4_1.capsules),
            (self.deconv_cap_1_2, self.deconv_cap_1_1.capsules + self.conv_cap_3_1.capsules),
            (self.deconv_cap_2_1, self.deconv_cap_1_2.capsules),
            (self.deconv_cap_2_2, self.deconv_cap_2_1.capsules + self.conv_cap_2_1.capsules),
            (self.deconv_cap_3_1, self.deconv_cap_2_2.capsules),
            (self.seg_caps, self.deconv_cap_3_1.capsules + 1),
        ):
            length = _FIRST_LENGTH if layer is self.seg_caps else 1.0
            layer.kernel[...] = layer.kernel[...] * (length / layer.first_length(children))

    def __call__(self, images: Array, truth: Array | None = None) -> SegCapsOutput:
        """Segment images.

        Args:
            images: `(batch, height, width, in_channels)`, window intensities of equation 1, in [-0.5, 0.5].
            truth: `(batch, height, width)`, the foreground in training: the capsules outside it are set to
                zero before reconstruction. None (inference) reconstructs from all of them.

        Returns:
            The lengths and the reconstruction.

        Raises:
            ValueError: if height or width is not divisible by 8, or the shapes do not fit.
        """
        channels = self.conv1.kernel.shape[2]
        if images.ndim != 4 or images.shape[-1] != channels:
            raise ValueError(f"images {images.shape}: expected (batch, height, width, {channels})")
        if images.shape[1] % 8 or images.shape[2] % 8:
            raise ValueError(f"images {images.shape}: height and width must be divisible by 8; pad or crop them")
        if truth is not None and truth.shape != images.shape[:3]:
            raise ValueError(f"truth {truth.shape} does not fit images {images.shape}; expected {images.shape[:3]}")

        scaled = divide_by_length if self.norm == "length" else _as_they_are
        full = scaled(jax.nn.relu(self.conv1(images))[:, None])
        half = scaled(self.conv_cap_2_1(scaled(self.primarycaps(full))))
        quarter = scaled(self.conv_cap_3_1(scaled(self.conv_cap_2_2(half))))
        capsules = scaled(self.conv_cap_4_1(scaled(self.conv_cap_3_2(quarter))))

        capsules = scaled(self.deconv_cap_1_2((scaled(self.deconv_cap_1_1(capsules)), quarter)))
        capsules = scaled(self.deconv_cap_2_2((scaled(self.deconv_cap_2_1(capsules)), half)))
        capsules = self.seg_caps((scaled(self.deconv_cap_3_1(capsules)), full))[:, 0]

        reconstruction = None
        if self.recon is not None:
            visible = capsules if truth is None else capsules * truth[..., None].astype(capsules.dtype)
            reconstruction = self.recon(visible)
        return SegCapsOutput(capsule_lengths(capsules), reconstruction)


def divide_by_length(capsules: Array) -> Array:
    """Divide capsules `(batch, capsules, height, width, dim)` by their root mean square length in each example.

    The root mean square normalisation of Zhang & Sennrich 2019 (arXiv:1910.07467), over types and positions: directions
    and proportions of lengths stay, and examples are kept apart.
    """
    squares = jnp.sum(jnp.square(capsules), axis=-1, keepdims=True)
    return capsules * jax.lax.rsqrt(jnp.mean(squares, axis=(1, 2, 3), keepdims=True) + _LENGTH_FLOOR)


def _as_they_are(capsules: Array) -> Array:
    return capsules


class ReconstructionHead(nnx.Module):
    """Three 1x1 convolutions from the foreground capsule to the intensity it stands for."""

    def __init__(self, in_channels: int, first: int, second: int, *, rngs: nnx.Rngs) -> None:
        self.recon_1 = Conv(in_channels, first, 1, rngs=rngs)
        self.recon_2 = Conv(first, second, 1, rngs=rngs)
        self.out_recon = Conv(second, 1, 1, rngs=rngs)

    def __call__(self, capsules: Array) -> Array:
        """Map `(batch, height, width, dim)` to intensities `(batch, height, width)` in [0, 1]."""
        batch, height, width, dim = capsules.shape
        kernels = [(layer.kernel[...], layer.bias[...]) for layer in (self.recon_1, self.recon_2, self.out_recon)]

        @jax.checkpoint
        def reconstruct(pixels: Array) -> Array:
            """Map pixels `(pixels, dim)` to intensities `(pixels,)`."""
            for kernel, bias in kernels[:-1]:
                pixels = jax.nn.relu(pixels @ kernel[0, 0] + bias[None])
            kernel, bias = kernels[-1]
            return jax.nn.sigmoid(pixels @ kernel[0, 0] + bias[None])[:, 0]

        # At 512 x 512 the hidden layers would hold 192 MiB per image for the backward pass; a few rows at a time
        # hold 3 MiB, and computing them again costs little beside the capsules.
        rows = gcd(height, _RECONSTRUCTED_ROWS)
        return jax.lax.map(reconstruct, capsules.reshape(-1, rows * width, dim)).reshape(batch, height, width)
