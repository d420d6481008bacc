"""VGG (Simonyan & Zisserman 2015, arXiv:1409.1556), the configurations D (16 layers) and E (19)."""

from typing import Literal

import jax
from flax import nnx
from jax import Array
from pydantic import model_validator

from capsfl.models.convolution import max_pool
from capsfl.models.zoo.config import NetworkConfig
from capsfl.models.zoo.layers import Conv, make_norm

_CHANNELS = (64, 128, 256, 512, 512)
_CONVS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


class VGGConfig(NetworkConfig):
    """A VGG: 14.85 (16) or 20.15 (19) million parameters at one channel."""

    name: Literal["vgg16", "vgg19"] = "vgg16"
    """The preset."""

    norm: Literal["none", "batch", "group"] = "none"
    """What follows a convolution: nothing, as published, or a normalisation."""

    @model_validator(mode="after")
    def _fits(self) -> "VGGConfig":
        self.check(32)
        return self


class VGG(nnx.Module):
    """Blocks of 3 x 3 convolutions, each followed by a 2 x 2 pool; 512 features per position."""

    def __init__(self, config: VGGConfig, *, rngs: nnx.Rngs) -> None:
        self.out_channels = _CHANNELS[-1]
        before = config.in_channels
        self.blocks, self.norms = nnx.List([]), nnx.List([])
        for block, (channels, count) in enumerate(zip(_CHANNELS, _CONVS[config.name], strict=True), 1):
            names = [f"block{block}_conv{index}" for index in range(1, count + 1)]
            inputs = [before] + [channels] * (count - 1)
            convs = [Conv(n, i, channels, 3, bias=True, rngs=rngs) for n, i in zip(names, inputs, strict=True)]
            self.blocks.append(nnx.List(convs))
            normed = names if config.norm != "none" else []
            self.norms.append(nnx.List([make_norm(config, f"{n}_bn", channels, rngs=rngs) for n in normed]))
            before = channels

    def __call__(self, images: Array) -> Array:
        """Map `(batch, side, side, in_channels)` to `(batch, side // 32, side // 32, 512)`."""
        for block, norms in zip(self.blocks, self.norms, strict=True):
            for index, conv in enumerate(block):
                images = conv(images)
                images = jax.nn.relu(norms[index](images) if norms else images)
            images = max_pool(images)
        return images
