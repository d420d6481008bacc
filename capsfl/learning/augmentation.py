"""Random changes of training images inside the jitted local step: turned, scaled, cut, mirrored, noisier, windowed.

Every record is changed by a key of its own, folded from the run, the round, the hospital, the local step and the
record's place in the hospital. What a record looks like therefore depends on no other record, and not on how many
hospitals or records a device works on at once.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from pydantic import Field

from capsfl.ct.normalize import EXTENT_MM, LUNG_WINDOW
from capsfl.learning.tasks import Augment
from capsfl.models.planes import PLANES, plane_axes
from capsfl.settings import Settings

DIRECTIONS = ("head-foot", "front-back", "left-right")
"""The patient's directions that the axes (z, y, x) of a standard volume follow."""

WINDOW_HU = LUNG_WINDOW[1]
"""Width in HU of the window that the images have been through: 1 in their intensities."""


class AugmentationConfig(Settings):
    """Random changes of every training image in every local step; none of them by default."""

    flips: tuple[Literal["left-right", "front-back", "head-foot"], ...] = ()
    """Directions of the patient along which half the images are mirrored. `left-right` puts the heart on the right and
    the liver on the left: only where neither the target nor the label depends on the side."""
    rotation_degrees: float = Field(default=0.0, ge=0, le=180)
    """Largest angle, to either side, by which an image is turned in its plane."""
    scale: float = Field(default=0.0, ge=0, lt=1)
    """Largest change of size: 0.1 draws factors from 0.9 to 1.1."""
    crop: float = Field(default=1.0, gt=0, le=1)
    """Least share of its area that an image keeps: 0.5 draws shares from 0.5 to 1 and cuts a rectangle out at a random
    place, which then fills the whole square (Szegedy et al. 2015, "Going deeper with convolutions", section 6)."""
    crop_aspect: float = Field(default=1.0, ge=1, lt=4)
    """Largest change of proportions by a cut: 1.25 draws height over width from 0.8 to 1.25. What leaves the image is
    left out, so shares fall a little below `crop`."""
    noise_hu: float = Field(default=0.0, ge=0)
    """Largest standard deviation of Gaussian noise, in HU; each image draws its own, from 0."""
    level_hu: float = Field(default=0.0, ge=0)
    """Largest shift, to either side, of the window's level in HU."""
    width: float = Field(default=0.0, ge=0, lt=1)
    """Largest change of the window's width: 0.1 draws factors from 0.9 to 1.1."""

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return self != AugmentationConfig()


def make_augment(config: AugmentationConfig, *, intensities: tuple[float, float]) -> Augment | None:
    """Builds the function that changes one record; None where nothing is to be changed.

    A record is a dictionary with `image` `(height, width, channels)`; `truth` `(height, width)` of 0 and 1, where
    there is one, is moved exactly as the image is; `plane`, an int32 index into `PLANES`, says how the image lies in
    the patient (axial where it is missing). Several channels are neighbouring slices: they move together, and where
    the patient is mirrored across the plane their order turns round. Shapes and types stay as they are.

    Turning is done in mm: rows of the planes yz and xz lie further apart than their columns. What comes in from
    outside repeats the border. Intensities at either end of the window stay there, since what was cut off is unknown.

    Args:
        config: what is changed, and by how much at most.
        intensities: of air and of the window's upper end, (-0.5, 0.5) or (0, 1).
    """
    if not config.active:
        return None
    low, high = intensities
    middle = (low + high) / 2
    allowed = jnp.array([direction in config.flips for direction in DIRECTIONS])
    cuts = config.crop < 1 or config.crop_aspect > 1
    moves = config.rotation_degrees > 0 or config.scale > 0 or cuts

    def augment(key: jax.Array, record: Any) -> Any:
        flip, turn, size, shade, grain, cut = jax.random.split(key, 6)
        plane = record.get("plane", jnp.int32(0))
        image, truth = record["image"], record.get("truth")
        if config.flips:
            mirrored = allowed & jax.random.bernoulli(flip, 0.5, (3,))
            image, truth = _mirror(image, truth, mirrored[jnp.asarray(_AXES)[plane]])
        if moves:
            most = jnp.deg2rad(config.rotation_degrees)
            angle = jax.random.uniform(turn, (), minval=-most, maxval=most)
            factor = jax.random.uniform(size, (), minval=1 - config.scale, maxval=1 + config.scale)
            kept, shift = _draw_cut(cut, config) if cuts else (jnp.ones(2), jnp.zeros(2))
            aspect = jnp.asarray(_ASPECTS, jnp.float32)[plane]
            where = _origins(image.shape[:2], angle, factor, aspect, kept, shift)
            image = jnp.stack([_sample(channel, where) for channel in jnp.moveaxis(image, -1, 0)], axis=-1)
            truth = None if truth is None else (_sample(truth, where) >= 0.5).astype(truth.dtype)
        if config.noise_hu or config.level_hu or config.width:
            image = _shade(image, shade, grain)
        return record | {"image": image} | ({} if truth is None else {"truth": truth})

    def _shade(image: jax.Array, shade: jax.Array, grain: jax.Array) -> jax.Array:
        level, width, deviation = jax.random.uniform(shade, (3,))
        shift = (2 * level - 1) * config.level_hu / WINDOW_HU
        factor = 1 + (2 * width - 1) * config.width
        shaded = (image - middle - shift) / factor + middle
        shaded += deviation * config.noise_hu / WINDOW_HU / factor * jax.random.normal(grain, image.shape)
        inside = (image > low) & (image < high)
        return jnp.where(inside, jnp.clip(shaded, low, high), image)

    return augment


