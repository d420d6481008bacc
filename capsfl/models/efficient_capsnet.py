"""Efficient-CapsNet: few capsules, routed once by self-attention (Mazzia, Salvetti & Chiaberge 2021).

arXiv:2101.12491; the order of its layers and their first weights follow the authors' code.
"""

from functools import partial
from math import gcd, prod
from typing import Annotated, Literal

import jax
from capsfl_kernels import squash
from flax import nnx
from jax import Array
from jax import numpy as jnp
from pydantic import Field, model_validator

from capsfl.models.capsnet import CapsNetOutput, Decoder
from capsfl.models.convolution import smallest_side
from capsfl.models.layers import Conv, SelfAttentionCapsules, capsule_lengths
from capsfl.settings import Settings

Size = Annotated[int, Field(gt=0)]

# Keras's default, which the authors' batch normalisation keeps.
_NORM_EPSILON = 1e-3

# Groups that group normalisation aims at; fewer where the channels do not divide.
_NORM_GROUPS = 8


class EfficientCapsNetConfig(Settings):
    """Sizes of an Efficient-CapsNet; `mnist()` is the published network, `ct()` a small one for slices."""

    name: Literal["efficient_capsnet"] = "efficient_capsnet"
    """Tells the network from others in a configuration."""

    image_size: Size
    """Height and width of the image in pixels."""

    in_channels: Size = 1
    """Channels of the image."""

    input_mean: float = 0.0
    """Intensity that the first convolution sees as 0. Published is 0, for digits on black; for CT in [0, 1] take the
    middle, 0.5: a filter whose weights do not add up to 0 answers to the brightness alone, either everywhere, so that
    it does not tell tissues apart, or nowhere."""

    input_deviation: Annotated[float, Field(gt=0)] = 1.0
    """How far from `input_mean` the first convolution sees 1: about the standard deviation of the images."""

    classes: Annotated[int, Field(ge=2)] = 2
    """Number of classes, one capsule each."""

    conv_channels: tuple[Size, Size, Size, Size] = (32, 64, 64, 128)
    """Channels of the four convolutions; those of the last become the primary capsules."""

    conv_kernels: tuple[Size, Size, Size, Size] = (5, 3, 3, 3)
    """Their kernel sizes in pixels."""

    conv_strides: tuple[Size, Size, Size, Size] = (1, 1, 1, 2)
    """Their strides in pixels."""

    norm: Literal["batch", "group"] = "batch"
    """What follows each convolution. Batch normalisation is published; its statistics tie the examples of a
    batch to each other, which clipping by example or by patient does not allow."""

    batch_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Share of batch normalisation's running statistics that a step keeps. The default, that of the authors' code,
    needs hundreds of steps to forget where it began; federated rounds of a few steps want 0.9."""

    primary_dim: Size = 8
    """Dimension of a primary capsule; it divides the channels of the last convolution."""

    digit_dim: Size = 16
    """Dimension of a class capsule."""

    reconstruction: bool = True
    """Whether a decoder reconstructs the image from the capsule of its class, as a regulariser."""

    decoder: tuple[Size, ...] = (512, 1024)
    """Hidden units of the decoder."""

    @classmethod
    def mnist(cls) -> "EfficientCapsNetConfig":
        """Return the network of the paper: 161,824 parameters outside the decoder, its "161k"."""
        return cls(image_size=28, classes=10)

    @classmethod
    def ct(
        cls, image_size: int = 64, *, in_channels: int = 1, reconstruction: bool = False
    ) -> "EfficientCapsNetConfig":
        """Return a small two-class network for CT slices, fit for federated rounds; 37,520 parameters at 64 pixels."""
        return cls(
            image_size=image_size,
            in_channels=in_channels,
            classes=2,
            conv_channels=(16, 32, 32, 64),
            conv_strides=(2, 1, 2, 2),
            norm="group",
            reconstruction=reconstruction,
            decoder=(64,),
        )

    def primary_size(self) -> int:
        """Return height and width of the last convolution's output, in positions; less than 1 does not fit."""
        size = self.image_size
        for kernel, stride in zip(self.conv_kernels, self.conv_strides, strict=True):
            size = (size - kernel) // stride + 1
            if size < 1:
                return 0
        return size

    @model_validator(mode="after")
    def _sizes_fit(self) -> "EfficientCapsNetConfig":
        if self.primary_size() < 1:
            smallest = smallest_side(list(zip(self.conv_kernels, self.conv_strides, strict=True)))
            raise ValueError(f"image_size {self.image_size}: {self.name} needs at least {smallest} pixels a side")
        if self.conv_channels[-1] % self.primary_dim:
            raise ValueError(f"primary_dim {self.primary_dim} does not divide conv_channels {self.conv_channels[-1]}")
        return self


