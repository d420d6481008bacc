"""The standard volume: resampling against jax and against analysis, geometry, round trips, lungs, windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfl.ct.dicom import read_dicom
from capsfl.ct.errors import ScanError
from capsfl.ct.nifti import read_nifti, read_nifti_mask
from capsfl.ct.normalize import (
    EXTENT_MM,
    PRESETS,
    VolumeConfig,
    lung_box,
    lung_mask,
    scanner_window,
    standardize,
    to_scan_space,
    window,
)
from capsfl.ct.phantom import SCANNERS
from capsfl.ct.resample import apply_weights, resample_hu, resample_mask, weight_matrix
from capsfl.ct.scan import Scan, ScanSource, as_rows

TINY = VolumeConfig(center="volume")


def make_scan(hu, spacing=(5.0, 2.0, 2.0), origin=(-70.0, -90.0, 30.0), valid=None, rotation=None):
    affine = np.zeros((4, 4))
    directions = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    affine[:3, :3] = (np.eye(3) if rotation is None else rotation) @ directions * np.array(spacing)
    affine[:3, 3], affine[3, 3] = origin, 1.0
    hu = np.asarray(hu, np.float32)
    source = ScanSource("nifti", "patient-0", hu.shape, as_rows(affine), (0, 1, 2), (False, False, False))
    return Scan(hu, np.ones(hu.shape, bool) if valid is None else valid, affine, source)


def chest(shape=(64, 90, 110), spacing=(5.0, 4.0, 4.0)):
    """Two ellipsoidal lungs with a trachea in a body, off the centre of the scan; HU and the lungs."""
    z, y, x = (np.arange(size) * mm for size, mm in zip(shape, spacing, strict=True))
    z, y, x = z[:, None, None] - 140, y[None, :, None] - 190, x[None, None, :] - 240
    hu = np.full(shape, -1000.0)
    hu[((y / 110) ** 2 + (x / 165) ** 2 < 1) & (z > -1e3)] = 40
    lungs = np.zeros(shape, bool)
    for side in (-1, 1):
        lungs |= (z / 110) ** 2 + (y / 75) ** 2 + ((x - 72 * side) / 55) ** 2 < 1
    hu[lungs] = -860
    hu[(y**2 + x**2 < 9**2) & (z > 30)] = -1000
    rng = np.random.default_rng(3)
    return hu + rng.normal(0, 25, shape), lungs


@pytest.mark.parametrize(("size", "side"), [(50, 128), (300, 128), (37, 37), (128, 40)])
@pytest.mark.parametrize("kernel", ["lanczos", "linear"])
def test_weights_equal_those_of_jax_image_scale_and_translate(size, side, kernel):
    step, start = 0.83 * size / side, 0.07 * size
    ours = weight_matrix(size, side, step=step, start=start, kernel=kernel)
    # jax places output o at (o + 0.5) / scale - translation / scale - 0.5 in the input.
    scale = 1 / step
    translation = 0.5 - (start + 0.5) * scale
    reference = jax.image.scale_and_translate(
        jnp.eye(size),
        (side, size),
        (0,),
        jnp.array([scale], jnp.float32),
        jnp.array([translation], jnp.float32),
        method="lanczos3" if kernel == "lanczos" else "linear",
        antialias=True,
    )
    np.testing.assert_allclose(ours, reference, atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 80), st.integers(1, 80), st.floats(0.05, 9.0), st.floats(-60.0, 60.0))
def test_weights_sum_to_one_inside_and_to_zero_outside(size, side, step, start):
    sample = start + step * np.arange(side)
    for kernel in ("lanczos", "linear"):
        total = weight_matrix(size, side, step=step, start=start, kernel=kernel).sum(axis=1)
        inside = (sample >= -0.5) & (sample <= size - 0.5)
        np.testing.assert_allclose(total, inside, atol=1e-5)


def test_separable_products_equal_one_contraction():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(7, 11, 13)).astype(np.float32)
    weights = [weight_matrix(size, 9, step=size / 12, start=-1.0, kernel="lanczos") for size in values.shape]
    expected = np.einsum("zyx,az,by,cx->abc", values, *weights)
    np.testing.assert_allclose(apply_weights(values, weights), expected, atol=1e-5)
    hu = 100 * values
    rounded = resample_hu(hu, weights, limits=(-100, 100), outside=-7)
    expected = np.einsum("zyx,az,by,cx->abc", hu.clip(-100, 100), *weights)
    assert np.abs(expected).max() > 110, "Lanczos rings beyond what goes in"
    inside = np.ix_(*(np.flatnonzero(axis.any(axis=1)) for axis in weights))
    np.testing.assert_allclose(rounded[inside], expected[inside].clip(-100, 100), atol=0.501)
    beyond = np.ones(rounded.shape, bool)
    beyond[inside] = False
    assert beyond.any()
    assert (rounded[beyond] == -7).all()
    mask = values > 0.2
    linear = [weight_matrix(size, 9, step=size / 12, start=-1.0, kernel="linear") for size in values.shape]
    blended = np.einsum("zyx,az,by,cx->abc", mask.astype(np.float64), *linear)
    clear = np.abs(blended - 0.5) > 1e-6
    np.testing.assert_array_equal(resample_mask(mask, linear)[clear], (blended >= 0.5)[clear])
    circle = np.broadcast_to(mask[3], mask.shape)  # the same in every plane
    blended = np.einsum("zyx,az,by,cx->abc", circle.astype(np.float64), *linear)
    clear = np.abs(blended - 0.5) > 1e-6
    np.testing.assert_array_equal(resample_mask(circle, linear)[clear], (blended >= 0.5)[clear])


def test_the_standard_volume_matches_jax_on_a_whole_scan():
    rng = np.random.default_rng(1)
    scan = make_scan(rng.uniform(-1000, 400, (40, 60, 70)), spacing=(5.0, 2.5, 2.0))
    volume = standardize(scan, config=TINY)
    scale = np.array(scan.spacing_mm) * 128 / np.array(EXTENT_MM)
    translation = 64 - np.array(scan.hu.shape) / 2 * scale
    reference = jax.image.scale_and_translate(
        jnp.asarray(scan.hu) + 1000,
        (128, 128, 128),
        (0, 1, 2),
        jnp.asarray(scale, jnp.float32),
        jnp.asarray(translation, jnp.float32),
        method="lanczos3",
    )
    expected = np.clip(np.asarray(reference) - 1000, -1024, 3071)
    # A sample exactly on the border may fall to either side in float32.
    border = np.abs(volume.hu - expected) > 1.0
    assert border.mean() < 0.002


def test_a_linear_field_keeps_its_value_at_every_point_of_space():
    index = np.indices((60, 80, 90)).astype(np.float64)
    hu = 4 * index[0] - 3 * index[1] + 2 * index[2] - 400
    angle = np.deg2rad(7)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    scan = make_scan(hu, spacing=(5.0, 2.0, 2.0), rotation=rotation)
    volume = standardize(scan, config=TINY)
    ours = np.indices(volume.hu.shape).reshape(3, -1)
    mm = volume.affine @ np.vstack([ours, np.ones(ours.shape[1])])
    back = (np.linalg.inv(scan.affine) @ mm)[:3].reshape(3, *volume.hu.shape)
    expected = 4 * back[0] - 3 * back[1] + 2 * back[2] - 400
    limits = np.array(scan.hu.shape)[:, None, None, None]
    inner = np.all((back > 5) & (back < limits - 6), axis=0)
    assert inner.sum() > 10_000
    np.testing.assert_allclose(volume.hu[inner], expected[inner], atol=0.75)  # the nearest integer
    outside = np.any((back < -0.51) | (back > limits - 0.49), axis=0)
    assert (volume.hu[outside] == -1000).all()
    assert not volume.valid[outside].any()
    assert volume.valid[inner].all()


@pytest.mark.parametrize("preset", ["tiny", "half"])
def test_the_extent_is_the_papers_for_every_preset(preset):
    scan = make_scan(np.zeros((6, 20, 20)))
    volume = standardize(scan, config=VolumeConfig(preset=preset, center="volume"))
    side = PRESETS[preset]
    assert volume.hu.shape == (side, side, side)
    lengths = np.linalg.norm(volume.affine[:3, :3], axis=0) * side
    np.testing.assert_allclose(lengths, EXTENT_MM)
    middle = np.array([*[(side - 1) / 2] * 3, 1])
    np.testing.assert_allclose(volume.affine @ middle, scan.affine @ [2.5, 9.5, 9.5, 1])
    assert side % 8 == 0


def test_metal_and_edges_do_not_ring_outside_the_twelve_bit_range():
    hu = np.full((30, 60, 60), -1000.0)
    hu[10:20, 20:40, 20:40] = 20_000
    volume = standardize(make_scan(hu, spacing=(5.0, 4.0, 4.0)), config=TINY)
    assert volume.hu.min() >= -1024
    assert volume.hu.max() <= 3071


def test_padding_does_not_count_as_valid():
    valid = np.ones((40, 60, 60), bool)
    valid[:, :, :20] = False
    volume = standardize(make_scan(np.zeros((40, 60, 60)), (5, 4, 4), valid=valid), config=TINY)
    covered = standardize(make_scan(np.zeros((40, 60, 60)), (5, 4, 4)), config=TINY).valid
    assert volume.valid.sum() / covered.sum() == pytest.approx(2 / 3, abs=0.02)


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.floats(2.6, 8.0), st.floats(2.7, 4.0), st.floats(2.7, 4.0)),
    st.tuples(st.integers(-3, 3), st.integers(-6, 6), st.integers(-6, 6)),  # the mask stays inside the scan
)
def test_a_mask_returns_to_the_scan_within_half_a_voxel(spacing, shift):
    shape = (40, 70, 72)
    index = np.indices(shape).reshape(3, -1).T - np.array([19.5, 34.5, 35.5]) - shift
    radius = np.linalg.norm(index * spacing / [40.0, 45.0, 50.0], axis=1).reshape(shape)
    mask = radius < 1
    scan = make_scan(np.where(mask, 40.0, -800.0), spacing=spacing)
    volume = standardize(scan, config=TINY, masks={"lesion": mask})
    back = to_scan_space(volume.masks["lesion"], volume.affine, scan.affine, scan.hu.shape) >= 0.5
    # Only voxels that the boundary passes through, or that touch it, may change.
    changed = np.argwhere(back != mask)
    far = np.abs(radius - 1) * 40 > np.linalg.norm(np.maximum(spacing, np.array(EXTENT_MM) / 128))
    assert not far[tuple(changed.T)].any()
    for axis in range(3):
        center = (np.argwhere(back).mean(0) - np.argwhere(mask).mean(0))[axis]
        assert abs(center) < 0.5


def test_a_volume_of_another_scan_is_not_carried_back():
    angle = np.deg2rad(20)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    scan, other = make_scan(np.zeros((20, 40, 40))), make_scan(np.zeros((20, 40, 40)), rotation=rotation)
    volume = standardize(scan, config=TINY)
    with pytest.raises(ValueError, match="directions differ"):
        to_scan_space(volume.hu, volume.affine, other.affine, other.hu.shape)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"masks\.lesion: shape \(3, 4, 5\)"):
        standardize(make_scan(np.zeros((20, 40, 40))), config=TINY, masks={"lesion": np.zeros((3, 4, 5))})


def test_lungs_are_found_without_trachea_and_outer_air():
    hu, lungs = chest()
    found = lung_mask(hu, (5.0, 4.0, 4.0))
    dice = 2 * (found & lungs).sum() / (found.sum() + lungs.sum())
    assert dice > 0.96
    assert not lung_mask(np.full((10, 30, 30), 40.0), (5.0, 4.0, 4.0)).any()
    assert not lung_mask(np.full((10, 30, 30), -1000.0), (5.0, 4.0, 4.0)).any()


def test_gas_in_the_stomach_is_no_lung():
    hu, lungs = chest()
    z, y, x = (index * mm for index, mm in zip(np.indices(hu.shape), (5, 4, 4), strict=True))
    stomach = (z - 20) ** 2 + (y - 190) ** 2 + (x - 240) ** 2 < 45**2
    assert not (stomach & lungs).any()
    hu[stomach] = np.random.default_rng(0).normal(-995, 25, stomach.sum())
    assert stomach.sum() * 0.08 > 0.12 * lungs.sum() * 0.08 / 2  # too large to be dropped by its size
    assert not (lung_mask(hu, (5.0, 4.0, 4.0)) & stomach).any()


def test_lesions_and_vessels_inside_belong_to_the_lung():
    hu, lungs = chest()
    z, y, x = (index * mm for index, mm in zip(np.indices(hu.shape), (5, 4, 4), strict=True))
    lesion = (z - 140) ** 2 + (y - 250) ** 2 + (x - 312) ** 2 < 14**2
    assert lungs[lesion].all()
    hu[lesion] = 30
    assert lung_mask(hu, (5.0, 4.0, 4.0))[lesion].mean() > 0.95


def test_the_volume_is_centred_on_the_lungs_and_says_what_it_cuts():
    hu, lungs = chest()
    scan = make_scan(hu, spacing=(5.0, 4.0, 4.0))
    volume = standardize(scan, config=VolumeConfig(center="lungs"), masks={"lungs": lungs})
    center = np.argwhere(volume.masks["lungs"]).mean(axis=0)
    np.testing.assert_allclose(center, 63.5, atol=2.5)
    assert volume.cropped_lung_fraction == 0
    box = lung_box(hu, (5.0, 4.0, 4.0))
    assert box is not None
    np.testing.assert_allclose(box[0], np.argwhere(lungs).min(0), atol=2)
    np.testing.assert_allclose(box[1], np.argwhere(lungs).max(0) + 1, atol=2)
    huge = make_scan(hu, spacing=(5.0, 8.0, 8.0))
    assert standardize(huge, config=VolumeConfig()).cropped_lung_fraction > 0.1


def test_without_lungs_the_volume_is_centred_on_the_scan():
    scan = make_scan(np.full((20, 40, 40), 30.0))
    lungs, middle = (standardize(scan, config=VolumeConfig(center=way)) for way in ("lungs", "volume"))
    np.testing.assert_array_equal(lungs.affine, middle.affine)


def test_the_window_is_equation_one():
    hu = np.array([-3000, -1400, -850, -600, 200, 3000], np.int16)
    expected = [-0.5, -0.5, -0.15625, 0.0, 0.5, 0.5]
    np.testing.assert_allclose(window(hu), expected)
    np.testing.assert_allclose(window(jnp.asarray(hu)), expected)  # pyright: ignore[reportArgumentType]
    assert window(hu).dtype == np.float32
    with pytest.raises(ValueError, match="width"):
        window(hu, -600, 0)


def test_scanner_windows_put_a_signature_on_lung():
    lung = np.array([-850.0], np.float32)
    config = VolumeConfig(window="scanner")
    seen = [float(window(lung, *scanner_window(config, name))[0]) for name in ("A1", "B3", "C6")]
    np.testing.assert_allclose(seen, [-0.208, -0.156, -0.233], atol=5e-4)
    assert scanner_window(VolumeConfig(), None) == (-600.0, 1600.0)
    assert scanner_window(config, "SIEMENS SOMATOM Definition Edge") == (-600.0, 1200.0)
    with pytest.raises(ScanError, match=r"scanner X9: Table II has no window for it, .*C6 .* or train with window"):
        scanner_window(config, "X9")
    with pytest.raises(ScanError, match="no scanner named: Table II"):
        scanner_window(config, None)


def test_every_scanner_of_the_table_is_known_by_its_own_tags():
    config = VolumeConfig(window="scanner")
    for scanner in SCANNERS:
        found = scanner_window(config, f"{scanner.manufacturer} {scanner.model}")
        assert found == scanner_window(config, scanner.id) == (scanner.window_level, scanner.window_width)


def test_the_configuration_is_strict_and_hashable():
    assert hash(VolumeConfig()) == hash(VolumeConfig(preset="tiny")) != hash(VolumeConfig(preset="half"))
    with pytest.raises(pydantic.ValidationError):
        VolumeConfig(preset="huge")  # pyright: ignore[reportArgumentType]


def test_real_lung_masks_survive_the_standard_volume(shared_data):
    for number in (1, 2, 3):
        stem = shared_data / "lung-masks-3d" / f"id00{number}-128x128x64"
        scan = read_nifti(stem.with_name(stem.name + ".nii.gz"))
        mask = read_nifti_mask(stem.with_name(stem.name + "-msk.nii.gz"), like=scan, threshold=127.5)
        volume = standardize(scan, config=VolumeConfig(), masks={"lungs": mask})
        voxel = np.prod(EXTENT_MM) / 128**3
        litres = volume.masks["lungs"].sum() * voxel / 1e6
        assert litres == pytest.approx(mask.sum() * np.prod(scan.spacing_mm) / 1e6, rel=0.01)
        back = to_scan_space(volume.masks["lungs"], volume.affine, scan.affine, scan.hu.shape) >= 0.5
        assert 2 * (back & mask).sum() / (back.sum() + mask.sum()) > 0.995
        found = lung_mask(scan.hu, scan.spacing_mm)
        assert 2 * (found & mask).sum() / (found.sum() + mask.sum()) > 0.92
        assert volume.cropped_lung_fraction == 0


def test_real_series_become_centred_standard_volumes(shared_data):
    for folder in ("lung-pet-ct-dx-siemens", "ricord1a-covid-ct-jpegll"):
        scan = read_dicom(shared_data / folder)
        volume = standardize(scan, config=VolumeConfig())
        z, y, x = 512 / 128, 334 / 128, 334 / 128
        lungs = lung_mask(volume.hu, (z, y, x))
        assert 2 < lungs.sum() * z * y * x / 1e6 < 7
        low, high = np.argwhere(lungs).min(0), np.argwhere(lungs).max(0)
        np.testing.assert_allclose((low + high) / 2, 63.5, atol=4)
        assert volume.hu.min() >= -1024