# Of each plane: the volume's axes along its slices, rows and columns, and a pixel's height over its width.
_AXES = [list(plane_axes(plane)) for plane in PLANES]
_ASPECTS = [EXTENT_MM[rows] / EXTENT_MM[columns] for _, rows, columns in _AXES]


def _mirror(image: jax.Array, truth: jax.Array | None, mirrored: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Mirrors across slices, rows and columns, each where `mirrored` `(3,)` says so."""
    across, rows, columns = mirrored
    image = jnp.where(across, image[..., ::-1], image)
    image = jnp.where(rows, image[::-1], image)
    image = jnp.where(columns, image[:, ::-1], image)
    if truth is not None:
        truth = jnp.where(rows, truth[::-1], truth)
        truth = jnp.where(columns, truth[:, ::-1], truth)
    return image, truth


def _draw_cut(key: jax.Array, config: AugmentationConfig) -> tuple[jax.Array, jax.Array]:
    """Draws a rectangle: the shares of height and width it keeps `(2,)`, and how far its middle lies from the image's.

    Shifts `(2,)` are in heights and widths. Area is uniform, proportions are uniform in their logarithm.
    """
    area, aspect, *place = jax.random.uniform(key, (4,))
    area = config.crop + (1 - config.crop) * area
    stretch = (2 * aspect - 1) * jnp.log(config.crop_aspect) / 2
    kept = jnp.minimum(jnp.sqrt(area) * jnp.exp(jnp.stack([stretch, -stretch])), 1)
    return kept, (jnp.stack(place) - 0.5) * (1 - kept)


def _origins(
    shape: tuple[int, ...], angle: jax.Array, factor: jax.Array, aspect: jax.Array, kept: jax.Array, shift: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Where in the image each pixel of the changed one comes from, as rows and columns `(height, width)`.

    The image is turned and scaled, and then the rectangle `kept` and `shift` of it is cut out and enlarged.
    """
    centre = [(size - 1) / 2 for size in shape]
    rows, columns = jnp.meshgrid(
        *((jnp.arange(n) - c) * k + n * s for n, c, k, s in zip(shape, centre, kept, shift, strict=True)), indexing="ij"
    )
    down, right = rows * aspect / factor, columns / factor
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    return (cosine * down + sine * right) / aspect + centre[0], cosine * right - sine * down + centre[1]


def _sample(image: jax.Array, where: tuple[jax.Array, jax.Array]) -> jax.Array:
    return map_coordinates(image, where, order=1, mode="nearest")
