"""AlexNet (Krizhevsky et al. 2012) in the one tower of Krizhevsky 2014 (arXiv:1404.5997), as it is used today."""

from typing import Literal

import jax
from flax import nnx
from jax import Array
from pydantic import model_validator

from capsfl.models.zoo.config import NetworkConfig
from capsfl.models.zoo.layers import Conv, make_norm, max_pool_3x3, pad_zeros

# Channels, kernel, stride, rim of zeros and whether a pool follows, per convolution.
_CONVS = (
    (64, 11, 4, 2, True),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)


class AlexNetConfig(NetworkConfig):
    """An AlexNet: 2.52 million parameters at one channel, without the fully connected layers of the original."""

    name: Literal["alexnet"] = "alexnet"
    """The preset."""

    norm: Literal["none", "batch", "group"] = "none"
    """What follows a convolution: nothing, as in 2014, or a normalisation."""

    weights: Literal[""] = ""
    """Keras publishes none for this network."""

    @model_validator(mode="after")
    def _fits(self) -> "AlexNetConfig":
        self.check(63)
        return self


class AlexNet(nnx.Module):
    """Five convolutions and three overlapping pools; 256 features per position."""

    def __init__(self, config: AlexNetConfig, *, rngs: nnx.Rngs) -> None:
        self.out_channels = _CONVS[-1][0]
        inputs = (config.in_channels, *(conv[0] for conv in _CONVS[:-1]))
        self.convs, self.norms = nnx.List([]), nnx.List([])
        for index, (before, (channels, kernel, strides, _, _)) in enumerate(zip(inputs, _CONVS, strict=True), 1):
            self.convs.append(
                Conv(f"conv{index}", before, channels, kernel, strides=strides, padding="VALID", bias=True, rngs=rngs)
            )
            if config.norm != "none":
                self.norms.append(make_norm(config, f"bn{index}", channels, rngs=rngs))

    def __call__(self, images: Array) -> Array:
        """Map `(batch, side, side, in_channels)` to `(batch, side', side', 256)`, about 1/32 of the side."""
        for index, (conv, (_, _, _, rim, pooled)) in enumerate(zip(self.convs, _CONVS, strict=True)):
            images = conv(pad_zeros(images, rim, rim))
            images = jax.nn.relu(self.norms[index](images) if self.norms else images)
            images = max_pool_3x3(images) if pooled else images
        return images
