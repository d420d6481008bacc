"""Lungs and body by the classical method: couches, bowel gas, cut fields of view, real scans and phantoms."""

import numpy as np
import pytest

from capsfl.ct.dicom import read_dicom
from capsfl.ct.lungs import body_mask, find_lungs, lung_box, lung_mask
from capsfl.ct.normalize import VolumeConfig, standardize
from capsfl.ct.phantom import SCANNERS, acquire, patient
from capsfl.ct.scan import Scan, ScanSource, as_rows

SPACING = (5.0, 4.0, 4.0)
SHAPE = (64, 90, 110)


def coordinates() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Millimetres (z, y, x) of a scan's voxels from the middle of its chest."""
    z, y, x = (np.arange(size) * mm for size, mm in zip(SHAPE, SPACING, strict=True))
    return z[:, None, None] - 140, y[None, :, None] - 180, x[None, None, :] - 218


@pytest.fixture(scope="module")
def chest() -> tuple[np.ndarray, np.ndarray]:
    """HU of a chest on a couch with foam, and its lungs; the abdomen below holds a loop full of gas."""
    z, y, x = coordinates()
    hu = np.full(SHAPE, -1000.0, np.float32)
    hu[np.broadcast_to((y > 128) & (y < 160), SHAPE)] = -910  # foam, as wide as the field of view
    hu[np.broadcast_to((np.abs(y - 126) < 3) | (np.abs(y - 162) < 3), SHAPE)] = -100  # the couch's shells
    hu[np.broadcast_to((y / 118) ** 2 + (x / 172) ** 2 < 1, SHAPE)] = 40
    lungs = np.zeros(SHAPE, bool)
    for side in (-1, 1):
        lungs |= ((z / 110) ** 2 + (y / 75) ** 2 + ((x - 72 * side) / 55) ** 2 < 1) & (z > -70)
    hu[lungs] = -860
    bowel = np.broadcast_to((z < -67) & (z > -132) & (np.abs(y + 30) < 50) & (np.abs(x) < 95), SHAPE)
    hu[bowel] = -1000  # right under the lungs: no voxel of diaphragm between them
    hu[np.broadcast_to((np.abs(z - 30) < 6) & (np.abs(y) < 6) & (np.abs(x) < 30), SHAPE)] = -1000  # main bronchi
    hu[np.broadcast_to((y**2 + x**2 < 9**2) & (z > 30), SHAPE)] = -1000  # trachea, which they join to both lungs
    hu += np.random.default_rng(3).normal(0, 25, SHAPE).astype(np.float32)
    return hu, lungs


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def assert_box(hu: np.ndarray, lungs: np.ndarray, voxels: int = 2) -> None:
    box = lung_box(hu, SPACING)
    assert box is not None
    inside = np.argwhere(lungs)
    np.testing.assert_allclose(box[0], inside.min(0), atol=voxels)
    np.testing.assert_allclose(box[1], inside.max(0) + 1, atol=voxels)


def test_neither_couch_nor_trachea_nor_gas_below_a_thin_diaphragm_is_lung(chest):
    hu, lungs = chest
    found = lung_mask(hu, SPACING)
    assert dice(found, lungs) > 0.95
    z, y, x = coordinates()
    assert not found[np.broadcast_to((y**2 + x**2 < 9**2) & (z > 40), SHAPE)].any()
    assert_box(hu, lungs)


@pytest.mark.parametrize(
    ("part", "what"),
    [
        (np.s_[:30], "lower"),
        (np.s_[30:], "upper"),
        (np.s_[:, :, :55], "right"),
        (np.s_[:, :, 55:], "left"),
        (np.s_[:, :, 24:88], "middle, both lungs cut open"),
        (np.s_[:, 40:], "back, both lungs cut open"),
    ],
)
def test_half_a_thorax_is_enough(chest, part, what):
    hu, lungs = (values[part] for values in chest)
    found = lung_mask(hu, SPACING)
    assert dice(found, lungs) > 0.93, what
    assert_box(hu, lungs, voxels=4)  # a main bronchus counts with the lung that it opens into


def test_a_body_is_whole_where_the_field_of_view_cuts_it(chest):
    hu, lungs = (values[:, :, 24:88] for values in chest)
    _, y, x = coordinates()
    body = np.broadcast_to((y / 118) ** 2 + (x / 172) ** 2 < 1, SHAPE)[:, :, 24:88]
    found = body_mask(hu, SPACING)
    assert dice(found, body) > 0.98
    assert found[lungs].mean() > 0.995


