"""MobileNet (Howard et al. 2017, arXiv:1704.04861) and MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381)."""

from typing import Literal

import jax
from flax import nnx
from jax import Array
from pydantic import model_validator

from capsfl.models.zoo.config import NetworkConfig
from capsfl.models.zoo.layers import Conv, DepthwiseConv, make_norm, pad_zeros

# Channels and stride of every depthwise block of the first network.
_FIRST = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *(((512, 1),) * 5), (1024, 2), (1024, 1))

# Expansion, channels, repeats and first stride of every stage of the second one (its table 2).
_SECOND = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_SECOND_LAST = 1280


class MobileNetConfig(NetworkConfig):
    """A MobileNet: 3.49 (the first) or 2.59 (V2) million parameters at one channel."""

    name: Literal["mobilenet", "mobilenetv2"] = "mobilenet"
    """The preset."""

    @model_validator(mode="after")
    def _fits(self) -> "MobileNetConfig":
        self.check(32)
        return self


class MobileNet(nnx.Module):
    """Depthwise and pointwise convolutions in turns; 1024 features per position."""

    def __init__(self, config: MobileNetConfig, *, rngs: nnx.Rngs) -> None:
        self.out_channels = _FIRST[-1][0]
        self.conv = Conv("conv1", config.in_channels, 32, 3, strides=2, rngs=rngs)
        self.norm = make_norm(config, "conv1_bn", 32, rngs=rngs)
        before = 32
        self.blocks = nnx.List([])
        for index, (channels, strides) in enumerate(_FIRST, 1):
            self.blocks.append(_Depthwise(config, index, before, channels, strides, rngs=rngs))
            before = channels

    def __call__(self, images: Array) -> Array:
        """Map `(batch, side, side, in_channels)` to `(batch, side', side', 1024)`, 1/32 of the side."""
        features = jax.nn.relu6(self.norm(self.conv(images)))
        for block in self.blocks:
            features = block(features)
        return features


class _Depthwise(nnx.Module):
    def __init__(
        self, config: MobileNetConfig, index: int, before: int, channels: int, strides: int, *, rngs: nnx.Rngs
    ) -> None:
        self.halving = strides == 2
        padding = "VALID" if self.halving else "SAME"
        self.depthwise = DepthwiseConv(f"conv_dw_{index}", before, strides=strides, padding=padding, rngs=rngs)
        self.depthwise_norm = make_norm(config, f"conv_dw_{index}_bn", before, rngs=rngs)
        self.pointwise = Conv(f"conv_pw_{index}", before, channels, 1, rngs=rngs)
        self.pointwise_norm = make_norm(config, f"conv_pw_{index}_bn", channels, rngs=rngs)

    def __call__(self, features: Array) -> Array:
        # Keras adds the rim at the end whatever the side, where "SAME" would add one at the beginning of an odd one.
        features = pad_zeros(features, 0, 1) if self.halving else features
        features = jax.nn.relu6(self.depthwise_norm(self.depthwise(features)))
        return jax.nn.relu6(self.pointwise_norm(self.pointwise(features)))


class MobileNetV2(nnx.Module):
    """Inverted residuals: few channels between blocks, many inside them; 1280 features per position."""

    def __init__(self, config: MobileNetConfig, *, rngs: nnx.Rngs) -> None:
        self.out_channels = _SECOND_LAST
        self.conv = Conv("Conv1", config.in_channels, 32, 3, strides=2, rngs=rngs)
        self.norm = make_norm(config, "bn_Conv1", 32, rngs=rngs)
        before = 32
        self.blocks = nnx.List([])
        for expansion, channels, repeats, first in _SECOND:
            for repeat in range(repeats):
                name = f"block_{len(self.blocks)}_" if len(self.blocks) else "expanded_conv_"
                strides = first if repeat == 0 else 1
                self.blocks.append(_Inverted(config, name, before, channels, expansion, strides, rngs=rngs))
                before = channels
        self.last = Conv("Conv_1", before, _SECOND_LAST, 1, rngs=rngs)
        self.last_norm = make_norm(config, "Conv_1_bn", _SECOND_LAST, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """Map `(batch, side, side, in_channels)` to `(batch, side', side', 1280)`, 1/32 of the side."""
        features = jax.nn.relu6(self.norm(self.conv(images)))
        for block in self.blocks:
            features = block(features)
        return jax.nn.relu6(self.last_norm(self.last(features)))


class _Inverted(nnx.Module):
    def __init__(
        self,
        config: MobileNetConfig,
        name: str,
        before: int,
        channels: int,
        expansion: int,
        strides: int,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        inner = expansion * before
        self.residual = strides == 1 and before == channels
        wider = expansion > 1
        self.expand = Conv(f"{name}expand", before, inner, 1, rngs=rngs) if wider else None
        self.expand_norm = make_norm(config, f"{name}expand_BN", inner, rngs=rngs) if wider else None
        self.depthwise = DepthwiseConv(f"{name}depthwise", inner, strides=strides, rngs=rngs)
        self.depthwise_norm = make_norm(config, f"{name}depthwise_BN", inner, rngs=rngs)
        self.project = Conv(f"{name}project", inner, channels, 1, rngs=rngs)
        self.project_norm = make_norm(config, f"{name}project_BN", channels, rngs=rngs)

    def __call__(self, features: Array) -> Array:
        inner = features
        if self.expand is not None and self.expand_norm is not None:
            inner = jax.nn.relu6(self.expand_norm(self.expand(inner)))
        inner = jax.nn.relu6(self.depthwise_norm(self.depthwise(inner)))
        inner = self.project_norm(self.project(inner))
        return features + inner if self.residual else inner
