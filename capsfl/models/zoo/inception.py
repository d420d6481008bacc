"""InceptionV3 (Szegedy et al. 2016, arXiv:1512.00567), sized as in Keras; its auxiliary classifier is left out."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from pydantic import model_validator

from capsfl.models.zoo.config import NetworkConfig
from capsfl.models.zoo.layers import Conv, Padding, make_norm, max_pool_3x3, mean_pool_3x3


class InceptionConfig(NetworkConfig):
    """An InceptionV3: 22.33 million parameters at one channel."""

    name: Literal["inceptionv3"] = "inceptionv3"
    """The preset."""

    @model_validator(mode="after")
    def _fits(self) -> "InceptionConfig":
        self.check(75)
        return self


Shape = tuple[int, int | tuple[int, int]]
"""Channels and kernel of a convolution of stride 1."""


class Inception(nnx.Module):
    """A stem and eleven mixed blocks, whose branches are concatenated; 2048 features per position."""

    def __init__(self, config: InceptionConfig, *, rngs: nnx.Rngs) -> None:
        self.out_channels = 2048
        build = _Builder(config, rngs)
        self.stem = nnx.List(
            [
                build.conv(config.in_channels, 32, 3, strides=2, padding="VALID"),
                build.conv(32, 32, 3, padding="VALID"),
                build.conv(32, 64, 3),
                build.conv(64, 80, 1),
                build.conv(80, 192, 3, padding="VALID"),
            ]
        )
        across, down = (1, 7), (7, 1)
        self.blocks = nnx.List([])
        channels = 192
        for pooled in (32, 64, 64):
            branches = [[(64, 1)], [(48, 1), (64, 5)], [(64, 1), (96, 3), (96, 3)]]
            self.blocks.append(_Mixed(build, channels, branches, pooled))
            channels = 224 + pooled
        self.blocks.append(_Halving(build, channels, [[(384, 3)], [(64, 1), (96, 3), (96, 3)]]))
        for inner in (128, 160, 160, 192):
            branches = [
                [(192, 1)],
                [(inner, 1), (inner, across), (192, down)],
                [(inner, 1), (inner, down), (inner, across), (inner, down), (192, across)],
            ]
            self.blocks.append(_Mixed(build, 768, branches, 192))
        self.blocks.append(
            _Halving(build, 768, [[(192, 1), (320, 3)], [(192, 1), (192, across), (192, down), (192, 3)]])
        )
        for channels in (1280, 2048):
            self.blocks.append(_Expanded(build, channels))

    def __call__(self, images: Array) -> Array:
        """Map `(batch, side, side, in_channels)` to `(batch, side', side', 2048)`, about 1/32 of the side."""
        for index, conv in enumerate(self.stem):
            images = conv(images)
            images = max_pool_3x3(images) if index in (2, 4) else images
        for block in self.blocks:
            images = block(images)
        return images


class _ConvNorm(nnx.Module):
    """A convolution without bias, a normalisation without scale, a ReLU."""

    def __init__(self, conv: Conv, norm: nnx.Module) -> None:
        self.conv, self.norm = conv, norm

    def __call__(self, features: Array) -> Array:
        return jax.nn.relu(self.norm(self.conv(features)))  # pyright: ignore[reportCallIssue]


class _Builder:
    """Makes convolutions in the order of Keras, which names them by it alone."""

    def __init__(self, config: InceptionConfig, rngs: nnx.Rngs) -> None:
        self._config, self._rngs, self._made = config, rngs, 0

    def conv(
        self,
        before: int,
        channels: int,
        kernel: int | tuple[int, int],
        *,
        strides: int = 1,
        padding: Padding = "SAME",
    ) -> _ConvNorm:
        number, self._made = self._made, self._made + 1
        conv = Conv(f"conv2d_{number}", before, channels, kernel, strides=strides, padding=padding, rngs=self._rngs)
        norm = make_norm(self._config, f"batch_normalization_{number}", channels, scale=False, rngs=self._rngs)
        return _ConvNorm(conv, norm)

    def branch(self, before: int, shapes: Sequence[Shape], *, halving: bool = False) -> nnx.List:
        """A chain of convolutions; `halving` lets the last one see every second pixel, without a rim."""
        inputs = (before, *(channels for channels, _ in shapes[:-1]))
        last = len(shapes) - 1
        return nnx.List(
            [
                self.conv(i, channels, kernel, strides=2, padding="VALID")
                if halving and place == last
                else self.conv(i, channels, kernel)
                for place, (i, (channels, kernel)) in enumerate(zip(inputs, shapes, strict=True))
            ]
        )


def _chain(layers: nnx.List, features: Array) -> Array:
    for layer in layers:
        features = layer(features)
    return features


class _Mixed(nnx.Module):
    """Branches of convolutions, and one that averages first."""

    def __init__(self, build: _Builder, before: int, branches: Sequence[Sequence[Shape]], pooled: int) -> None:
        self.branches = nnx.List([build.branch(before, shapes) for shapes in branches])
        self.pooled = build.conv(before, pooled, 1)

    def __call__(self, features: Array) -> Array:
        found = [_chain(branch, features) for branch in self.branches]
        return jnp.concatenate([*found, self.pooled(mean_pool_3x3(features))], axis=-1)


class _Halving(nnx.Module):
    """Branches that halve the resolution, and one that pools."""

    def __init__(self, build: _Builder, before: int, branches: Sequence[Sequence[Shape]]) -> None:
        self.branches = nnx.List([build.branch(before, shapes, halving=True) for shapes in branches])

    def __call__(self, features: Array) -> Array:
        found = [_chain(branch, features) for branch in self.branches]
        return jnp.concatenate([*found, max_pool_3x3(features)], axis=-1)


class _Expanded(nnx.Module):
    """The widest block: two of its branches end in a row and a column of three pixels side by side."""

    def __init__(self, build: _Builder, before: int) -> None:
        self.single = build.conv(before, 320, 1)
        self.chains, self.ends = nnx.List([]), nnx.List([])
        for shapes in ([(384, 1)], [(448, 1), (384, 3)]):
            self.chains.append(build.branch(before, shapes))
            self.ends.append(nnx.List([build.conv(384, 384, (1, 3)), build.conv(384, 384, (3, 1))]))
        self.pooled = build.conv(before, 192, 1)

    def __call__(self, features: Array) -> Array:
        found = [self.single(features)]
        for chain, ends in zip(self.chains, self.ends, strict=True):
            inner = _chain(chain, features)
            found += [end(inner) for end in ends]
        return jnp.concatenate([*found, self.pooled(mean_pool_3x3(features))], axis=-1)