class EfficientCapsNet(nnx.Module):
    """Four convolutions, a depthwise one over all positions, one routed capsule per class, and a decoder."""

    def __init__(self, config: EfficientCapsNetConfig, *, rngs: nnx.Rngs) -> None:
        self.image_shape = (config.image_size, config.image_size, config.in_channels)
        self.input_mean, self.input_deviation = config.input_mean, config.input_deviation
        before = (config.in_channels, *config.conv_channels[:-1])
        stages = zip(before, config.conv_channels, config.conv_kernels, config.conv_strides, strict=True)
        conv = partial(Conv, padding="VALID", rngs=rngs)
        self.convs = nnx.List([conv(into, out, size, strides=stride) for into, out, size, stride in stages])
        self.norms = nnx.List([_norm(config, channels, rngs) for channels in config.conv_channels])
        channels = config.conv_channels[-1]
        self.primary = DepthwiseCapsules(config.primary_size(), channels, config.primary_dim, rngs=rngs)
        self.digit = SelfAttentionCapsules(
            channels // config.primary_dim, config.primary_dim, config.classes, config.digit_dim, rngs=rngs
        )
        self.decoder = (
            Decoder(config.classes * config.digit_dim, config.decoder, prod(self.image_shape), rngs=rngs)
            if config.reconstruction
            else None
        )

    def __call__(
        self, images: Array, labels: Array | None = None, *, use_running_average: bool | None = None
    ) -> CapsNetOutput:
        """Classify images.

        Args:
            images: `(batch, height, width, in_channels)`.
            labels: `(batch,)` integers in training: the decoder sees the capsule of the true class only. None
                (inference) shows it the longest capsule.
            use_running_average: Whether batch normalisation takes the statistics it has gathered (True, for
                inference) or those of the batch, which it then gathers (False, for training). None leaves it
                to `nnx.Module.eval` and `train`; the network starts out in training.

        Returns:
            Capsules, lengths and the reconstruction.

        Raises:
            ValueError: if the shapes do not fit the configuration.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images {images.shape}: expected {('batch', *self.image_shape)}")
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(f"labels {labels.shape} do not fit images {images.shape}; expected {images.shape[:1]}")
        features = (images - self.input_mean) / self.input_deviation
        for conv, norm in zip(self.convs, self.norms, strict=True):
            features = jax.nn.relu(conv(features))
            if isinstance(norm, nnx.BatchNorm):
                features = norm(features, use_running_average=use_running_average)
            else:
                features = norm(features)
        capsules = self.digit(self.primary(features))
        lengths = capsule_lengths(capsules)
        reconstruction = None
        if self.decoder is not None:
            chosen = jnp.argmax(lengths, axis=-1) if labels is None else labels
            mask = jax.nn.one_hot(chosen, capsules.shape[1], dtype=capsules.dtype)
            pixels = self.decoder((capsules * mask[..., None]).reshape(capsules.shape[0], -1))
            reconstruction = pixels.reshape(images.shape)
        return CapsNetOutput(capsules, lengths, reconstruction)


class DepthwiseCapsules(nnx.Module):
    """A depthwise convolution over all positions, whose channels are read as capsules (Mazzia et al. 2021).

    Its kernel is as large as the image, so it is one weighted sum per channel. Glorot-uniform weights, as
    Keras draws them for the authors' code.
    """

    def __init__(self, image_size: int, channels: int, out_dim: int, *, rngs: nnx.Rngs) -> None:
        drawn = jax.nn.initializers.glorot_uniform()(rngs.params(), (image_size, image_size, 1, channels), jnp.float32)
        self.kernel = nnx.Param(drawn[:, :, 0])
        self.bias = nnx.Param(jnp.zeros(channels))
        self.out_dim = out_dim

    def __call__(self, images: Array) -> Array:
        """Map `(batch, image_size, image_size, channels)` to `(batch, channels / out_dim, out_dim)`."""
        outputs = jnp.einsum("bhwc,hwc->bc", images, self.kernel[...]) + self.bias[...][None]
        return squash(outputs.reshape(outputs.shape[0], -1, self.out_dim), kind="exponential")


def _norm(config: EfficientCapsNetConfig, channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm | nnx.GroupNorm:
    if config.norm == "batch":
        return nnx.BatchNorm(channels, momentum=config.batch_momentum, epsilon=_NORM_EPSILON, rngs=rngs)
    return nnx.GroupNorm(channels, gcd(channels, _NORM_GROUPS), epsilon=_NORM_EPSILON, rngs=rngs)
