"""CapsNet: classification by routing between capsules (Sabour, Frosst & Hinton 2017, arXiv:1710.09829)."""

from functools import partial
from itertools import pairwise
from math import prod
from typing import Annotated, Literal, NamedTuple

import jax
from flax import nnx
from jax import Array
from jax import numpy as jnp
from pydantic import Field, model_validator

from capsfl.models.convolution import smallest_side
from capsfl.models.layers import Conv, DenseCapsules, PrimaryCapsules, capsule_lengths
from capsfl.settings import Settings

Size = Annotated[int, Field(gt=0)]


class CapsNetConfig(Settings):
    """Sizes of a CapsNet; `mnist()` is the published network, `ct()` a small one for slices."""

    name: Literal["capsnet"] = "capsnet"
    """Tells the network from others in a configuration."""

    image_size: Size
    """Height and width of the image in pixels."""

    in_channels: Size = 1
    """Channels of the image."""

    classes: Annotated[int, Field(ge=2)] = 2
    """Number of classes, one capsule each."""

    conv_channels: Size = 256
    """Channels of the first convolution."""

    conv_kernel: Size = 9
    """Kernel size of the first convolution in pixels."""

    conv_stride: Size = 1
    """Stride of the first convolution in pixels."""

    hidden: tuple[Size, Size, Size] | None = None
    """Channels, kernel size and stride of a second convolution, or None."""

    primary_capsules: Size = 32
    """Capsule types of the primary layer."""

    primary_dim: Size = 8
    """Dimension of a primary capsule."""

    primary_kernel: Size = 9
    """Kernel size of the primary layer."""

    primary_stride: Size = 2
    """Stride of the primary layer."""

    digit_dim: Size = 16
    """Dimension of a class capsule."""

    num_iters: Annotated[int, Field(ge=1)] = 3
    """Routing iterations."""

    reconstruction: bool = True
    """Whether a decoder reconstructs the image from the capsule of its class, as a regulariser."""

    decoder: tuple[Size, ...] = (512, 1024)
    """Hidden units of the decoder."""

    weights: str = ""
    """File of weights that CapsNet-Keras has saved (`.h5`), to start from; empty to start from random ones."""

    @classmethod
    def mnist(cls) -> "CapsNetConfig":
        """Return the network of the paper: 8,215,568 parameters, 6,804,224 of them outside the decoder."""
        return cls(image_size=28, classes=10)

    @classmethod
    def ct(cls, image_size: int = 64, *, in_channels: int = 1, reconstruction: bool = False) -> "CapsNetConfig":
        """Return a small two-class network for CT slices, 115,712 parameters at 64 pixels."""
        return cls(
            image_size=image_size,
            in_channels=in_channels,
            classes=2,
            conv_channels=16,
            conv_kernel=5,
            conv_stride=2,
            hidden=(32, 5, 2),
            primary_capsules=8,
            primary_dim=8,
            primary_kernel=5,
            primary_stride=2,
            reconstruction=reconstruction,
            decoder=(64,),
        )

    def primary_size(self) -> int:
        """Return height and width of the primary layer's output, in positions; less than 1 does not fit."""
        size = self.image_size
        for kernel, stride in self._stages():
            size = (size - kernel) // stride + 1
            if size < 1:
                return 0
        return size

    def _stages(self) -> list[tuple[int, int]]:
        """Kernel and stride of every convolution, primary capsules included."""
        hidden = [] if self.hidden is None else [self.hidden[1:]]
        return [(self.conv_kernel, self.conv_stride), *hidden, (self.primary_kernel, self.primary_stride)]

    @model_validator(mode="after")
    def _image_fits(self) -> "CapsNetConfig":
        if self.primary_size() < 1:
            smallest = smallest_side(self._stages())
            raise ValueError(f"image_size {self.image_size}: {self.name} needs at least {smallest} pixels a side")
        return self


class CapsNetOutput(NamedTuple):
    """What CapsNet says about a batch of images."""

    capsules: Array
    """Class capsules, `(batch, classes, dim)`."""

    lengths: Array
    """Their lengths, `(batch, classes)`, in [0, 1): the evidence for each class; they need not sum to one."""

    reconstruction: Array | None
    """Intensities in [0, 1], `(batch, height, width, in_channels)`, or None without a decoder."""


class CapsNet(nnx.Module):
    """Convolution, primary capsules, one routed capsule per class, and a decoder."""

    def __init__(self, config: CapsNetConfig, *, rngs: nnx.Rngs) -> None:
        self.image_shape = (config.image_size, config.image_size, config.in_channels)
        channels = config.conv_channels
        conv = partial(Conv, padding="VALID", rngs=rngs)
        self.conv = conv(config.in_channels, channels, config.conv_kernel, strides=config.conv_stride)
        if config.hidden is None:
            self.hidden = None
        else:
            hidden_channels, kernel, stride = config.hidden
            self.hidden = conv(channels, hidden_channels, kernel, strides=stride)
            channels = hidden_channels
        self.primary = PrimaryCapsules(
            channels,
            config.primary_capsules,
            config.primary_dim,
            config.primary_kernel,
            strides=config.primary_stride,
            rngs=rngs,
        )
        self.digit = DenseCapsules(
            config.primary_size() ** 2 * config.primary_capsules,
            config.primary_dim,
            config.classes,
            config.digit_dim,
            num_iters=config.num_iters,
            rngs=rngs,
        )
        self.decoder = (
            Decoder(config.classes * config.digit_dim, config.decoder, prod(self.image_shape), rngs=rngs)
            if config.reconstruction
            else None
        )

    def __call__(self, images: Array, labels: Array | None = None) -> CapsNetOutput:
        """Classify images.

        Args:
            images: `(batch, height, width, in_channels)`.
            labels: `(batch,)` integers in training: the decoder sees the capsule of the true class only. None
                (inference) shows it the longest capsule.

        Returns:
            Capsules, lengths and the reconstruction.

        Raises:
            ValueError: if the shapes do not fit the configuration.
        """
        if images.shape[1:] != self.image_shape:
            raise ValueError(f"images {images.shape}: expected {('batch', *self.image_shape)}")
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(f"labels {labels.shape} do not fit images {images.shape}; expected {images.shape[:1]}")
        features = jax.nn.relu(self.conv(images))
        if self.hidden is not None:
            features = jax.nn.relu(self.hidden(features))
        capsules = self.digit(self.primary(features))
        lengths = capsule_lengths(capsules)
        reconstruction = None
        if self.decoder is not None:
            chosen = jnp.argmax(lengths, axis=-1) if labels is None else labels
            mask = jax.nn.one_hot(chosen, capsules.shape[1], dtype=capsules.dtype)
            pixels = self.decoder((capsules * mask[..., None]).reshape(capsules.shape[0], -1))
            reconstruction = pixels.reshape(images.shape)
        return CapsNetOutput(capsules, lengths, reconstruction)


class Decoder(nnx.Module):
    """Fully connected layers from the masked capsules to pixels in [0, 1] (Sabour et al. 2017, figure 2)."""

    def __init__(self, in_features: int, hidden: tuple[int, ...], out_features: int, *, rngs: nnx.Rngs) -> None:
        sizes = (in_features, *hidden, out_features)
        self.layers = nnx.List([nnx.Linear(before, after, rngs=rngs) for before, after in pairwise(sizes)])

    def __call__(self, features: Array) -> Array:
        """Map `(batch, in_features)` to `(batch, out_features)`."""
        for layer in self.layers[:-1]:
            features = jax.nn.relu(layer(features))
        return jax.nn.sigmoid(self.layers[-1](features))
