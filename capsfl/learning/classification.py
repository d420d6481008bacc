"""Classification by the capsule network, which looks at the slices that segmentation has masked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from capsfl.ct.normalize import window
from capsfl.learning.losses import margin_loss, reconstruction_loss
from capsfl.learning.tasks import Task, make_task
from capsfl.models.capsnet import CapsNet, CapsNetConfig
from capsfl.settings import Settings


class ClassificationConfig(Settings):
    """The capsule classifier and the slices it sees."""

    model: CapsNetConfig = CapsNetConfig.ct(image_size=64)
    """The network."""
    slices_per_scan: int = Field(default=12, ge=1)
    """Axial slices of a scan that the classifier sees: those where segmentation marked most."""
    top_slices: int = Field(default=6, ge=1)
    """A patient's probability is the mean of this many highest slice probabilities."""


def make_classification_task(config: ClassificationConfig, *, seed: int) -> Task:
    """Builds the classifier's task; a record is `{"image": (side, side, channels), "label": int}`."""
    model = CapsNet(config.model, rngs=nnx.Rngs(seed))

    def loss(model: Any, batch: Any) -> jax.Array:
        output = model(batch["image"], batch["label"])
        total = margin_loss(output.lengths, batch["label"])
        if output.reconstruction is not None:
            total += reconstruction_loss(output.reconstruction, batch["image"])
        return total

    def scores(model: Any, batch: Any, weight: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        found = jnp.argmax(model(batch["image"]).lengths, axis=-1)
        right = (found == batch["label"]).astype(jnp.float32)
        positive = (batch["label"] > 0).astype(jnp.float32)
        return {
            "accuracy": (jnp.sum(weight * right), jnp.sum(weight)),
            "sensitivity": (jnp.sum(weight * positive * (found > 0)), jnp.sum(weight * positive)),
            "specificity": (
                jnp.sum(weight * (1 - positive) * (found == 0)),
                jnp.sum(weight * (1 - positive)),
            ),
        }

    def absolute_error(model: Any, batch: Any) -> jax.Array:
        lengths = model(batch["image"]).lengths
        return jnp.mean(jnp.abs(lengths - jax.nn.one_hot(batch["label"], lengths.shape[-1])), axis=-1)

    return make_task("classification", model, loss, scores, absolute_error)


def masked_slices(hu: np.ndarray, probability: np.ndarray, config: ClassificationConfig) -> np.ndarray:
    """Picks the axial slices with most marked tissue and masks them.

    A slice is the windowed CT, shifted to [0, 1], times the probability that segmentation gives each voxel, padded
    to a square and resized to the network's input.

    Args:
        hu: `(z, y, x)` Hounsfield units.
        probability: `(z, y, x)` in [0, 1].
        config: number of slices and input size.

    Returns:
        `(slices, side, side, 1)` float32, from the feet upwards.
    """
    masked = (np.asarray(window(hu)) + 0.5) * probability
    most = np.argsort(-probability.sum(axis=(1, 2)), kind="stable")[: config.slices_per_scan]
    chosen = masked[np.sort(most)]
    side = max(chosen.shape[1:])
    margins = [(side - size) // 2 for size in chosen.shape[1:]]
    square = np.pad(
        chosen, [(0, 0)] + [(m, side - size - m) for m, size in zip(margins, chosen.shape[1:], strict=True)]
    )
    target = (len(square), config.model.image_size, config.model.image_size)
    return np.asarray(jax.image.resize(square, target, "linear"), np.float32)[..., None]


class Classifier:
    """A trained capsule network applied to a patient's masked slices."""

    def __init__(self, task: Task, config: ClassificationConfig) -> None:
        self.config = config

        @jax.jit
        def lengths(parameters: Any, images: jax.Array) -> jax.Array:
            return task.merge(parameters)(images).lengths

        self._lengths = lengths

    def score(self, parameters: Any, slices: np.ndarray) -> float:
        """Returns the probability in [0, 1] that the patient is not of class 0."""
        lengths = np.asarray(self._lengths(parameters, jnp.asarray(slices)))
        share = 1.0 - lengths[:, 0] / np.maximum(lengths.sum(axis=1), 1e-9)
        return float(np.sort(share)[-self.config.top_slices :].mean())
