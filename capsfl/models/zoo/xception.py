"""Xception (Chollet 2017, arXiv:1610.02357)."""

from typing import Literal

import jax
from flax import nnx
from jax import Array
from pydantic import model_validator

from capsfl.models.zoo.config import NetworkConfig
from capsfl.models.zoo.layers import Conv, SeparableConv, make_norm, max_pool_3x3

_MIDDLE = 8


class XceptionConfig(NetworkConfig):
    """An Xception: 21.39 million parameters at one channel."""

    name: Literal["xception"] = "xception"
    """The preset."""

    @model_validator(mode="after")
    def _fits(self) -> "XceptionConfig":
        self.check(71)
        return self


class Xception(nnx.Module):
    """Entry, middle and exit flow of separable convolutions with shortcuts; 2048 features per position."""

    def __init__(self, config: XceptionConfig, *, rngs: nnx.Rngs) -> None:
        self.out_channels = 2048
        channels = (config.in_channels, 32, 64)
        self.convs = nnx.List(
            [
                Conv(f"block1_conv{i}", channels[i - 1], channels[i], 3, strides=3 - i, padding="VALID", rngs=rngs)
                for i in (1, 2)
            ]
        )
        self.norms = nnx.List([make_norm(config, f"block1_conv{i}_bn", channels[i], rngs=rngs) for i in (1, 2)])
        entry = [(2, (64, 128, 128)), (3, (128, 256, 256)), (4, (256, 728, 728))]
        middle = [(5 + index, (728, 728, 728, 728)) for index in range(_MIDDLE)]
        blocks = [*entry, *middle, (13, (728, 728, 1024))]
        # The first block of the entry flow follows a ReLU; all others begin with one.
        self.blocks = nnx.List(
            [_Block(config, number, sizes, active=number > 2, rngs=rngs) for number, sizes in blocks]
        )
        self.last = nnx.List(
            [
                _SeparableNorm(config, f"block14_sepconv{index}", i, o, rngs=rngs)
                for index, (i, o) in enumerate(((1024, 1536), (1536, 2048)), 1)
            ]
        )

    def __call__(self, images: Array) -> Array:
        """Map `(batch, side, side, in_channels)` to `(batch, side', side', 2048)`, about 1/32 of the side."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            images = jax.nn.relu(norm(conv(images)))
        for block in self.blocks:
            images = block(images)
        for layer in self.last:
            images = jax.nn.relu(layer(images))
        return images


class _SeparableNorm(nnx.Module):
    def __init__(self, config: XceptionConfig, name: str, before: int, channels: int, *, rngs: nnx.Rngs) -> None:
        self.conv = SeparableConv(name, before, channels, rngs=rngs)
        self.norm = make_norm(config, f"{name}_bn", channels, rngs=rngs)

    def __call__(self, features: Array) -> Array:
        return self.norm(self.conv(features))


class _Block(nnx.Module):
    """Separable convolutions with a ReLU before each, then a pool where the shortcut is projected."""

    def __init__(
        self, config: XceptionConfig, number: int, sizes: tuple[int, ...], *, active: bool, rngs: nnx.Rngs
    ) -> None:
        self.active = active
        self.layers = nnx.List(
            [
                _SeparableNorm(config, f"block{number}_sepconv{index}", sizes[index - 1], sizes[index], rngs=rngs)
                for index in range(1, len(sizes))
            ]
        )
        # Keras names the shortcuts by their order alone.
        order = {2: 0, 3: 1, 4: 2, 13: 3}.get(number)
        before, channels, projected = sizes[0], sizes[-1], order is not None
        self.shortcut = Conv(f"conv2d_{order}", before, channels, 1, strides=2, rngs=rngs) if projected else None
        norm = make_norm(config, f"batch_normalization_{order}", channels, rngs=rngs) if projected else None
        self.shortcut_norm = norm

    def __call__(self, features: Array) -> Array:
        shortcut = features
        for index, layer in enumerate(self.layers):
            features = layer(jax.nn.relu(features) if index or self.active else features)
        if self.shortcut is not None and self.shortcut_norm is not None:
            shortcut = self.shortcut_norm(self.shortcut(shortcut))
            features = max_pool_3x3(features, padding="SAME")
        return shortcut + features
