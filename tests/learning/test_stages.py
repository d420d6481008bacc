"""Patches, masked slices, controls: what the two stages are fed, and what trains nothing."""

import dataclasses

import jax
import numpy as np
import pytest

from capsfl.learning.classification import (
    ClassificationConfig,
    Classifier,
    make_classification_task,
    masked_slices,
)
from capsfl.learning.controls import dense_lung_fraction, fit_threshold, segment_by_threshold
from capsfl.learning.metrics import dice
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


def config(**changes) -> SegmentationConfig:
    model = SegCapsConfig(width=0.125, num_iters=1, reconstruction=False)
    return SegmentationConfig(crop=24, crops_per_plane=6, model=model, **changes)


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


def test_masked_slices_are_those_with_most_marked_tissue_and_dark_elsewhere(patient):
    assert patient.truth is not None
    stage = ClassificationConfig(model=CapsNetConfig.ct(image_size=32), slices_per_scan=4)
    slices = masked_slices(patient.hu, patient.truth.astype(np.float32), stage)
    assert slices.shape == (4, 32, 32, 1)
    assert (slices.max(axis=(1, 2, 3)) > 0.1).all()
    assert slices.min() >= -1e-6
    nothing = masked_slices(patient.hu, np.zeros(SHAPE, np.float32), stage)
    assert (nothing == 0).all()


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
