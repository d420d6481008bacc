"""Classification of patients by a network that looks at slices of their scans or at pictures of them."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field, model_validator

from capsfl.ct.lungs import lung_box, lung_mask
from capsfl.ct.normalize import LUNG_WINDOW, window
from capsfl.learning import networks
from capsfl.learning.augmentation import AugmentationConfig, make_augment
from capsfl.learning.controls import DENSE_HU
from capsfl.learning.networks import NetworkConfig
from capsfl.learning.patients import Patient
from capsfl.learning.tasks import Scores, Task, make_task
from capsfl.models.capsnet import CapsNetConfig
from capsfl.settings import Settings

BATCH = 16
"""Images that a trained classifier looks at in one forward pass; the last pass is filled up, so one shape compiles."""


class ClassificationConfig(Settings):
    """The classifier and the images it sees."""

    model: NetworkConfig = CapsNetConfig.ct(image_size=64)
    """The network, by `name`; a capsule network by default."""
    classes: int | None = Field(default=None, ge=2)
    """Classes, labelled 0 (healthy), 1, ...; those of the model when absent."""
    image_size: int | None = Field(default=None, ge=8)
    """Side of the images in pixels; that of the model when absent, or 64 where the model takes any."""
    slices: Literal["even", "dense"] = "even"
    """Which axial slices of a scan are looked at where no segmentation picks them: evenly through the lungs, or those
    with most dense lung. Pictures are always taken evenly."""
    slices_per_scan: int = Field(default=12, ge=1)
    """Axial slices of a scan that the classifier sees, or pictures of a patient at most; after segmentation those
    where it marked most."""
    top_slices: int = Field(default=6, ge=1)
    """A patient's probabilities are the mean over this many images with the highest probability of disease."""
    class_weights: tuple[float, ...] | None = None
    """Weight of each class in the loss, against imbalance; equal when absent."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Random changes of the training images."""

    @property
    def num_classes(self) -> int:
        """Classes of the network."""
        return self.classes or self.model.classes

    @property
    def side(self) -> int:
        """Side of the images in pixels."""
        return self.image_size or getattr(self.model, "image_size", 64)

    @property
    def network(self) -> NetworkConfig:
        """The model with the classes and the image size of this section."""
        sizes = {"classes": self.num_classes, "image_size": self.side}
        table = self.model.model_dump()
        return type(self.model).model_validate(table | {name: size for name, size in sizes.items() if name in table})

    @model_validator(mode="after")
    def _fits(self) -> "ClassificationConfig":
        _ = self.network  # refuses an image that is too small for it
        weights = self.class_weights
        if weights is not None and (len(weights) != self.num_classes or min(weights) < 0 or not sum(weights)):
            raise ValueError(
                f"class_weights = {list(weights)}: expected {self.num_classes} weights, at least one above 0"
            )
        return self


def make_classification_task(config: ClassificationConfig, *, seed: int, pretrained: bool = True) -> Task:
    """Builds the classifier's task; a record is `{"image": (side, side, 1) in [0, 1], "label": int}`.

    `pretrained` False leaves the file of `model.weights` alone, where trained weights will take the place of the first.
    """
    model = networks.make_network(config.network, rngs=nnx.Rngs(seed), pretrained=pretrained)
    classes = config.num_classes
    class_weights = None if config.class_weights is None else jnp.asarray(config.class_weights, jnp.float32)

    def loss(model: Any, batch: Any) -> jax.Array:
        weights = None if class_weights is None else class_weights[batch["label"]]
        answer = networks.ask(model, batch["image"], batch["label"])
        return networks.classification_loss(answer, batch["image"], batch["label"], weights)

    def scores(model: Any, batch: Any, weight: jax.Array) -> Scores:
        found = jnp.argmax(networks.class_evidence(networks.ask(model, batch["image"])), axis=-1)
        return score_calls(found, batch["label"], weight, classes=classes)

    def absolute_error(model: Any, batch: Any) -> jax.Array:
        evidence = networks.class_evidence(networks.ask(model, batch["image"]))
        return jnp.mean(jnp.abs(evidence - jax.nn.one_hot(batch["label"], classes)), axis=-1)

    augment = make_augment(config.augmentation, intensities=(0.0, 1.0))
    return make_task("classification", model, loss, scores, absolute_error, augment)


