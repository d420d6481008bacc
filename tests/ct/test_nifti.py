"""Reading NIfTI: orientation, padding, and refusals of what is not a CT volume in Hounsfield units."""

import gzip
import itertools
import tracemalloc

import nibabel
import numpy as np
import pytest

from capsfl.ct import errors
from capsfl.ct.nifti import read_nifti, read_nifti_mask
from capsfl.ct.reader import ReaderConfig


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
    return field(-ras[0], -ras[1], ras[2]) - 200, affine


@pytest.mark.parametrize("axes", ["LAS", "RAS", "LPS", "PIR", "SLA", "ASR"])
def test_every_orientation_ends_in_patient_axes(tmp_path, field, axes):
    values, affine = ras_volume(axes, field)
    scan = read_nifti(save(tmp_path / "scan.nii.gz", values, affine))
    directions = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
    np.testing.assert_allclose(directions, [[0, 0, 1], [0, 1, 0], [1, 0, 0]], atol=1e-6)
    index = np.indices(scan.hu.shape).reshape(3, -1)
    x, y, z, _ = scan.affine @ np.vstack([index, np.ones(index.shape[1])])
    np.testing.assert_array_equal(scan.hu.ravel(), field(x, y, z) - 200)
    np.testing.assert_array_equal(scan.source.to_series(scan.hu).transpose(2, 1, 0), values)


def test_padding_and_not_a_number_become_invalid_air(tmp_path):
    values = np.full((6, 6, 6), -900.0)
    values[0, 0, 0], values[1, 0, 0] = -3024.0, np.nan
    scan = read_nifti(save(tmp_path / "scan.nii.gz", values, np.eye(4)))
    assert (~scan.valid).sum() == 2
    assert (scan.hu[~scan.valid] == -1000).all()


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_scaled_numbers_of_any_type_are_unscaled(tmp_path, dtype, name):
    stored = np.arange(120).reshape(4, 5, 6)
    raw = nibabel.Nifti1Image(np.zeros((4, 5, 6), dtype), np.eye(4), dtype=dtype).to_bytes()
    content = bytearray(raw[:352] + stored.astype(dtype).tobytes(order="F"))
    content[112:120] = np.array([2.0, -1100.0], "<f4").tobytes()  # scl_slope, scl_inter
    (tmp_path / name).write_bytes(gzip.compress(bytes(content)) if name.endswith("gz") else bytes(content))
    scan = read_nifti(tmp_path / name)
    np.testing.assert_array_equal(scan.source.to_series(scan.hu).transpose(2, 1, 0), stored * 2.0 - 1100)


def test_big_endian_and_version_two_files_are_read(tmp_path, field):
    values, affine = ras_volume("RAS", field)
    expected = read_nifti(save(tmp_path / "scan.nii.gz", values, affine)).hu
    nibabel.save(nibabel.Nifti2Image(values.astype(np.float32), affine), tmp_path / "two.nii.gz")
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(np.dtype(">f4"))
    nibabel.save(nibabel.Nifti1Image(values.astype(">f4"), affine, header), tmp_path / "big.nii")
    for name in ("two.nii.gz", "big.nii"):
        np.testing.assert_array_equal(read_nifti(tmp_path / name).hu, expected)


@pytest.mark.parametrize(("units", "factor"), [("unknown", 1.0), ("mm", 1.0), ("meter", 1000.0), ("micron", 0.001)])
def test_lengths_come_in_the_header_s_units(tmp_path, units, factor):
    image = nibabel.Nifti1Image(np.full((5, 6, 7), -900, np.int16), np.diag([2.0, 3.0, 4.0, 1.0]))
    image.header.set_xyzt_units(units)
    nibabel.save(image, tmp_path / "scan.nii")
    np.testing.assert_allclose(read_nifti(tmp_path / "scan.nii").spacing_mm, np.array([4.0, 3.0, 2.0]) * factor)


def forms(path, sform, sform_code, qform, qform_code):
    """A scan with two orientations."""
    image = nibabel.Nifti1Image(np.full((5, 6, 7), -900, np.float32), None)
    image.set_sform(sform, sform_code)
    image.set_qform(qform, qform_code)
    nibabel.save(image, path)
    return path


def test_the_scanner_s_orientation_counts_and_two_that_contradict_are_refused(tmp_path):
    own, atlas = np.diag([2.0, 3.0, 4.0, 1.0]), np.diag([-1.0, 1.0, 1.0, 1.0])
    spacings = {
        name: read_nifti(forms(tmp_path / f"{name}.nii", *given)).spacing_mm
        for name, given in {
            "sform alone": (own, 1, atlas, 0),
            "qform alone": (atlas, 0, own, 1),
            "qform of the scanner, sform of an atlas": (atlas, 4, own, 1),
            "sform of the scanner, qform aligned": (own, 1, atlas, 2),
        }.items()
    }
    assert set(spacings.values()) == {(4.0, 3.0, 2.0)}
    flipped = np.diag([-2.0, 3.0, 4.0, 1.0])
    with pytest.raises(errors.InconsistentGeometry, match=r"sform and qform put the scan up to 16\.0 mm apart"):
        read_nifti(forms(tmp_path / "both.nii", own, 1, flipped, 1))


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


