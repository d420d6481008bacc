"""Trains one classifier of digits on one device: Adam, a warm-up and a cosine, an epoch as one compiled program."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from pydantic import Field

from capsfl.bench.digits import CANVAS, place, shift
from capsfl.learning.networks import ask, class_evidence, classification_loss
from capsfl.settings import Settings

SCORED_AT_ONCE = 500
"""Images classified in one step."""


class DigitTrainingConfig(Settings):
    """How a network learns digits."""

    epochs: int = Field(default=8, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=64, ge=1)
    """Images in a step."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """Peak of Adam's step size: reached after a tenth of all steps, then lowered to nothing along a cosine."""
    shift_pixels: int = Field(default=2, ge=0)
    """Largest random move of a training image along each axis (Sabour et al. 2017, section 5)."""
    canvas: Literal[28, 40] = 28
    """Side of the images: 28 as they are, 40 at a random place of a black canvas."""


class Learned(NamedTuple):
    """What training changes.

    Attributes:
        parameters: the weights.
        statistics: of batch normalisation; empty without.
        optimizer: Adam's moments and step.
    """

    parameters: Any
    statistics: Any
    optimizer: Any


class DigitTrainer:
    """A network and the compiled programs that train and score it.

    Args:
        network: any that `capsfl.learning.networks.ask` understands.
        config: how it learns.
        images: training images `(n, 28, 28, 1)` in [0, 1].
        labels: `(n,)` int32.
    """

    def __init__(
        self, network: nnx.Module, config: DigitTrainingConfig, images: np.ndarray, labels: np.ndarray
    ) -> None:
        self.config = config
        self._images, self._labels = jnp.asarray(images), jnp.asarray(labels)
        graph, parameters, statistics, rest = nnx.split(network, nnx.Param, nnx.BatchStat, ...)
        steps = config.epochs * self.steps_per_epoch
        warm_up = max(steps // 10, 1)
        rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warm_up, max(steps, warm_up + 1))
        optimizer = optax.adam(rate)
        self._begin = Learned(parameters, statistics, optimizer.init(parameters))

        def merged(parameters: Any, statistics: Any) -> nnx.Module:
            return nnx.merge(graph, parameters, statistics, rest, copy=True)

        def step(learned: Learned, images: Array, labels: Array, key: Array) -> tuple[Learned, Array]:
            images = self._seen(images, key)

            def loss(parameters: Any) -> tuple[Array, Any]:
                model = merged(parameters, learned.statistics)
                value = classification_loss(ask(model, images, labels), images, labels)
                return value, nnx.state(model, nnx.BatchStat)

            (value, statistics), gradient = jax.value_and_grad(loss, has_aux=True)(learned.parameters)
            move, moments = optimizer.update(gradient, learned.optimizer, learned.parameters)
            return Learned(optax.apply_updates(learned.parameters, move), statistics, moments), value

        # The images are an argument: as a constant they would be a part of the program.
        @jax.jit
        def epoch(learned: Learned, images: Array, labels: Array, key: Array) -> tuple[Learned, Array]:
            order_key, step_key = jax.random.split(key)
            count = self.steps_per_epoch * config.batch_size
            rows = jax.random.permutation(order_key, len(images))[:count].reshape(-1, config.batch_size)

            def next_step(learned: Learned, drawn: tuple[Array, Array]) -> tuple[Learned, Array]:
                return step(learned, images[drawn[0]], labels[drawn[0]], drawn[1])

            learned, losses = jax.lax.scan(next_step, learned, (rows, jax.random.split(step_key, len(rows))))
            return learned, losses.mean()

        @jax.jit
        def evidence(learned: Learned, images: Array) -> Array:
            model = merged(learned.parameters, learned.statistics)
            model.eval()
            return class_evidence(ask(model, images))

        self._epoch, self._evidence = epoch, evidence

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training images; what is left over differs from epoch to epoch."""
        return max(len(self._images) // self.config.batch_size, 1)

    def begin(self) -> Learned:
        """The state before the first epoch."""
        return self._begin

    def epoch(self, learned: Learned, *, key: Array) -> tuple[Learned, float]:
        """Trains one epoch; returns the state and the mean loss."""
        learned, loss = self._epoch(learned, self._images, self._labels, key)
        return learned, float(loss)

    def error(self, learned: Learned, images: np.ndarray, labels: np.ndarray) -> float:
        """Returns the share of images that are taken for another digit.

        Args:
            learned: of `begin` or `epoch`.
            images: `(n, side, side, 1)` in [0, 1], of the side the network was trained on.
            labels: `(n,)`.
        """
        parts = [images[at : at + SCORED_AT_ONCE] for at in range(0, len(images), SCORED_AT_ONCE)]
        found = np.concatenate([np.argmax(self._evidence(learned, jnp.asarray(part)), axis=-1) for part in parts])
        return float(np.mean(found != labels))

    def _seen(self, images: Array, key: Array) -> Array:
        if self.config.canvas == CANVAS:
            return place(images, key=key)
        return shift(images, key=key, pixels=self.config.shift_pixels)
