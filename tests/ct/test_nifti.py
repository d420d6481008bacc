"""Reading NIfTI: orientation, padding, and refusals of what is not a CT volume in Hounsfield units."""

import itertools

import nibabel
import numpy as np
import pytest

from capsfl.ct import errors
from capsfl.ct.nifti import read_nifti, read_nifti_mask


def save(path, values, affine, dtype=np.float32, codes=1):
    image = nibabel.Nifti1Image(np.asarray(values, dtype), affine)
    image.set_sform(affine, code=codes)
    image.set_qform(affine, code=codes)
    nibabel.save(image, path)
    return path


def ras_volume(axes: str, field, shape=(7, 8, 9)):
    """The position field sampled on a grid whose axes point to the named RAS directions."""
    affine = np.eye(4)
    right, anterior, superior = np.eye(3)
    columns = {"R": right, "L": -right, "A": anterior, "P": -anterior, "S": superior, "I": -superior}
    for axis, (name, spacing) in enumerate(zip(axes, (2.0, 3.0, 5.0), strict=True)):
        affine[:3, axis] = columns[name] * spacing
    affine[:3, 3] = (11.0, -7.0, 4.0)
    i, j, k = np.indices(shape)
    ras = np.einsum("ab,bijk->aijk", affine[:3, :3], np.stack([i, j, k])) + affine[:3, 3][:, None, None, None]
    return field(-ras[0], -ras[1], ras[2]) - 800, affine


@pytest.mark.parametrize("axes", ["LAS", "RAS", "LPS", "PIR", "SLA", "ASR"])
def test_every_orientation_ends_in_patient_axes(tmp_path, field, axes):
    values, affine = ras_volume(axes, field)
    scan = read_nifti(save(tmp_path / "scan.nii.gz", values, affine))
    directions = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
    np.testing.assert_allclose(directions, [[0, 0, 1], [0, 1, 0], [1, 0, 0]], atol=1e-6)
    index = np.indices(scan.hu.shape).reshape(3, -1)
    x, y, z, _ = scan.affine @ np.vstack([index, np.ones(index.shape[1])])
    np.testing.assert_array_equal(scan.hu.ravel(), field(x, y, z) - 800)
    np.testing.assert_array_equal(scan.source.to_series(scan.hu).transpose(2, 1, 0), values)


def test_padding_and_not_a_number_become_invalid_air(tmp_path):
    values = np.full((6, 6, 6), -900.0)
    values[0, 0, 0], values[1, 0, 0] = -3024.0, np.nan
    scan = read_nifti(save(tmp_path / "scan.nii.gz", values, np.eye(4)))
    assert (~scan.valid).sum() == 2
    assert (scan.hu[~scan.valid] == -1000).all()


def test_scaled_integers_are_unscaled(tmp_path):
    image = nibabel.Nifti1Image(np.full((5, 5, 5), 100, np.int16), np.eye(4))
    image.header.set_slope_inter(2.0, -1200.0)
    nibabel.save(image, tmp_path / "scan.nii")
    raw = bytearray((tmp_path / "scan.nii").read_bytes())
    raw[-250:] = np.full(125, 100, "<i2").tobytes()
    (tmp_path / "scan.nii").write_bytes(bytes(raw))
    assert (read_nifti(tmp_path / "scan.nii").hu == -1000).all()


