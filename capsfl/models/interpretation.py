"""What a capsule network has learned, made visible: images of moved capsules, and the couplings of routing.

Both functions look at a trained network from outside: training neither calls them nor pays for them.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from capsfl_kernels import squash
from flax import nnx
from jax import Array, lax

from capsfl.models.capsnet import CapsNet
from capsfl.models.efficient_capsnet import EfficientCapsNet
from capsfl.models.layers import ConvCapsules, capsule_lengths
from capsfl.models.segcaps import SegCaps

# Sabour et al. 2017, section 5.1: from -0.25 to 0.25 by 0.05.
_STEP, _REACH = 0.05, 5


class CapsuleGrid(NamedTuple):
    """What a decoder draws when one dimension of a class capsule moves, for a batch of images."""

    reconstructions: Array
    """Intensities in [0, 1], `(batch, dim, steps, height, width, in_channels)`; the middle step is no move."""

    tweaks: Array
    """What is added to the dimension, `(steps,)`."""

    chosen: Array
    """The class whose capsule moves, `(batch,)`."""

    capsule: Array
    """That capsule as the network gives it, `(batch, dim)`."""

    lengths: Array
    """Lengths of all class capsules, `(batch, classes)`."""


def capsule_grid(model: CapsNet | EfficientCapsNet, images: Array, labels: Array | None = None) -> CapsuleGrid:
    """Reconstruct images while one dimension of a class capsule moves and the others stay.

    Every dimension is tweaked by -0.25, -0.20, ..., 0.25 (Sabour et al. 2017, section 5.1, figure 4).

    Args:
        model: a trained network with a decoder.
        images: `(batch, height, width, in_channels)` intensities in [0, 1].
        labels: `(batch,)` integers, whose capsule to move; None moves the longest one.

    Raises:
        ValueError: the network has no decoder, or the shapes do not fit it.
    """
    if model.decoder is None:
        raise ValueError("the network has no decoder; train it with reconstruction = true")
    # One program for both: a negative label stands for the longest capsule.
    labels = jnp.full(len(images), -1, jnp.int32) if labels is None else labels
    return _capsule_grid(*nnx.split(model), images, labels)


@partial(jax.jit, static_argnums=0)
def _capsule_grid(graph: Any, state: Any, images: Array, labels: Array) -> CapsuleGrid:
    # Merged anew, so whatever the pass leaves in the network (statistics of a batch) is thrown away.
    model = nnx.merge(graph, state)
    _, height, width, channels = images.shape
    capsules, lengths, _ = model(images)
    batch, classes, dim = capsules.shape
    chosen = jnp.where(labels < 0, jnp.argmax(lengths, axis=-1), labels)
    mask = jax.nn.one_hot(chosen, classes, dtype=capsules.dtype)
    capsule = jnp.einsum("bc,bcd->bd", mask, capsules)
    tweaks = _STEP * jnp.arange(-_REACH, _REACH + 1, dtype=capsules.dtype)
    moves = tweaks[None, :, None] * jnp.eye(dim, dtype=capsules.dtype)[:, None, :]
    tweaked = capsule[:, None, None, :] + moves[None]
    masked = jnp.einsum("bc,brsd->brscd", mask, tweaked).reshape(-1, classes * dim)
    pixels = model.decoder(masked).reshape(batch, dim, len(tweaks), height, width, channels)
    return CapsuleGrid(pixels, tweaks, chosen, capsule, lengths)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutedLayer:
    """How one convolutional capsule layer routes, for a batch of images."""

    name: str = field(metadata={"static": True})
    """Of the layer, that of the published code."""

    sources: tuple[int, ...] = field(metadata={"static": True})
    """Child types by where they come from: the layer below, and after it the skip where there is one."""

    couplings: Array
    """`(batch, children, parents, height, width)`: the share of its vote that a child type gives to each parent type
    in the last iteration, at each position of the parents; the shares of a child sum to one."""

    lengths: Array
    """Lengths of the parent capsules, `(batch, parents, height, width)`, in [0, 1]."""


class CouplingMaps(NamedTuple):
    """How SegCaps routes a batch of images."""

    layers: tuple[RoutedLayer, ...]
    """The layers that route more than once between several parents, from the image on; of the others every coupling
    is 1 / parents, whatever the image."""

    lengths: Array
    """Probability of the foreground, `(batch, height, width)`, as the network says it."""


def coupling_maps(model: SegCaps, images: Array) -> CouplingMaps:
    """Segment images and keep the couplings, which the streamed routing never stores.

    Every layer that routes is computed with its votes at hand instead (Sabour et al. 2017, procedure 1; LaLonde & Bagci
    2018, section 2.1), one after the other: for a slice of 512 x 512 at width 1 the votes of one take 128 MiB.

    Args:
        model: a trained SegCaps.
        images: `(batch, height, width, in_channels)`, window intensities in [-0.5, 0.5].

    Raises:
        ValueError: as the network does, where the shapes do not fit it.
    """
    return _coupling_maps(*nnx.split(model), images)


@partial(jax.jit, static_argnums=0)
def _coupling_maps(graph: Any, state: Any, images: Array) -> CouplingMaps:
    model = nnx.merge(graph, state)
    found = []

    def watch(name: str, layer: ConvCapsules) -> Any:
        def route(capsules: Array | tuple[Array, ...]) -> Array:
            arrays = capsules if isinstance(capsules, tuple) else (capsules,)
            outputs, couplings = route_with_couplings(layer, jnp.concatenate(arrays, axis=1))
            sources = tuple(array.shape[1] for array in arrays)
            found.append(RoutedLayer(name, sources, couplings, capsule_lengths(outputs)))
            return outputs

        return route

    # The network wires its layers itself; those that route are replaced in this copy by ones that are watched.
    for name, layer in list(nnx.iter_children(model)):
        if isinstance(layer, ConvCapsules) and layer.num_iters > 1 and len(layer.bias) > 1:
            setattr(model, str(name), watch(str(name), layer))
    lengths = model(images).lengths
    return CouplingMaps(tuple(found), lengths)


def route_with_couplings(layer: ConvCapsules, capsules: Array) -> tuple[Array, Array]:
    """Route as a layer does, with stored votes, and return the couplings of the last iteration too.

    Args:
        layer: convolutional capsules.
        capsules: `(batch, children, height, width, in_dim)`, a skip joined on the second axis.

    Returns:
        Capsules `(batch, parents, height', width', dim)`, equal to what the layer returns, and couplings
        `(batch, children, parents, height', width')`.
    """
    votes, bias = _votes(layer, capsules), layer.bias[...][None, :, None, None]
    parents = votes.shape[2]
    couplings, logits = jnp.full(votes.shape[:-1], 1 / parents, votes.dtype), None
    for iteration in range(layer.num_iters):
        outputs = squash(jnp.einsum("bimhw,bimhwk->bmhwk", couplings, votes) + bias)
        if iteration == layer.num_iters - 1:
            return outputs, couplings
        agreement = jnp.einsum("bimhwk,bmhwk->bimhw", votes, outputs)
        logits = agreement if logits is None else logits + agreement
        couplings = jax.nn.softmax(logits, axis=2)
    raise AssertionError("num_iters is at least 1")


def _votes(layer: ConvCapsules, capsules: Array) -> Array:
    """What every child type says of every parent, `(batch, children, parents, height', width', dim)`."""
    kernel = layer.kernel[...]
    window, _, in_dim, parents, dim = kernel.shape
    flat = kernel.reshape(window, window, in_dim, parents * dim)
    strides, axes = (layer.strides, layer.strides), ("NHWC", "HWIO", "NHWC")
    pictures = capsules.reshape(-1, *capsules.shape[2:])
    if layer.transpose:
        # The adjoint of a convolution sees its kernel turned round.
        votes = lax.conv_transpose(pictures, flat[::-1, ::-1], strides, "SAME", dimension_numbers=axes)
    else:
        votes = lax.conv_general_dilated(pictures, flat, strides, "SAME", dimension_numbers=axes)
    return votes.reshape(*capsules.shape[:2], *votes.shape[1:3], parents, dim).transpose(0, 1, 4, 2, 3, 5)
