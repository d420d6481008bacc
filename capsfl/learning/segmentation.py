"""Segmentation on three planes (Kumar et al. 2020, Eq 2-3): patches, task, whole volumes, scores."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field, model_validator

from capsfl.ct.normalize import LUNG_WINDOW, window
from capsfl.learning.augmentation import AugmentationConfig, make_augment
from capsfl.learning.losses import segmentation_loss
from capsfl.learning.patients import Patient
from capsfl.learning.segmenters import SegmenterConfig, make_segmenter
from capsfl.learning.tasks import Task, make_task
from capsfl.models.planes import (
    PLANES,
    default_threshold,
    fuse,
    fused_mask,
    plane_axes,
    slice_at,
    slices_of,
    volume_from,
)
from capsfl.models.segcaps import SegCapsConfig
from capsfl.settings import Settings

Plane = Literal["xy", "yz", "xz"]

PLANE_THRESHOLD = 0.5
"""Probability from which a single plane marks a voxel, for its own Dice."""


class SegmentationConfig(Settings):
    """What is segmented, on which planes, and how it is trained."""

    target: str = "lesion"
    """What the manifest's masks mark, in words; for tables, the page and exported masks."""
    model: SegmenterConfig = SegCapsConfig()
    """The network, `name` one of segcaps, unet, unet++; one set of weights serves all planes."""
    planes: tuple[Plane, ...] = PLANES
    """Planes that are trained and fused."""
    crop: int = Field(default=64, ge=16)
    """Side of the square training patches, in voxels; divisible by 8."""
    crops_per_plane: int = Field(default=8, ge=1)
    """Training patches cut from each plane of each patient, half of them on the mask where there is one."""
    positive_weight: float = Field(default=4.0, gt=0)
    """Factor on marked voxels in the cross-entropy; above 1 keeps small targets from being given up early."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """Random changes of the training patches; none by default."""
    fusion: Literal["mean", "max", "min", "learned"] = "mean"
    """Rule g that fuses the planes' probabilities (Eq 2); `learned` fits a weight per plane and a bias to the masks of
    the validation patients, without noise."""
    plane_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Weights of the planes under fusion `mean`, in the order of `planes`; equal when absent."""
    threshold: float | None = Field(default=None, gt=0, lt=1)
    """Fused probability above which a voxel is marked; when absent 2/3 for the mean of three planes, else 1/2."""

    @model_validator(mode="after")
    def _consistent(self) -> "SegmentationConfig":
        if not self.planes or len(set(self.planes)) != len(self.planes):
            raise ValueError(f"planes = {list(self.planes)}: expected at least one of xy, yz, xz, and none twice")
        if self.model.in_channels not in (1, 5):
            raise ValueError(
                f"model.in_channels = {self.model.in_channels}: expected 1, a slice, or 5 for its neighbours as well"
            )
        if self.plane_weights is None:
            return self
        if self.fusion != "mean":
            raise ValueError(
                f'plane_weights = {list(self.plane_weights)}: fusion "{self.fusion}" takes none; leave them out or '
                'choose fusion = "mean"'
            )
        if len(self.plane_weights) != len(self.planes) or not sum(self.plane_weights):
            raise ValueError(
                f"plane_weights = {list(self.plane_weights)}: expected {len(self.planes)}, one for each of "
                f"{', '.join(self.planes)}, not all zero"
            )
        return self

    @property
    def decision(self) -> float:
        """The fused probability above which a voxel is marked."""
        return self.threshold or default_threshold(self.fusion, len(self.planes))