@pytest.mark.parametrize(
    ("values", "codes", "message"),
    [
        (np.linspace(0, 255, 1000).reshape(10, 10, 10), 1, "not Hounsfield units"),
        (np.full((5, 5, 5), np.nan), 1, "not Hounsfield units"),
        (np.full((5, 5), -900.0), 1, "shape"),
        (np.full((5, 5, 5, 2), -900.0), 1, "shape"),
        (np.full((5, 5, 5), -900.0), 0, "left and right are unknown"),
    ],
)
def test_what_is_no_ct_volume_is_refused(tmp_path, values, codes, message):
    path = save(tmp_path / "scan.nii.gz", values, np.eye(4), codes=codes)
    with pytest.raises(errors.WrongFormat, match=message) as caught:
        read_nifti(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_sheared_axes_are_refused(tmp_path):
    affine = np.eye(4)
    affine[2, 1] = 0.2
    image = nibabel.Nifti1Image(np.full((5, 5, 5), -900, np.float32), affine)
    image.set_sform(affine, code=1)
    nibabel.save(image, tmp_path / "scan.nii")
    with pytest.raises(errors.InconsistentGeometry, match="sheared"):
        read_nifti(tmp_path / "scan.nii")


def test_broken_and_absent_files_are_named(tmp_path):
    path = save(tmp_path / "scan.nii.gz", np.random.default_rng(0).normal(-900, 9, (20, 20, 20)), np.eye(4))
    content = path.read_bytes()
    for keep in (len(content) // 2, 100, 0):
        path.write_bytes(content[:keep])
        with pytest.raises((errors.WrongFormat, errors.CorruptFile), match=r"scan\.nii\.gz"):
            read_nifti(path)
    path.write_bytes(b"no NIfTI at all" * 100)
    with pytest.raises(errors.WrongFormat, match="not a readable NIfTI"):
        read_nifti(path)
    with pytest.raises(errors.WrongFormat, match="no such file"):
        read_nifti(tmp_path / "absent.nii.gz")


def test_a_mask_is_cut_at_its_threshold_on_the_scan_s_grid(tmp_path, field):
    values, affine = ras_volume("LAS", field)
    scan = read_nifti(save(tmp_path / "scan.nii.gz", values, affine))
    ringing = np.zeros(values.shape)
    ringing[2:5, 3, 4] = (127.0, 127.5, 300.0)
    mask = read_nifti_mask(save(tmp_path / "mask.nii.gz", ringing, affine), like=scan, threshold=127.5)
    assert mask.dtype == bool
    np.testing.assert_array_equal(scan.source.to_series(mask).transpose(2, 1, 0), ringing >= 127.5)
    # The same mask stored with other axes is the same mask.
    turned = ringing[::-1].transpose(2, 0, 1)
    flip = np.eye(4)
    flip[0, 0], flip[0, 3] = -1, ringing.shape[0] - 1
    axes = np.eye(4)[:, [2, 0, 1, 3]]
    other = save(tmp_path / "turned.nii.gz", turned, affine @ flip @ axes)
    np.testing.assert_array_equal(read_nifti_mask(other, like=scan, threshold=127.5), mask)


def test_a_mask_of_another_grid_is_refused(tmp_path, field):
    values, affine = ras_volume("LAS", field)
    scan = read_nifti(save(tmp_path / "scan.nii.gz", values, affine))
    with pytest.raises(errors.InconsistentGeometry, match="mask of shape"):
        read_nifti_mask(save(tmp_path / "a.nii.gz", np.zeros((3, 4, 5)), affine), like=scan)
    for axis, amount in itertools.product(range(3), (0.5, 40.0)):
        moved = affine.copy()
        moved[axis, 3] += amount
        path = save(tmp_path / "b.nii.gz", np.zeros(values.shape), moved)
        with pytest.raises(errors.InconsistentGeometry, match="beside its scan"):
            read_nifti_mask(path, like=scan)


def test_real_chest_scans_and_their_masks_fit(shared_data):
    for number in (1, 2, 3):
        stem = shared_data / "lung-masks-3d" / f"id00{number}-128x128x64"
        scan = read_nifti(stem.with_name(stem.name + ".nii.gz"))
        mask = read_nifti_mask(stem.with_name(stem.name + "-msk.nii.gz"), like=scan, threshold=127.5)
        assert scan.hu.shape == mask.shape == (64, 128, 128)
        assert 0.7 < scan.valid.mean() < 0.9  # padding fills the corners outside the scanner's circle
        assert -900 < np.median(scan.hu[mask]) < -700
        litres = mask.sum() * np.prod(scan.spacing_mm) / 1e6
        assert 2 < litres < 8
