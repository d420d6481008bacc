"""ResNet (He et al. 2016, arXiv:1512.03385) and its second form (arXiv:1603.05027), sized and named as in Keras.

The second form normalises before a convolution instead of after it, and halves the resolution in the last block of a
stage instead of the first.
"""

from functools import partial
from typing import Literal

import jax
from flax import nnx
from jax import Array
from pydantic import model_validator

from capsfl.models.zoo.config import NetworkConfig
from capsfl.models.zoo.layers import Conv, make_norm, max_pool_3x3, pad_zeros

_EPSILON = 1.001e-5
_WIDTHS = (64, 128, 256, 512)
_BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet50v2": (3, 4, 6, 3), "resnet152v2": (3, 8, 36, 3)}


class ResNetConfig(NetworkConfig):
    """A ResNet: 24.11 (50), 24.08 (50V2) or 58.85 (152V2) million parameters at one channel."""

    name: Literal["resnet50", "resnet50v2", "resnet152v2"] = "resnet50"
    """The preset."""

    @model_validator(mode="after")
    def _fits(self) -> "ResNetConfig":
        self.check(32)
        return self


class ResNet(nnx.Module):
    """A 7 x 7 convolution, a pool and four stages of bottlenecks; 2048 features per position."""

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs) -> None:
        self.second = config.name.endswith("v2")
        self.out_channels = 4 * _WIDTHS[-1]
        self.conv = Conv("conv1_conv", config.in_channels, 64, 7, strides=2, padding="VALID", bias=True, rngs=rngs)
        name, channels = ("post_bn", self.out_channels) if self.second else ("conv1_bn", 64)
        self.norm = make_norm(config, name, channels, epsilon=_EPSILON, rngs=rngs)
        bottleneck = _PreActivated if self.second else _Bottleneck
        self.blocks = nnx.List([])
        before = 64
        for stage, (width, count) in enumerate(zip(_WIDTHS, _BLOCKS[config.name], strict=True), 2):
            last = stage == len(_WIDTHS) + 1
            for block in range(1, count + 1):
                halving = (block == count and not last) if self.second else (block == 1 and stage > 2)
                name = f"conv{stage}_block{block}"
                self.blocks.append(
                    bottleneck(config, name, before, width, project=block == 1, strides=2 if halving else 1, rngs=rngs)
                )
                before = 4 * width

    def __call__(self, images: Array) -> Array:
        """Map `(batch, side, side, in_channels)` to `(batch, side', side', 2048)`, 1/32 of the side."""
        features = self.conv(pad_zeros(images, 3, 3))
        if not self.second:
            features = jax.nn.relu(self.norm(features))
        features = max_pool_3x3(pad_zeros(features, 1, 1))
        for block in self.blocks:
            features = block(features)
        return jax.nn.relu(self.norm(features)) if self.second else features


class _Bottleneck(nnx.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, each normalised after it, beside a shortcut."""

    def __init__(
        self, config: ResNetConfig, name: str, before: int, width: int, *, project: bool, strides: int, rngs: nnx.Rngs
    ) -> None:
        shapes = ((before, width, 1, strides), (width, width, 3, 1), (width, 4 * width, 1, 1))
        self.convs = nnx.List(
            [
                Conv(f"{name}_{index}_conv", i, o, kernel, strides=s, bias=True, rngs=rngs)
                for index, (i, o, kernel, s) in enumerate(shapes, 1)
            ]
        )
        self.norms = nnx.List(
            [
                make_norm(config, f"{name}_{index}_bn", shape[1], epsilon=_EPSILON, rngs=rngs)
                for index, shape in enumerate(shapes, 1)
            ]
        )
        shortcut = partial(Conv, f"{name}_0_conv", before, 4 * width, 1, strides=strides, bias=True, rngs=rngs)
        shortcut_norm = partial(make_norm, config, f"{name}_0_bn", 4 * width, epsilon=_EPSILON, rngs=rngs)
        self.shortcut = shortcut() if project else None
        self.shortcut_norm = shortcut_norm() if project else None

    def __call__(self, features: Array) -> Array:
        shortcut = features
        if self.shortcut is not None and self.shortcut_norm is not None:
            shortcut = self.shortcut_norm(self.shortcut(features))
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            features = norm(conv(features if index == 0 else jax.nn.relu(features)))
        return jax.nn.relu(shortcut + features)


class _PreActivated(nnx.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, each normalised before it, beside a shortcut."""

    def __init__(
        self, config: ResNetConfig, name: str, before: int, width: int, *, project: bool, strides: int, rngs: nnx.Rngs
    ) -> None:
        names = (f"{name}_preact_bn", f"{name}_1_bn", f"{name}_2_bn")
        inputs = (before, width, width)
        self.norms = nnx.List(
            [make_norm(config, n, i, epsilon=_EPSILON, rngs=rngs) for n, i in zip(names, inputs, strict=True)]
        )
        self.convs = nnx.List(
            [
                Conv(f"{name}_1_conv", before, width, 1, rngs=rngs),
                Conv(f"{name}_2_conv", width, width, 3, strides=strides, padding="VALID", rngs=rngs),
                Conv(f"{name}_3_conv", width, 4 * width, 1, bias=True, rngs=rngs),
            ]
        )
        self.shortcut = Conv(f"{name}_0_conv", before, 4 * width, 1, bias=True, rngs=rngs) if project else None
        self.strides = strides

    def __call__(self, features: Array) -> Array:
        first, second, third = self.convs
        active = jax.nn.relu(self.norms[0](features))
        shortcut = self.shortcut(active) if self.shortcut is not None else features
        shortcut = shortcut[:, :: self.strides, :: self.strides]
        active = jax.nn.relu(self.norms[1](first(active)))
        active = jax.nn.relu(self.norms[2](second(pad_zeros(active, 1, 1))))
        return shortcut + third(active)
