"""Small image classifiers for sweeps: a perceptron, a convolutional network, a capsule network."""

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from pydantic import Field

from capsfl.learning.losses import margin_loss
from capsfl.learning.tasks import Task, make_task
from capsfl.models.capsnet import CapsNet, CapsNetConfig
from capsfl.models.convolution import max_pool
from capsfl.models.layers import Conv
from capsfl.settings import Settings


class ImageModelConfig(Settings):
    """A network for small grey images."""

    kind: Literal["mlp", "cnn", "capsnet"] = "mlp"
    """Dense layers; 3 x 3 convolutions with pooling and dense layers; or capsules with routing by agreement."""
    hidden: tuple[int, ...] = (32,)
    """Units of the dense layers before the last one (`mlp`, `cnn`)."""
    channels: tuple[int, ...] = (8, 16)
    """Channels of the convolutions, each followed by 2 x 2 max pooling (`cnn`)."""
    capsules: int = Field(default=8, ge=1)
    """Capsule types of the primary layer (`capsnet`)."""


class Perceptron(nnx.Module):
    """Dense layers with rectifiers; convolutions with pooling before them where there are any."""

    def __init__(self, config: ImageModelConfig, *, side: int, classes: int, rngs: nnx.Rngs) -> None:
        sizes = config.channels if config.kind == "cnn" else ()
        self.convolutions = nnx.List(
            [Conv(before, after, 3, rngs=rngs) for before, after in zip((1, *sizes), sizes, strict=False)]
        )
        for _ in sizes:
            side //= 2
        if side < 1:
            raise ValueError(
                f"problem.model.channels = {list(sizes)}: pools the image away; name fewer, or use larger images"
            )
        widths = (side * side * (sizes[-1] if sizes else 1), *config.hidden, classes)
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)])

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps `(batch, side, side, 1)` to logits `(batch, classes)`."""
        for convolution in self.convolutions:
            images = max_pool(nnx.relu(convolution(images)))
        found = images.reshape(images.shape[0], -1)
        for layer in self.layers[:-1]:
            found = nnx.relu(layer(found))
        return self.layers[-1](found)


def make_image_task(config: ImageModelConfig, *, side: int, classes: int, seed: int) -> Task:
    """Builds the task; a record is `{"image": (side, side, 1), "label": int}`.

    Cross-entropy, or for capsules the margin loss (Sabour et al. 2017, equation 4).
    """
    rngs = nnx.Rngs(seed)
    if config.kind == "capsnet":
        kernel = 5 if side >= 20 else 3
        model: Any = CapsNet(
            CapsNetConfig(
                image_size=side,
                classes=classes,
                conv_channels=config.channels[0] if config.channels else 8,
                conv_kernel=kernel,
                conv_stride=2 if side >= 20 else 1,
                primary_capsules=config.capsules,
                primary_kernel=kernel,
                digit_dim=8,
                reconstruction=False,
            ),
            rngs=rngs,
        )

        def evidence(model: Any, images: jax.Array) -> jax.Array:
            return model(images).lengths

        def cost(found: jax.Array, labels: jax.Array) -> jax.Array:
            return margin_loss(found, labels)
    else:
        model = Perceptron(config, side=side, classes=classes, rngs=rngs)

        def evidence(model: Any, images: jax.Array) -> jax.Array:
            return model(images)

        def cost(found: jax.Array, labels: jax.Array) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

    def loss(model: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        return cost(evidence(model, batch["image"]), batch["label"])

    def scores(model: Any, batch: Mapping[str, jax.Array], weight: jax.Array) -> dict[str, Any]:
        found, total = evidence(model, batch["image"]), jnp.sum(weight)
        right = jnp.argmax(found, axis=-1) == batch["label"]
        costs = jax.vmap(lambda one, label: cost(one[None], label[None]))(found, batch["label"])
        return {"accuracy": (jnp.sum(weight * right), total), "held_out_loss": (jnp.sum(weight * costs), total)}

    return make_task("images", model, loss, scores)