@pytest.mark.parametrize("scanner", [SCANNERS[0], SCANNERS[5]], ids=lambda scanner: scanner.id)
@pytest.mark.parametrize("positive", [False, True])
def test_the_box_bounds_a_phantoms_lungs(scanner, positive):
    hu, lung, _, geometry = acquire(patient(11, positive=positive), scanner, matrix=128, seed=2)
    hu = np.where(hu == scanner.padding_hu, -1000, hu)
    box = lung_box(hu.astype(np.float32), geometry.spacing_mm)
    assert box is not None
    inside = np.argwhere(lung)
    mm = np.array(geometry.spacing_mm)
    # 10 mm: a soft apex and a consolidated base are partly tissue to any threshold.
    np.testing.assert_allclose(box[0] * mm, inside.min(0) * mm, atol=10)
    np.testing.assert_allclose(box[1] * mm, (inside.max(0) + 1) * mm, atol=10)


@pytest.mark.parametrize(
    ("folder", "litres", "low_mm", "high_mm"),
    [
        # Read off the images: apex, base, front, back, sides. The second has gas in the colon under its diaphragm.
        ("lung-pet-ct-dx-siemens", (2.3, 3.3), (0, 70, 45), (232, 249, 292)),
        ("ricord1a-covid-ct-jpegll", (2.4, 3.5), (30, 85, 55), (265, 249, 321)),
    ],
)
def test_the_box_bounds_real_lungs(shared_data, folder, litres, low_mm, high_mm):
    scan = read_dicom(shared_data / folder)
    lungs = find_lungs(scan.hu, scan.spacing_mm)
    assert lungs is not None
    volume = lungs.mask.sum() * np.prod(lungs.strides) * np.prod(scan.spacing_mm) / 1e6
    assert litres[0] < volume < litres[1]
    low, high = (corner * np.array(scan.spacing_mm) for corner in lungs.box())
    np.testing.assert_allclose(low, low_mm, atol=12)
    np.testing.assert_allclose(high, high_mm, atol=12)


@pytest.mark.parametrize("folder", ["lung-pet-ct-dx-siemens", "ricord1a-covid-ct-jpegll"])
def test_half_of_a_real_thorax_is_enough(shared_data, folder):
    scan = read_dicom(shared_data / folder)
    steps = [max(1, round(4 / spacing)) for spacing in scan.spacing_mm]
    hu = scan.hu[:: steps[0], :: steps[1], :: steps[2]]
    z, y, x = (step * spacing for step, spacing in zip(steps, scan.spacing_mm, strict=True))
    whole = lung_mask(hu, (z, y, x))
    middle = hu.shape[2] // 2
    for part in (np.s_[:, :, :middle], np.s_[:, :, middle:], np.s_[: len(hu) // 2], np.s_[len(hu) // 2 :]):
        assert dice(lung_mask(hu[part], (z, y, x)), whole[part]) > 0.98


def test_a_bodys_border_on_a_finer_grid_is_that_of_its_own_voxels():
    hu, _, _, geometry = acquire(patient(4, positive=False), SCANNERS[2], matrix=256, slice_thickness_mm=10, seed=2)
    hu = hu.astype(np.float32)
    coarse = body_mask(hu[:, ::2, ::2], (10.0, geometry.spacing_mm[1] * 2, geometry.spacing_mm[2] * 2))
    fine = body_mask(hu, geometry.spacing_mm)
    assert dice(fine, coarse.repeat(2, 1).repeat(2, 2)) > 0.985
    skin = fine & ~(np.roll(fine, 1, 1) & np.roll(fine, -1, 1) & np.roll(fine, 1, 2) & np.roll(fine, -1, 2))
    assert np.mean(hu[skin] >= -320) > 0.995, "the border lies at the threshold, not beside it"


def test_lung_lost_to_the_extent_is_told_for_either_centre(chest):
    hu, _ = chest
    affine = np.zeros((4, 4))
    affine[2, 0], affine[1, 1], affine[0, 2], affine[3, 3] = 5, 4, 4, 1
    source = ScanSource("nifti", "patient-0", SHAPE, as_rows(affine), (0, 1, 2), (False, False, False))
    scan = Scan(hu, np.ones(SHAPE, bool), affine, source)
    lungs, volume = VolumeConfig(center="lungs"), VolumeConfig(center="volume")
    assert standardize(scan, config=lungs).cropped_lung_fraction == 0
    assert standardize(scan, config=volume).cropped_lung_fraction == 0
    # 200 mm of air beside the patient move the volume's centre, so that a part of the left lung is cut off.
    wide = np.concatenate([hu, np.full((*SHAPE[:2], 60), -1000, np.float32)], axis=2)
    beside = Scan(wide, np.ones(wide.shape, bool), affine, source)
    assert standardize(beside, config=lungs).cropped_lung_fraction == 0
    # The extent begins 167 mm before the middle, voxel 85: at x = -45 mm, inside the right lung.
    lost = standardize(beside, config=volume).cropped_lung_fraction
    expected = chest[1][:, :, : round(85 - 167 / 4)].sum() / chest[1].sum()
    assert expected > 0.1
    assert lost == pytest.approx(expected, abs=0.03)
