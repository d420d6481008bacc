"""Segmentation by SegCaps on three planes (Kumar et al. 2020, Eq 2-3): patches, task, whole volumes, scores."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from capsfl.ct.normalize import window
from capsfl.learning.losses import segmentation_loss
from capsfl.learning.patients import Patient
from capsfl.learning.tasks import Task, make_task
from capsfl.models.planes import fuse, slices_of, volume_from
from capsfl.models.segcaps import SegCaps, SegCapsConfig
from capsfl.settings import Settings

Plane = Literal["xy", "yz", "xz"]


class SegmentationConfig(Settings):
    """What is segmented, on which planes, and how it is trained."""

    target: str = "lesion"
    """What the manifest's masks mark, in words; for tables and the page."""
    model: SegCapsConfig = SegCapsConfig()
    """The network; one set of weights serves all planes."""
    planes: tuple[Plane, ...] = ("xy", "yz", "xz")
    """Planes that are trained and fused."""
    crop: int = Field(default=64, ge=16)
    """Side of the square training patches, in voxels; divisible by 8."""
    crops_per_plane: int = Field(default=8, ge=1)
    """Training patches cut from each plane of each patient, half of them on the mask where there is one."""
    positive_weight: float = Field(default=4.0, gt=0)
    """Factor on marked voxels in the cross-entropy; above 1 keeps small targets from being given up early."""
    fusion: Literal["mean", "max", "min"] = "mean"
    """Rule g that fuses the planes' probabilities (Eq 2)."""
    threshold: float = Field(default=0.5, gt=0, lt=1)
    """Fused probability from which a voxel is marked."""


def make_segmentation_task(config: SegmentationConfig, *, seed: int) -> Task:
    """Builds the SegCaps task; a record is `{"image": (side, side, channels), "truth": (side, side)}`."""
    model = SegCaps(config.model, rngs=nnx.Rngs(seed))

    def loss(model: Any, batch: Any) -> jax.Array:
        return segmentation_loss(
            model(batch["image"], batch["truth"]),
            batch["image"],
            batch["truth"],
            positive_weight=config.positive_weight,
            dice_over="batch",
        )

    def scores(model: Any, batch: Any, weight: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        marked = (model(batch["image"]).lengths >= config.threshold).astype(jnp.float32)
        truth, rows = batch["truth"], weight[:, None, None]
        both = jnp.sum(rows * marked * truth)
        return {
            "dice": (2 * both, jnp.sum(rows * (marked + truth))),
            "sensitivity": (both, jnp.sum(rows * truth)),
            "accuracy": (jnp.sum(rows * (marked == truth)), jnp.sum(rows * jnp.ones_like(truth))),
        }

    def absolute_error(model: Any, batch: Any) -> jax.Array:
        return jnp.mean(jnp.abs(model(batch["image"]).lengths - batch["truth"]), axis=(1, 2))

    return make_task("segmentation", model, loss, scores, absolute_error)


def cut_patches(patient: Patient, config: SegmentationConfig, *, seed: int) -> dict[str, np.ndarray]:
    """Cuts training patches out of a patient's planes, half of them centred on the mask where there is one.

    Args:
        patient: with a mask.
        config: planes, number and side of the patches.
        seed: of the choice; the same seed gives the same patches.

    Returns:
        `image` `(patches, side, side, channels)` windowed to [-0.5, 0.5] and `truth` `(patches, side, side)`.

    Raises:
        ValueError: the patient has no mask, or the patches do not fit the field.
    """
    if patient.truth is None:
        raise ValueError(f"{patient.name}: no mask of the {config.target}; add one to the manifest")
    generator = np.random.default_rng(seed)
    image = np.asarray(window(patient.hu))
    images, truths = [], []
    for plane in config.planes:
        pictures = np.asarray(slices_of(image, plane, config.model.in_channels))
        marks = np.asarray(slices_of(patient.truth, plane, 1))[..., 0]
        count, height, width, _ = pictures.shape
        if min(height, width) < config.crop:
            raise ValueError(
                f"segmentation.crop = {config.crop}: plane {plane} is {height} x {width} voxels; "
                f"choose at most {min(height, width)}"
            )
        marked = np.argwhere(marks)
        for number in range(config.crops_per_plane):
            if number % 2 == 0 and len(marked):
                index, row, column = marked[generator.integers(len(marked))]
                row += generator.integers(-config.crop // 4, config.crop // 4 + 1)
                column += generator.integers(-config.crop // 4, config.crop // 4 + 1)
            else:
                index, row, column = (generator.integers(size) for size in (count, height, width))
            top = int(np.clip(row - config.crop // 2, 0, height - config.crop))
            left = int(np.clip(column - config.crop // 2, 0, width - config.crop))
            part = (int(index), slice(top, top + config.crop), slice(left, left + config.crop))
            images.append(pictures[part])
            truths.append(marks[part])
    return {"image": np.stack(images).astype(np.float32), "truth": np.stack(truths).astype(np.float32)}


class Segmenter:
    """A trained SegCaps applied to whole volumes, compiled once per plane.

    Args:
        task: the segmentation task.
        config: planes and fusion.
        batch_size: slices computed at once; when None one on a CPU, whose caches hold no more, else 16.
    """

    def __init__(self, task: Task, config: SegmentationConfig, *, batch_size: int | None = None) -> None:
        self.config = config
        batch_size = batch_size or (1 if jax.default_backend() == "cpu" else 16)

        @partial(jax.jit, static_argnames=("plane",))
        def one_plane(parameters: Any, image: jax.Array, body: jax.Array, *, plane: Plane) -> jax.Array:
            model = task.merge(parameters)
            pictures = slices_of(image, plane, config.model.in_channels)
            lengths = jax.lax.map(lambda picture: model(picture[None]).lengths[0], pictures, batch_size=batch_size)
            return jnp.where(body, volume_from(lengths, plane), 0)

        self._one_plane = one_plane

    def planes(self, parameters: Any, hu: np.ndarray, body: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the probability volume `(z, y, x)` that each plane gives, zero outside the body."""
        image, inside = jnp.asarray(window(hu), jnp.float32), jnp.asarray(body)
        return {p: np.asarray(self._one_plane(parameters, image, inside, plane=p)) for p in self.config.planes}

    def fused(self, planes: dict[str, np.ndarray]) -> np.ndarray:
        """Fuses the planes' probabilities into one volume (Eq 2)."""
        return np.asarray(fuse(jnp.stack([jnp.asarray(p) for p in planes.values()]), rule=self.config.fusion))


def false_positive_volume_ml(marked: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Volume marked outside the truth, in millilitres."""
    return float(np.sum(marked & ~truth) * np.prod(spacing_mm) / 1000.0)
