"""Augmentation moves an image and its mask together, respects the patient's sides, and depends on its key alone."""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from capsfl.ct.normalize import EXTENT_MM
from capsfl.learning.augmentation import AugmentationConfig, make_augment
from capsfl.models.planes import PLANES

SIDE = 24
SIGNED = (-0.5, 0.5)
MOVES = AugmentationConfig(flips=("left-right", "head-foot"), rotation_degrees=40.0, scale=0.2)
ALL = MOVES.model_copy(update={"noise_hu": 60.0, "level_hu": 80.0, "width": 0.2})


def records(count: int, *, channels: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Blobs of which the image shows where the mask is, dealt over the three planes."""
    generator = np.random.default_rng(seed)
    row, column = np.mgrid[:SIDE, :SIDE]
    centres = generator.uniform(6, SIDE - 6, (2, count, 1, 1))
    truth = (((row - centres[0]) / 4) ** 2 + ((column - centres[1]) / 6) ** 2 < 1).astype(np.float32)
    image = np.repeat(0.8 * truth[..., None] - 0.4, channels, axis=-1).astype(np.float32)
    return {"image": image, "truth": truth, "plane": np.arange(count, dtype=np.int32) % 3}


@cache
def program(config: str) -> Callable[..., Any]:
    """Changes a batch, each record by its key; compiled once for a configuration, as JSON, and a shape."""
    augment = make_augment(AugmentationConfig.model_validate_json(config), intensities=SIGNED)
    assert augment is not None
    return jax.jit(jax.vmap(augment))


def augmented(config: AugmentationConfig, batch: dict[str, np.ndarray], *, seed: int = 0) -> dict[str, np.ndarray]:
    """The batch with record i changed by key i."""
    keys = jax.random.split(jax.random.key(seed), len(batch["image"]))
    return {name: np.asarray(leaf) for name, leaf in program(config.model_dump_json())(keys, batch).items()}


@pytest.fixture(scope="module")
def moved() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A batch before and after everything that moves it."""
    batch = records(24)
    return batch, augmented(MOVES, batch)


def test_nothing_is_changed_by_default():
    assert make_augment(AugmentationConfig(), intensities=SIGNED) is None
    assert not AugmentationConfig().active


def test_mask_and_image_move_together(moved):
    before, after = moved
    assert (np.abs(after["truth"] - before["truth"]).sum(axis=(1, 2)) > 5).mean() > 0.9, "most are moved"
    np.testing.assert_array_equal(after["truth"], after["image"][..., 0] >= 0)
    assert set(np.unique(after["truth"])) == {0, 1}
    np.testing.assert_array_equal(after["plane"], before["plane"])
    assert all(after[name].dtype == before[name].dtype and after[name].shape == before[name].shape for name in after)


def test_size_changes_by_the_scale_alone(moved):
    before, after = moved
    inside = after["truth"][:, 1:-1, 1:-1].sum(axis=(1, 2)) == after["truth"].sum(axis=(1, 2))
    ratio = after["truth"].sum(axis=(1, 2)) / before["truth"].sum(axis=(1, 2))
    assert inside.sum() > 10
    assert np.all(ratio[inside] > 0.8**2 * 0.9)
    assert np.all(ratio[inside] < 1.2**2 * 1.1)


def test_scanned_is_as_vmapped():
    batch = records(6, channels=5)
    augment = make_augment(ALL, intensities=SIGNED)
    assert augment is not None
    keys = jax.random.split(jax.random.key(0), 6)
    scanned = jax.jit(lambda k, b: jax.lax.map(lambda pair: augment(*pair), (k, b)))(keys, batch)
    together = augmented(ALL, batch)
    for name, leaf in scanned.items():
        np.testing.assert_allclose(leaf, together[name], atol=1e-5)


def test_a_record_depends_on_its_own_key_alone():
    batch = records(6, channels=5)
    first, other = augmented(ALL, batch), augmented(ALL, batch, seed=1)
    assert np.abs(first["image"] - other["image"]).max(axis=(1, 2, 3)).min() > 0.01
    batch["image"][1:] = 0.25
    again = augmented(ALL, batch)
    np.testing.assert_array_equal(first["image"][0], again["image"][0])


def ramps(channels: int = 5) -> dict[str, np.ndarray]:
    """In every plane a picture that differs from each of its mirror images, its channels too."""
    row, column, channel = np.mgrid[:SIDE, :SIDE, :channels]
    image = 0.008 * row + 0.004 * column + 0.02 * channel - 0.3
    count = 60
    return {"image": np.repeat(image[None].astype(np.float32), count, 0), "plane": np.arange(count, dtype=np.int32) % 3}


@pytest.mark.parametrize(
    ("direction", "mirrors"),
    [
        ("left-right", {"xy": np.s_[:, ::-1], "yz": np.s_[..., ::-1], "xz": np.s_[:, ::-1]}),
        ("front-back", {"xy": np.s_[::-1], "yz": np.s_[:, ::-1], "xz": np.s_[..., ::-1]}),
        ("head-foot", {"xy": np.s_[..., ::-1], "yz": np.s_[::-1], "xz": np.s_[::-1]}),
    ],
)
def test_a_flip_mirrors_the_patient_and_no_other_way_than_asked(direction, mirrors):
    batch = ramps()
    found = augmented(AugmentationConfig(flips=(direction,)), batch)["image"]
    for number, plane in enumerate(PLANES):
        image = batch["image"][number]
        same = [np.array_equal(one, image) for one in found[number::3]]
        mirrored = [np.array_equal(one, image[mirrors[plane]]) for one in found[number::3]]
        assert all(a or b for a, b in zip(same, mirrored, strict=True))
        assert 3 <= sum(mirrored) <= 17, "half of twenty"


def test_no_side_is_exchanged_unless_asked():
    """Left of the middle stays left: the heart does not wander."""
    batch = records(24)
    batch["image"] = np.zeros_like(batch["image"])
    batch["image"][:, :, 18:] = 0.4
    config = AugmentationConfig(flips=("head-foot", "front-back"), rotation_degrees=20.0, scale=0.2)
    found = augmented(config, batch)["image"][batch["plane"] == 0, ..., 0]
    assert np.all(found[:, :, 12:].sum(axis=(1, 2)) > found[:, :, :12].sum(axis=(1, 2)))


def test_turning_is_done_in_mm():
    """A disc in mm stays that disc at any angle, though rows of yz and xz lie further apart than columns."""
    aspect = EXTENT_MM[0] / EXTENT_MM[1]
    row, column = np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2
    disc = ((row * aspect) ** 2 + column**2 < 8**2).astype(np.float32)
    count = 12
    batch = {
        "image": np.repeat(disc[None, ..., None] - 0.5, count, 0).astype(np.float32),
        "truth": np.repeat(disc[None], count, 0),
        "plane": np.full(count, PLANES.index("xz"), np.int32),
    }
    found = augmented(AugmentationConfig(rotation_degrees=180.0), batch)["truth"]
    assert np.abs(found - disc[None]).sum(axis=(1, 2)).max() < 0.12 * disc.sum()


def places(count: int = 300) -> dict[str, np.ndarray]:
    """Two channels that say where in the square a pixel lies: row and column, from 0 at its edge to 1."""
    row, column = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    image = np.stack([row, column], axis=-1) - 0.5
    return {"image": np.repeat(image[None].astype(np.float32), count, 0), "plane": np.zeros(count, np.int32)}


def rectangles(config: AugmentationConfig) -> tuple[np.ndarray, np.ndarray]:
    """The first and last row and column that each cut keeps `(2, cuts)`, as shares of the square, edges included."""
    found = augmented(config, places())["image"] + 0.5
    row, column = found[..., SIDE // 2, 0], found[:, SIDE // 2, :, 1]
    np.testing.assert_allclose(found[..., 0], np.broadcast_to(row[:, :, None], found.shape[:3]), atol=1e-5)
    inner = np.stack([row, column])[..., 4:-4]  # nearest the border an image repeats itself
    step = (inner[..., -1] - inner[..., 0]) / (SIDE - 9)
    return inner[..., 0] - 4.5 * step, inner[..., -1] + 4.5 * step


def test_a_cut_keeps_the_share_asked_for_of_any_place_and_never_leaves_the_image():
    first, last = rectangles(AugmentationConfig(crop=0.25))
    height, width = last - first
    np.testing.assert_allclose(height, width, atol=1e-4)
    area = height * width
    assert 0.249 < area.min() < 0.28
    assert 0.97 < area.max() < 1.0001
    assert 0.58 < area.mean() < 0.67, "uniform from 0.25 to 1"
    assert first.min() > -1e-4
    assert last.max() < 1.0001
    room = (first / np.maximum(1 - height, 1e-3)[None])[:, height < 0.9]
    assert np.all(np.abs(room.mean(axis=1) - 0.5) < 0.06), "anywhere with the same chance"
    assert np.all(room.min(axis=1) < 0.05)
    assert np.all(room.max(axis=1) > 0.95)
    assert abs(np.corrcoef(room)[0, 1]) < 0.2, "rows and columns apart"


def test_a_cut_changes_proportions_by_no_more_than_asked():
    first, last = rectangles(AugmentationConfig(crop=0.5, crop_aspect=1.5))
    height, width = last - first
    assert 1.4 < (height / width).max() < 1.501
    assert 1.4 < (width / height).max() < 1.501
    assert (height * width).min() > 0.499
    assert max(height.max(), width.max()) < 1.0001


def test_mask_and_image_are_cut_together():
    batch = records(24)
    after = augmented(AugmentationConfig(crop=0.3, crop_aspect=1.3, rotation_degrees=20.0), batch)
    np.testing.assert_array_equal(after["truth"], after["image"][..., 0] >= 0)
    assert (np.abs(after["truth"] - batch["truth"]).sum(axis=(1, 2)) > 5).mean() > 0.8


def test_noise_and_window_have_the_size_asked_for_and_leave_the_clipped_alone():
    count = 200
    image = np.zeros((count, 8, 8, 1), np.float32)
    image[:, :2], image[:, 2:4] = 0.5, -0.5
    batch = {"image": image, "plane": np.zeros(count, np.int32)}
    noisy = augmented(AugmentationConfig(noise_hu=160.0), batch)["image"]
    np.testing.assert_array_equal(noisy[:, :4], image[:, :4])
    deviations = noisy[:, 4:].std(axis=(1, 2, 3))
    assert 0.08 < deviations.max() < 0.13, "160 HU are 0.1 of the window"
    assert deviations.min() < 0.01
    shifted = augmented(AugmentationConfig(level_hu=160.0), batch)["image"][:, 4:]
    assert np.ptp(shifted, axis=(1, 2, 3)).max() < 1e-6
    assert -0.1001 < shifted.min() < -0.09
    assert 0.09 < shifted.max() < 0.1001
    image[:, 4:] = 0.2
    widened = augmented(AugmentationConfig(width=0.5), batch)["image"][:, 4:]
    assert 0.13 < widened.min() < 0.145, "0.2 / 1.5"
    assert 0.36 < widened.max() < 0.401, "0.2 / 0.5"


def test_masked_slices_stay_black_where_nothing_is_marked():
    augment = make_augment(ALL, intensities=(0.0, 1.0))
    assert augment is not None
    record = {"image": jnp.zeros((16, 16, 1)).at[4:8, 4:8].set(0.4), "label": jnp.int32(1)}
    found = jax.jit(augment)(jax.random.key(3), record)
    assert found["label"] == 1
    assert 0 < np.count_nonzero(np.asarray(found["image"]) > 0.05) < 60
    assert found["image"].min() >= 0
    assert found["image"].max() <= 1


@pytest.mark.parametrize(
    "values",
    [
        {"flips": ("upside-down",)},
        {"rotation_degrees": -1.0},
        {"scale": 1.0},
        {"noise_hu": float("nan")},
        {"crop": 0.0},
        {"crop_aspect": 0.9},
    ],
)
def test_impossible_settings_are_refused(values):
    with pytest.raises(ValidationError):
        AugmentationConfig(**values)
