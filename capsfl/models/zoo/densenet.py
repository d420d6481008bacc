"""DenseNet (Huang et al. 2017, arXiv:1608.06993), growth rate 32, sized and named as in Keras."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from pydantic import model_validator

from capsfl.models.zoo.config import NetworkConfig
from capsfl.models.zoo.layers import Conv, make_norm, max_pool_3x3, mean_pool_2x2, pad_zeros

_EPSILON = 1.001e-5
_GROWTH = 32
_BLOCKS = {"densenet121": (6, 12, 24, 16), "densenet169": (6, 12, 32, 32), "densenet201": (6, 12, 48, 32)}


class DenseNetConfig(NetworkConfig):
    """A DenseNet: 7.29 (121), 13.06 (169) or 18.81 (201) million parameters at one channel."""

    name: Literal["densenet121", "densenet169", "densenet201"] = "densenet121"
    """The preset."""

    @model_validator(mode="after")
    def _fits(self) -> "DenseNetConfig":
        self.check(32)
        return self


class DenseNet(nnx.Module):
    """Four dense blocks, whose layers see the output of all before them, with a halving between two of them."""

    def __init__(self, config: DenseNetConfig, *, rngs: nnx.Rngs) -> None:
        self.conv = Conv("conv1_conv", config.in_channels, 64, 7, strides=2, padding="VALID", rngs=rngs)
        self.norm = make_norm(config, "conv1_bn", 64, epsilon=_EPSILON, rngs=rngs)
        counts, channels = _BLOCKS[config.name], 64
        self.blocks, self.transitions = nnx.List([]), nnx.List([])
        for stage, count in enumerate(counts, 2):
            layers = nnx.List([])
            for index in range(1, count + 1):
                layers.append(_Layer(config, f"conv{stage}_block{index}", channels, rngs=rngs))
                channels += _GROWTH
            self.blocks.append(layers)
            if stage <= len(counts):
                self.transitions.append(_Transition(config, f"pool{stage}", channels, rngs=rngs))
                channels //= 2
        self.last = make_norm(config, "bn", channels, epsilon=_EPSILON, rngs=rngs)
        self.out_channels = channels

    def __call__(self, images: Array) -> Array:
        """Map `(batch, side, side, in_channels)` to `(batch, side', side', channels)`, 1/32 of the side."""
        features = jax.nn.relu(self.norm(self.conv(pad_zeros(images, 3, 3))))
        features = max_pool_3x3(pad_zeros(features, 1, 1))
        for stage, layers in enumerate(self.blocks):
            for layer in layers:
                features = jnp.concatenate([features, layer(features)], axis=-1)
            if stage < len(self.transitions):
                features = self.transitions[stage](features)
        return jax.nn.relu(self.last(features))


class _Layer(nnx.Module):
    def __init__(self, config: DenseNetConfig, name: str, channels: int, *, rngs: nnx.Rngs) -> None:
        inner = 4 * _GROWTH
        self.first_norm = make_norm(config, f"{name}_0_bn", channels, epsilon=_EPSILON, rngs=rngs)
        self.first = Conv(f"{name}_1_conv", channels, inner, 1, rngs=rngs)
        self.second_norm = make_norm(config, f"{name}_1_bn", inner, epsilon=_EPSILON, rngs=rngs)
        self.second = Conv(f"{name}_2_conv", inner, _GROWTH, 3, rngs=rngs)

    def __call__(self, features: Array) -> Array:
        inner = self.first(jax.nn.relu(self.first_norm(features)))
        return self.second(jax.nn.relu(self.second_norm(inner)))


class _Transition(nnx.Module):
    def __init__(self, config: DenseNetConfig, name: str, channels: int, *, rngs: nnx.Rngs) -> None:
        self.norm = make_norm(config, f"{name}_bn", channels, epsilon=_EPSILON, rngs=rngs)
        self.conv = Conv(f"{name}_conv", channels, channels // 2, 1, rngs=rngs)

    def __call__(self, features: Array) -> Array:
        return mean_pool_2x2(self.conv(jax.nn.relu(self.norm(features))))