def put(content: bytes, at: int, value: float, dtype: str) -> bytes:
    """A number of the header replaced."""
    number = np.array([value], dtype).tobytes()
    return content[:at] + number + content[at + len(number) :]


@pytest.mark.parametrize(
    ("at", "value", "dtype", "error", "message"),
    [
        (40, 0, "<i2", errors.WrongFormat, r"shape \(\)"),
        (40, 9, "<i2", errors.WrongFormat, r"shape \(\)"),
        (42, -6, "<i2", errors.WrongFormat, "shape"),
        (42, 32767, "<i2", errors.CorruptFile, "truncated"),
        (70, 128, "<i2", errors.WrongFormat, "no plain numbers"),
        (70, 32, "<i2", errors.WrongFormat, "complex64, no plain numbers"),
        (70, 999, "<i2", errors.WrongFormat, "unknown type"),
        (80, np.nan, "<f4", errors.InconsistentGeometry, "not finite"),
        (108, 1e30, "<f4", errors.WrongFormat, "start at byte"),
        (108, np.nan, "<f4", errors.WrongFormat, "start at byte"),
        (108, 12, "<f4", errors.WrongFormat, "start at byte"),
        (112, np.inf, "<f4", errors.WrongFormat, "scale"),
        (112, 1e30, "<f4", errors.WrongFormat, "not Hounsfield units"),
        (123, 77, "u1", errors.WrongFormat, "units"),
        (280, np.nan, "<f4", errors.InconsistentGeometry, "nan mm apart"),
        (344, 0, "<i4", errors.WrongFormat, "no NIfTI"),
        (0, 349, "<i4", errors.WrongFormat, "not a readable NIfTI"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_on_one_line(tmp_path, at, value, dtype, error, message):
    path = save(tmp_path / "scan.nii", np.full((6, 7, 8), -900.0), np.diag([2.0, 2.0, 2.0, 1.0]))
    content = put(path.read_bytes(), at, value, dtype)
    if at == 80:  # the pixel spacing counts where the orientation is a quaternion
        content = put(content, 254, 0, "<i2")
    path.write_bytes(content)
    with pytest.raises(error, match=message) as caught:
        read_nifti(path)
    assert str(caught.value).isprintable()


def peak_bytes(path) -> tuple[int, Exception]:
    """Memory that reading took at its highest, and the refusal."""
    tracemalloc.start()
    try:
        with pytest.raises(errors.ScanError) as caught:
            read_nifti(path)
        return tracemalloc.get_traced_memory()[1], caught.value
    finally:
        tracemalloc.stop()


def test_bombs_are_refused_in_bounded_memory(tmp_path):
    small = save(tmp_path / "small.nii", np.full((5, 5, 5), -900.0), np.eye(4)).read_bytes()
    bomb = tmp_path / "bomb.nii.gz"
    # More than the header says: 64 MB of zeros in 64 kB.
    bomb.write_bytes(gzip.compress(small + bytes(1 << 26), 1))
    memory, error = peak_bytes(bomb)
    assert isinstance(error, errors.CorruptFile)
    assert "more than its header says" in str(error)
    assert memory < 4 << 20
    # A header that says much: nothing is unpacked, nor allocated.
    for shape, expected in (((4096, 4096, 4096), errors.TooLarge), ((700, 700, 700), errors.CorruptFile)):
        header = small
        for axis, size in enumerate(shape):
            header = put(header, 42 + 2 * axis, size, "<i2")
        bomb.write_bytes(gzip.compress(header))
        memory, error = peak_bytes(bomb)
        assert type(error) is expected
        assert memory < 1 << 20
    # An extension without end.
    bomb.write_bytes(gzip.compress(put(put(small, 108, 1e9, "<f4"), 348, 1, "<i4") + bytes(1 << 24), 1))
    memory, error = peak_bytes(bomb)
    assert isinstance(error, errors.WrongFormat)
    assert memory < 1 << 20


def test_the_largest_scan_is_a_setting(tmp_path):
    path = save(tmp_path / "scan.nii", np.full((6, 7, 8), -900.0), np.eye(4))
    assert read_nifti(path, config=ReaderConfig(max_voxels=336)).hu.size == 336
    with pytest.raises(errors.TooLarge, match=r"6 x 7 x 8 voxels; raise reader\.max_voxels = 335"):
        read_nifti(path, config=ReaderConfig(max_voxels=335))


def test_one_flipped_byte_of_a_packed_scan_is_noticed(tmp_path):
    path = save(tmp_path / "scan.nii.gz", np.random.default_rng(0).normal(-900, 9, (9, 9, 9)), np.eye(4))
    content = path.read_bytes()
    for at in range(40, len(content), 61):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises((errors.WrongFormat, errors.CorruptFile, errors.TooLarge)):
            read_nifti(path)


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