def make_segmentation_task(config: SegmentationConfig, *, seed: int, pretrained: bool = True) -> Task:
    """Builds the task; a record is `{"image": (side, side, channels), "truth": (side, side), "plane": int}`.

    `pretrained` False leaves the file of `model.weights` alone, where trained weights will take the place of the first.
    """
    model = make_segmenter(config.model, rngs=nnx.Rngs(seed), pretrained=pretrained)

    def loss(model: Any, batch: Any) -> jax.Array:
        return segmentation_loss(
            model(batch["image"], batch["truth"]),
            batch["image"],
            batch["truth"],
            positive_weight=config.positive_weight,
            dice_over="batch",
        )

    def scores(model: Any, batch: Any, weight: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        marked = (model(batch["image"]).lengths >= PLANE_THRESHOLD).astype(jnp.float32)
        truth, rows = batch["truth"], weight[:, None, None]
        both = jnp.sum(rows * marked * truth)
        return {
            "dice": (2 * both, jnp.sum(rows * (marked + truth))),
            "sensitivity": (both, jnp.sum(rows * truth)),
            "accuracy": (jnp.sum(rows * (marked == truth)), jnp.sum(rows * jnp.ones_like(truth))),
        }

    def absolute_error(model: Any, batch: Any) -> jax.Array:
        return jnp.mean(jnp.abs(model(batch["image"]).lengths - batch["truth"]), axis=(1, 2))

    augment = make_augment(config.augmentation, intensities=(-0.5, 0.5))
    return make_task("segmentation", model, loss, scores, absolute_error, augment)


def cut_patches(patient: Patient, config: SegmentationConfig, *, seed: int) -> dict[str, np.ndarray]:
    """Cuts training patches out of a patient's planes, half of them centred on the mask where there is one.

    Args:
        patient: with a mask.
        config: planes, number and side of the patches.
        seed: of the choice; the same seed gives the same patches.

    Returns:
        `image` `(patches, side, side, channels)` windowed to [-0.5, 0.5], `truth` `(patches, side, side)` and `plane`
        `(patches,)` int32, which of `PLANES` a patch was cut from.

    Raises:
        ValueError: the patient has no mask, or the patches do not fit the field.
    """
    if patient.truth is None:
        raise ValueError(f"{patient.name}: no mask of the {config.target}; add one to the manifest")
    generator = np.random.default_rng(seed)
    image = np.asarray(window(patient.hu, *patient.window_hu))
    images, truths, origins = [], [], []
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
            origins.append(PLANES.index(plane))
    return {
        "image": np.stack(images).astype(np.float32),
        "truth": np.stack(truths).astype(np.float32),
        "plane": np.array(origins, np.int32),
    }


class Segmenter:
    """A trained network applied to whole volumes: all slices of all planes in one program, compiled once.

    Slices go through the network `batch_size` at a time and are cut out of the volume when their turn comes, so that
    memory is that of the volume, its planes and one batch.

    Args:
        task: the segmentation task.
        config: planes and fusion.
        fusion_weights: of fusion "learned", a weight per plane and a bias, see `learn_fusion`.
        batch_size: slices computed at once; when None one on a CPU, whose caches hold no more, else 16.
    """

    def __init__(
        self,
        task: Task,
        config: SegmentationConfig,
        *,
        fusion_weights: np.ndarray | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.config = config
        self._weights = np.array(config.plane_weights) if config.plane_weights else fusion_weights
        batch_size = batch_size or (1 if jax.default_backend() == "cpu" else 16)

        def all_planes(parameters: Any, hu: Any, body: jax.Array, window_hu: Any = LUNG_WINDOW) -> jax.Array:
            model: Any = task.merge(parameters)
            image = window(hu, window_hu[0], window_hu[1])

            def lengths(plane: Plane) -> jax.Array:
                def one(index: jax.Array) -> jax.Array:
                    return model(slice_at(image, plane, index, config.model.in_channels)[None]).lengths[0]

                count = image.shape[plane_axes(plane)[0]]
                slices = jax.lax.map(one, jnp.arange(count), batch_size=batch_size)
                return jnp.where(body, volume_from(slices, plane), 0)

            return jnp.stack([lengths(plane) for plane in config.planes])

        self.program = jax.jit(all_planes)
        """`(parameters, hu, body[, window_hu]) -> (planes, z, y, x)`, both volumes `(z, y, x)`, HU as float32.

        Level and width of the window are traced, so that scanners share a program.
        """

    def with_fusion(self, weights: np.ndarray) -> "Segmenter":
        """Returns the same segmenter, its program included, that fuses by other learned weights."""
        other = copy(self)
        other._weights = weights
        return other

    def fusion_facts(self) -> dict[str, Any]:
        """How the planes are fused, as JSON values."""
        weights = self.config.plane_weights
        named = None if weights is None else dict(zip(self.config.planes, weights, strict=True))
        return {"rule": self.config.fusion, "weights": named, "threshold": self.config.decision}

    def planes(
        self, parameters: Any, hu: np.ndarray, body: np.ndarray, window_hu: tuple[float, float] = LUNG_WINDOW
    ) -> dict[str, np.ndarray]:
        """Returns the probability volume `(z, y, x)` that each plane gives, zero outside the body.

        Args:
            parameters: the weights.
            hu: `(z, y, x)` Hounsfield units.
            body: `(z, y, x)` bool.
            window_hu: level and width of the scan's window, that of its patient in training.
        """
        levels = jnp.asarray(window_hu, jnp.float32)
        found = np.asarray(self.program(parameters, jnp.asarray(hu, jnp.float32), jnp.asarray(body), levels))
        return dict(zip(self.config.planes, found, strict=True))

    def fused(self, planes: Mapping[str, np.ndarray]) -> np.ndarray:
        """Fuses the planes' probabilities into one volume `(z, y, x)` (Eq 2), zero where all of them say zero."""
        stacked = self._stack(planes)
        fused = fuse(stacked, rule=self.config.fusion, weights=self._weights).astype(np.float32)
        # The learned rule has a bias, which nobody asked about the air around the body.
        return np.where(stacked.any(axis=0), fused, 0) if self.config.fusion == "learned" else fused

    def marked(self, planes: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns where the planes together mark a voxel, `(z, y, x)` bool."""
        stacked, rule = self._stack(planes), self.config.fusion
        found = fused_mask(stacked, rule=rule, weights=self._weights, threshold=self.config.threshold)
        return found & stacked.any(axis=0)

    def _stack(self, planes: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.stack([planes[plane] for plane in self.config.planes])


def false_positive_volume_ml(marked: np.ndarray, truth: np.ndarray, spacing_mm: Sequence[float]) -> float:
    """Volume marked outside the truth, in millilitres."""
    return float(np.sum(marked & ~truth) * np.prod(spacing_mm) / 1000.0)