def score_calls(called: jax.Array, label: jax.Array, weight: jax.Array, *, classes: int) -> Scores:
    """Returns accuracy, sensitivity and specificity, of more than two classes also each one's, as weighted sums.

    Args:
        called: `(records,)` classes that were called, 0 for healthy.
        label: `(records,)` true ones.
        weight: `(records,)`, 0 for what fills a batch.
        classes: number of classes.
    """

    def share(right: jax.Array, among: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(weight * among * right), jnp.sum(weight * among)

    return {
        "accuracy": share(called == label, jnp.ones_like(weight)),
        "sensitivity": share(called > 0, label > 0),
        "specificity": share(called == 0, label == 0),
    } | ({f"sensitivity_{k}": share(called == k, label == k) for k in range(classes)} if classes > 2 else {})


def images_of(patient: Patient, config: ClassificationConfig, *, probability: np.ndarray | None = None) -> np.ndarray:
    """Returns the images of a patient that the classifier sees, `(images, side, side, 1)` float32 in [0, 1].

    Pictures, or axial slices of the scan in its window, from the feet upwards; fewer than `slices_per_scan` where
    there are no more.

    Args:
        patient: with a scan or with pictures.
        config: which images, and how large.
        probability: `(z, y, x)` in [0, 1], what segmentation marked; None where nothing segments.
    """
    if patient.pictures is not None:
        chosen = seen_pictures(len(patient.pictures.pixels), config)
        return _squares(patient.pictures.pixels[chosen].astype(np.float32) / 255, config.side)
    if probability is not None:
        return masked_slices(patient.hu, probability, config, patient.window_hu)
    chosen = _choose_slices(patient, config)
    return _squares(np.asarray(window(patient.hu[chosen], *patient.window_hu)) + 0.5, config.side)


def seen_pictures(count: int, config: ClassificationConfig) -> np.ndarray:
    """Returns which of a patient's `count` pictures the classifier sees: all, or `slices_per_scan` taken evenly."""
    return _evenly(0, count, config.slices_per_scan)


def masked_slices(
    hu: np.ndarray,
    probability: np.ndarray,
    config: ClassificationConfig,
    window_hu: tuple[float, float] = LUNG_WINDOW,
) -> np.ndarray:
    """Picks the axial slices with most marked tissue and masks them.

    A slice is the windowed CT, shifted to [0, 1], times the probability that segmentation gives each voxel, padded
    to a square and resized to the network's input.

    Args:
        hu: `(z, y, x)` Hounsfield units.
        probability: `(z, y, x)` in [0, 1].
        config: number of slices and input size.
        window_hu: level and width of the scan's window.

    Returns:
        `(slices, side, side, 1)` float32, from the feet upwards.
    """
    masked = (np.asarray(window(hu, *window_hu)) + 0.5) * probability
    most = np.argsort(-probability.sum(axis=(1, 2)), kind="stable")[: config.slices_per_scan]
    return _squares(masked[np.sort(most)], config.side)


def _choose_slices(patient: Patient, config: ClassificationConfig) -> np.ndarray:
    """Indices of slices within the lungs; of the whole scan where no lung is found."""
    if config.slices == "dense":
        lung = lung_mask(patient.hu, patient.spacing_mm)
        dense = np.sum(lung & (patient.hu >= DENSE_HU), axis=(1, 2))
        return np.sort(np.argsort(-dense, kind="stable")[: config.slices_per_scan])
    box = lung_box(patient.hu, patient.spacing_mm)
    low, high = (0, len(patient.hu)) if box is None else (int(box[0][0]), int(box[1][0]))
    return _evenly(low, high, config.slices_per_scan)


def _evenly(low: int, high: int, count: int) -> np.ndarray:
    """The middles of `count` equal parts of `[low, high)`, or all of it where there are no more."""
    if high - low <= count:
        return np.arange(low, high)
    return (low + (np.arange(count) + 0.5) * (high - low) / count).astype(int)


def _squares(images: np.ndarray, side: int) -> np.ndarray:
    """Pads `(images, height, width)` to squares and resizes them to `(images, side, side, 1)`."""
    longest = max(images.shape[1:])
    margins = [(longest - size) // 2 for size in images.shape[1:]]
    square = np.pad(
        images, [(0, 0)] + [(m, longest - size - m) for m, size in zip(margins, images.shape[1:], strict=True)]
    )
    resized = jax.image.resize(square, (len(square), side, side), "linear")
    return np.asarray(resized, np.float32)[..., None]


def judge(probabilities: np.ndarray, top: int) -> np.ndarray:
    """Returns a patient's class probabilities `(classes,)` from those of its images, `(images, classes)`.

    The mean over the `top` images that look least like class 0.
    """
    return probabilities[np.argsort(probabilities[:, 0], kind="stable")[:top]].mean(axis=0)


class Classifier:
    """A trained network applied to patients' images."""

    def __init__(self, task: Task, config: ClassificationConfig) -> None:
        self.config = config

        @jax.jit
        def probabilities(parameters: Any, images: jax.Array) -> jax.Array:
            return networks.class_probabilities(networks.ask(task.merge(parameters), images))

        @jax.jit
        def features(parameters: Any, images: jax.Array) -> jax.Array:
            return networks.features(task.merge(parameters), images)

        self._probabilities = probabilities
        self._features = features

    def probabilities(self, parameters: Any, images: np.ndarray) -> np.ndarray:
        """Returns the class probabilities of each image, `(images, classes)`."""
        return _in_batches(lambda batch: self._probabilities(parameters, batch), images)

    def features(self, parameters: Any, images: np.ndarray) -> np.ndarray:
        """Returns what the last layer sees of each image, `(images, features)`."""
        return _in_batches(lambda batch: self._features(parameters, batch), images)

    def judge(self, probabilities: np.ndarray) -> np.ndarray:
        """Returns a patient's class probabilities from those of its images, see `judge`."""
        return judge(probabilities, self.config.top_slices)

    def score(self, parameters: Any, images: np.ndarray) -> float:
        """Returns the probability in [0, 1] that the patient is not of class 0."""
        return float(1 - self.judge(self.probabilities(parameters, images))[0])


def _in_batches(apply: Any, images: np.ndarray) -> np.ndarray:
    rows = []
    for start in range(0, len(images), BATCH):
        batch = images[start : start + BATCH]
        filled = np.pad(batch, [(0, BATCH - len(batch)), *[(0, 0)] * (images.ndim - 1)])
        rows.append(np.asarray(apply(jnp.asarray(filled)))[: len(batch)])
    return np.concatenate(rows)
