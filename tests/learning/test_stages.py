"""Patches, masked slices, controls: what the two stages are fed, and what trains nothing."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from capsfl.ct.pictures import PictureSet
from capsfl.learning.classification import (
    ClassificationConfig,
    Classifier,
    images_of,
    make_classification_task,
    masked_slices,
)
from capsfl.learning.controls import (
    dense_lung_fraction,
    fit_leak,
    fit_threshold,
    leak_features,
    segment_by_threshold,
)
from capsfl.learning.masks import dice
from capsfl.learning.patients import Patient, central_field
from capsfl.learning.segmentation import (
    SegmentationConfig,
    Segmenter,
    cut_patches,
    false_positive_volume_ml,
    make_segmentation_task,
)
from capsfl.models.capsnet import CapsNetConfig
from capsfl.models.segcaps import SegCapsConfig
from capsfl.models.unet import UNetConfig

SHAPE = (24, 64, 80)
SPACING = (4.0, 2.6, 2.6)


@pytest.fixture(scope="module")
def patient() -> Patient:
    """Two lungs in a body, with one dense lesion in the left of the image."""
    z, y, x = np.indices(SHAPE)
    hu = np.full(SHAPE, -1000.0, np.float32)
    body = ((y - 32) / 28) ** 2 + ((x - 40) / 36) ** 2 < 1
    hu[body] = 40
    for middle in (24, 56):
        hu[((y - 32) / 20) ** 2 + ((x - middle) / 12) ** 2 < 1] = -850
    truth = ((z - 12) / 3) ** 2 + ((y - 36) / 5) ** 2 + ((x - 22) / 5) ** 2 < 1
    hu[truth] = -300
    return Patient("p", "A", "A1", 1, hu, np.asarray(body), truth, SPACING)


@pytest.fixture(scope="module")
def pictured() -> Patient:
    """Five pictures, brighter from one to the next, of files that grow taller."""
    pixels = np.random.default_rng(0).integers(0, 40, (5, 48, 48)) + 50 * np.arange(5)[:, None, None]
    sizes = np.stack([100 + 10 * np.arange(5), np.full(5, 200)], axis=1)
    nothing = np.empty((0, 0, 0), np.float32)
    pictures = PictureSet(pixels.astype(np.uint8), sizes)
    return Patient("p", "A", "", 1, nothing, nothing > 0, None, (1.0, 1.0, 1.0), pictures=pictures)


NARROW = (-600.0, 1200.0)


def as_narrow(hu: np.ndarray) -> np.ndarray:
    """HU that look through the fixed window, 1600 wide, as these do through the narrow one."""
    return ((hu + 600) / 1200 * 1600 - 600).astype(np.float32)


def config(**changes) -> SegmentationConfig:
    model = SegCapsConfig(width=0.125, num_iters=1, reconstruction=False)
    return SegmentationConfig(**{"crop": 24, "crops_per_plane": 6, "model": model} | changes)


def test_every_stage_sees_a_patient_through_the_window_of_the_scanner(patient: Patient):
    narrow = dataclasses.replace(patient, window_hu=NARROW)
    fixed, seen = (cut_patches(p, config(), seed=0)["image"] for p in (patient, narrow))
    np.testing.assert_allclose(seen, np.clip(fixed * 4 / 3, -0.5, 0.5), atol=1e-6)
    assert np.abs(seen - fixed).max() > 0.05

    stage = ClassificationConfig(model=CapsNetConfig.ct(image_size=32), slices_per_scan=4)
    assert patient.truth is not None
    same = dataclasses.replace(patient, hu=as_narrow(patient.hu))
    for probability in (None, patient.truth.astype(np.float32)):
        seen, expected, fixed = (images_of(p, stage, probability=probability) for p in (narrow, same, patient))
        np.testing.assert_allclose(seen, expected, atol=1e-5)
        assert np.abs(seen - fixed).max() > 0.03


def test_every_second_patch_holds_part_of_the_mask_and_all_are_windowed(patient):
    patches = cut_patches(patient, config(), seed=0)
    assert patches["image"].shape == (18, 24, 24, 1)
    assert patches["truth"].shape == (18, 24, 24)
    assert patches["truth"][::2].any(axis=(1, 2)).all()
    assert patches["image"].min() >= -0.5
    assert patches["image"].max() <= 0.5


def test_patches_show_the_scan_where_they_show_the_truth(patient):
    patches = cut_patches(patient, config(), seed=1)
    inside = patches["image"][..., 0][patches["truth"] > 0]
    np.testing.assert_allclose(inside, (-300 + 600) / 1600, atol=1e-6)


def test_patches_depend_on_the_seed_alone(patient):
    first, again, other = (cut_patches(patient, config(), seed=s) for s in (3, 3, 4))
    assert np.array_equal(first["image"], again["image"])
    assert not np.array_equal(first["image"], other["image"])


def test_a_crop_larger_than_a_plane_is_refused_with_the_size_that_fits(patient):
    with pytest.raises(ValueError, match=r"segmentation.crop = 48: plane yz is 24 x 64 voxels; choose at most 24"):
        cut_patches(patient, config().model_copy(update={"crop": 48, "planes": ("yz",)}), seed=0)


def test_a_patient_without_mask_cannot_be_cut(patient):
    with pytest.raises(ValueError, match="p: no mask of the lesion"):
        cut_patches(dataclasses.replace(patient, truth=None), config(), seed=0)


def test_nothing_outside_the_body_is_marked_and_planes_fuse_to_their_mean(patient):
    task = make_segmentation_task(config(), seed=0)
    segmenter = Segmenter(task, config())
    planes = segmenter.planes(task.parameters, patient.hu, patient.body)
    assert set(planes) == {"xy", "yz", "xz"}
    for probability in planes.values():
        assert probability.shape == SHAPE
        assert (probability[~patient.body] == 0).all()
        assert (probability[patient.body] > 0).any()
    np.testing.assert_allclose(segmenter.fused(planes), np.mean(list(planes.values()), axis=0), atol=1e-6)
    narrow = segmenter.planes(task.parameters, patient.hu, patient.body, NARROW)["xy"]
    np.testing.assert_allclose(
        narrow, segmenter.planes(task.parameters, as_narrow(patient.hu), patient.body)["xy"], atol=1e-5
    )
    assert np.abs(narrow - planes["xy"]).max() > 1e-4
    segmenter.planes(task.parameters, patient.hu + 100, ~patient.body)
    program: Any = segmenter.program
    assert program._cache_size() == 1, "one program for all scans"


@pytest.fixture(scope="module")
def planes() -> dict[str, np.ndarray]:
    """What three planes may say about four voxels, of which the last lies outside the body."""
    said = {"xy": [0.9, 0.6, 0.1, 0.0], "yz": [0.9, 0.6, 0.2, 0.0], "xz": [0.9, 0.1, 0.8, 0.0]}
    return {plane: np.array(p, np.float32).reshape(1, 1, 4) for plane, p in said.items()}


@pytest.mark.parametrize(
    ("words", "fused", "marked"),
    [
        ({}, [0.9, 0.4333333, 0.3666667, 0], [1, 0, 0, 0]),
        ({"threshold": 0.4}, [0.9, 0.4333333, 0.3666667, 0], [1, 1, 0, 0]),
        ({"plane_weights": (1.0, 1.0, 0.0)}, [0.9, 0.6, 0.15, 0], [1, 0, 0, 0]),
        ({"plane_weights": (0.0, 0.0, 2.0), "threshold": 0.5}, [0.9, 0.1, 0.8, 0], [1, 0, 1, 0]),
        ({"fusion": "max"}, [0.9, 0.6, 0.8, 0], [1, 1, 1, 0]),
        ({"fusion": "min"}, [0.9, 0.1, 0.1, 0], [1, 0, 0, 0]),
        ({"fusion": "learned"}, [0.9993893, 0.9878716, 0.4750208, 0], [1, 1, 0, 0]),
    ],
)
def test_planes_are_fused_as_the_configuration_says(planes, words, fused, marked):
    chosen = config(**words)
    # sigmoid(5 xy + 5 yz - 1.6); its bias alone gives 0.17 and is not asked outside the body.
    weights = np.array([5.0, 5.0, 0.0, -1.6]) if chosen.fusion == "learned" else None
    segmenter = Segmenter(make_segmentation_task(config(), seed=0), chosen, fusion_weights=weights)
    np.testing.assert_allclose(segmenter.fused(planes).ravel(), fused, rtol=1e-5)
    np.testing.assert_array_equal(segmenter.marked(planes).ravel(), np.array(marked, bool))


def test_other_weights_need_no_other_program(planes):
    segmenter = Segmenter(
        make_segmentation_task(config(), seed=0),
        config(fusion="learned"),
        fusion_weights=np.array([5.0, 5.0, 0.0, -1.5]),
    )
    other = segmenter.with_fusion(np.array([0.0, 0.0, 9.0, -3.0]))
    assert other.program is segmenter.program
    np.testing.assert_array_equal(other.marked(planes).ravel(), [True, False, True, False])
    np.testing.assert_array_equal(segmenter.marked(planes).ravel(), [True, True, False, False])


def test_all_planes_are_one_program_whose_memory_does_not_grow_with_the_slices():
    """Four times as many slices add their own volumes, and no features of the network."""
    small = config(model=UNetConfig(width=8, depth=1), planes=("xz",))
    task = make_segmentation_task(small, seed=0)

    def temporary(slices: int, batch_size: int) -> int:
        segmenter = Segmenter(task, small, batch_size=batch_size)
        shape = (32, slices, 32)
        arrays = (jax.ShapeDtypeStruct(shape, np.float32), jax.ShapeDtypeStruct(shape, bool))
        analysis = segmenter.program.lower(task.parameters, *arrays).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    few, many = temporary(16, 1), temporary(64, 1)
    assert many - few <= 3 * 4 * 32 * 48 * 32
    assert temporary(64, 16) > 2 * many, "so the features of a batch would show"


@pytest.mark.parametrize("name", ["unet", "unet++"])
def test_every_network_is_chosen_by_name_and_segments(patient, name):
    table = {"model": {"name": name, "width": 4, "depth": 1}, "planes": ["xy"], "crop": 24}
    chosen = SegmentationConfig.model_validate_json(json.dumps(table))
    assert chosen.model.name == name
    assert SegmentationConfig.model_validate_json(chosen.model_dump_json()) == chosen
    task = make_segmentation_task(chosen, seed=0)
    patches = {key: leaf[:2] for key, leaf in cut_patches(patient, chosen, seed=0).items()}
    assert np.isfinite(jax.jit(task.loss)(task.parameters, patches))


def test_a_network_without_a_name_is_segcaps():
    chosen = SegmentationConfig.model_validate_json('{"model": {"width": 0.125}}')
    assert chosen.model == SegCapsConfig(width=0.125)
    assert SegmentationConfig.model_validate_json(chosen.model_dump_json()) == chosen


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"model": {"name": "vnet"}}, "(?s)model.*unknown network; its name is one of segcaps, unet, unet"),
        ({"model": {"in_channels": 3}}, r"model\.in_channels = 3: expected 1"),
        ({"planes": ["xy", "xy"]}, "none twice"),
        ({"planes": []}, "at least one of xy, yz, xz"),
        ({"plane_weights": [1.0, 1.0]}, "expected 3, one for each of xy, yz, xz"),
        ({"plane_weights": [0.0, 0.0, 0.0]}, "not all zero"),
        ({"plane_weights": [1.0, 1.0, -1.0]}, "greater than or equal to 0"),
        ({"plane_weights": [1.0, 1.0, 1.0], "fusion": "max"}, 'fusion "max" takes none'),
    ],
)
def test_impossible_settings_are_refused_in_words(table, message):
    with pytest.raises(ValidationError, match=message):
        SegmentationConfig.model_validate_json(json.dumps(table))


def test_patches_know_the_plane_they_were_cut_from(patient):
    patches = cut_patches(patient, config(planes=("xy", "xz")), seed=0)
    np.testing.assert_array_equal(patches["plane"], [0] * 6 + [2] * 6)
    assert patches["plane"].dtype == np.int32


def test_masked_slices_are_those_with_most_marked_tissue_and_dark_elsewhere(patient):
    assert patient.truth is not None
    stage = ClassificationConfig(model=CapsNetConfig.ct(image_size=32), slices_per_scan=4)
    slices = masked_slices(patient.hu, patient.truth.astype(np.float32), stage)
    assert slices.shape == (4, 32, 32, 1)
    assert (slices.max(axis=(1, 2, 3)) > 0.1).all()
    assert slices.min() >= -1e-6
    nothing = masked_slices(patient.hu, np.zeros(SHAPE, np.float32), stage)
    assert (nothing == 0).all()


def test_slices_lie_evenly_in_the_lungs_where_nothing_segments_and_show_the_window(patient):
    stage = ClassificationConfig(model=CapsNetConfig.ct(image_size=80), slices_per_scan=4)
    short = dataclasses.replace(patient, hu=np.where(np.arange(24)[:, None, None] < 12, patient.hu, 40))
    slices = images_of(short, stage)
    assert slices.shape == (4, 80, 80, 1)
    expected = (short.hu[[1, 4, 7, 10]] + 600) / 1600 + 0.5
    np.testing.assert_allclose(slices[:, 8:-8, :, 0], np.clip(expected, 0, 1), atol=1e-5)
    dense = images_of(patient, stage.model_copy(update={"slices": "dense"}))
    np.testing.assert_allclose(dense[:, 44, 22, 0], (-300 + 600) / 1600 + 0.5, atol=1e-3)


def test_pictures_are_taken_evenly_and_resized(pictured):
    stage = ClassificationConfig(model=CapsNetConfig.ct(image_size=32), slices_per_scan=2)
    images = images_of(pictured, stage)
    assert images.shape == (2, 32, 32, 1)
    means = pictured.pictures.pixels[[1, 3]].mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(images.mean(axis=(1, 2, 3)), means, atol=0.02)
    assert len(images_of(pictured, stage.model_copy(update={"slices_per_scan": 9}))) == 5


def test_leak_features_are_the_files_size_and_what_a_mean_of_nine_takes_away(pictured):
    rows = leak_features(pictured)
    np.testing.assert_allclose(rows[:, 0], [100, 110, 120, 130, 140])
    np.testing.assert_allclose(rows[:, 2], 200 / rows[:, 0])
    flat = dataclasses.replace(pictured, pictures=PictureSet(np.full((1, 8, 8), 51, np.uint8), np.array([[4, 8]])))
    np.testing.assert_allclose(leak_features(flat), [[4, 8, 2, 0.2, 0]], atol=1e-9)


def test_a_leak_in_the_size_alone_is_found(pictured):
    def of(number: int) -> Patient:
        height = 100 + 40 * (number % 2) + number
        pictures = PictureSet(pictured.pictures.pixels[:2], np.array([[height, 200]] * 2))
        return dataclasses.replace(pictured, label=number % 2, pictures=pictures)

    model = fit_leak([of(n) for n in range(10)], 2)
    found = [model.probabilities(leak_features(of(n)))[:, 1].mean() for n in range(10, 14)]
    assert (np.array(found) > 0.5).tolist() == [False, True, False, True]


def test_a_patients_score_is_the_mean_of_its_highest_slices(patient):
    stage = ClassificationConfig(model=CapsNetConfig.ct(image_size=32), slices_per_scan=4, top_slices=2)
    task = make_classification_task(stage, seed=0)
    slices = np.asarray(jax.random.uniform(jax.random.key(0), (4, 32, 32, 1)))
    lengths = np.asarray(task.merge(task.parameters)(slices).lengths)
    shares = np.sort(1 - lengths[:, 0] / lengths.sum(1))
    assert Classifier(task, stage).score(task.parameters, slices) == pytest.approx(shares[-2:].mean(), rel=1e-5)


def test_the_threshold_control_finds_a_lesion_that_density_alone_gives_away(patient):
    threshold = fit_threshold([patient])
    assert -850 < threshold <= -300
    assert dice(segment_by_threshold(patient, threshold), patient.truth) > 0.9
    assert dense_lung_fraction(patient) == pytest.approx(
        patient.truth.sum() / segment_by_threshold(patient, -1024).sum(), rel=0.05
    )


def test_false_positives_are_counted_in_millilitres():
    marked, truth = np.zeros((2, 5, 5), bool), np.zeros((2, 5, 5), bool)
    marked[0] = truth[0, :2] = True
    assert false_positive_volume_ml(marked, truth, (4.0, 5.0, 5.0)) == pytest.approx(1.5)


def test_a_field_that_does_not_fit_is_refused_by_name():
    assert central_field((128, 128, 128), (64, 80, 112)) == (slice(32, 96), slice(24, 104), slice(8, 120))
    with pytest.raises(ValueError, match=r"data.field = \(64, 80, 100\): 100 voxels along x"):
        central_field((128, 128, 128), (64, 80, 100))
