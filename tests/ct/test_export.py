"""Exports: in the series' own geometry, readable by others, whole or not at all."""

import nibabel
import numpy as np
import pydicom
import pytest
from matplotlib import image as picture
from matplotlib.axes import Axes

from capsfl.ct import export
from capsfl.ct.dicom import read_dicom
from capsfl.ct.errors import StorageError
from capsfl.ct.export import write_nifti_mask, write_overlay_png
from capsfl.ct.nifti import read_nifti, read_nifti_mask
from capsfl.ct.normalize import VolumeConfig, standardize, to_scan_space

SAGITTAL = (0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
PRONE = (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0)


def load(path):
    """The file through nibabel alone."""
    return nibabel.Nifti1Image.from_filename(path)


@pytest.mark.parametrize("orientation", [(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), PRONE, SAGITTAL])
def test_a_mask_lies_where_the_dicom_slices_say(tmp_path, write_series, orientation):
    files = write_series(tmp_path / "series", orientation=orientation)
    scan = read_dicom(tmp_path / "series")
    mask = np.zeros(scan.hu.shape, bool)
    mask[1, 2, 3] = mask[4, 5, 5] = True
    write_nifti_mask(tmp_path / "mask.nii.gz", mask, scan)
    image = load(tmp_path / "mask.nii.gz")
    stored = np.asarray(image.dataobj)
    assert stored.dtype == np.uint8
    assert stored.shape == (8, 10, 6)  # columns, rows, slices of the series, not of the patient's axes
    assert image.header["sform_code"] == image.header["qform_code"] == 1
    np.testing.assert_allclose(np.asarray(image.get_qform()), np.asarray(image.get_sform()), atol=1e-4)
    # Independent of the scan's affine: pixel to patient by each file's own tags (DICOM C.7.6.2.1.1).
    marked = scan.affine @ [1, 2, 3, 1], scan.affine @ [4, 5, 5, 1]
    expected = {tuple(np.round(point, 3)) for point in marked}
    found = set()
    for i, j, k in np.argwhere(stored):
        ras = np.asarray(image.affine) @ [i, j, k, 1]
        lps = np.array([-ras[0], -ras[1], ras[2], 1.0])
        assert tuple(np.round(lps, 3)) in expected
        for file in files:
            dataset = pydicom.dcmread(file)
            corner = np.array(dataset.ImagePositionPatient, float)
            row, column = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
            point = corner + row * dataset.PixelSpacing[1] * i + column * dataset.PixelSpacing[0] * j
            if np.allclose(point, lps[:3], atol=1e-3):
                found.add((i, j, k))
    assert len(found) == 2


def test_a_mask_read_back_is_the_same(tmp_path, write_series):
    write_series(tmp_path / "series", orientation=SAGITTAL)
    scan = read_dicom(tmp_path / "series")
    mask = np.random.default_rng(0).random(scan.hu.shape) > 0.5
    write_nifti_mask(tmp_path / "mask.nii", mask, scan)
    np.testing.assert_array_equal(read_nifti_mask(tmp_path / "mask.nii", like=scan), mask)


def test_probabilities_stay_real_numbers(tmp_path, write_series):
    write_series(tmp_path / "series")
    scan = read_dicom(tmp_path / "series")
    probability = np.random.default_rng(0).random(scan.hu.shape)
    write_nifti_mask(tmp_path / "p.nii.gz", probability, scan)
    stored = np.asarray(load(tmp_path / "p.nii.gz").dataobj)
    assert stored.dtype == np.float32
    np.testing.assert_allclose(stored.transpose(2, 1, 0), probability, atol=1e-6)


def test_a_prediction_on_a_nifti_returns_to_its_own_grid(tmp_path, shared_data):
    path = shared_data / "lung-masks-3d" / "id001-128x128x64.nii.gz"
    scan = read_nifti(path)
    mask = read_nifti_mask(path.with_name("id001-128x128x64-msk.nii.gz"), like=scan, threshold=127.5)
    volume = standardize(scan, config=VolumeConfig(), masks={"lungs": mask})
    back = to_scan_space(volume.masks["lungs"], volume.affine, scan.affine, scan.hu.shape) >= 0.5
    write_nifti_mask(tmp_path / "lungs.nii.gz", back, scan)
    original, exported = load(path), load(tmp_path / "lungs.nii.gz")
    assert exported.shape == original.shape
    np.testing.assert_allclose(np.asarray(exported.affine), np.asarray(original.affine), atol=1e-4)
    reference = np.asarray(load(path.with_name("id001-128x128x64-msk.nii.gz")).dataobj) >= 127.5
    stored = np.asarray(exported.dataobj) > 0
    assert 2 * (stored & reference).sum() / (stored.sum() + reference.sum()) > 0.995


def test_the_overlay_shows_the_outline_where_the_mask_is(tmp_path, write_series):
    write_series(tmp_path / "series", shape=(12, 40, 40), pixel_spacing=(5.0, 5.0))
    scan = read_dicom(tmp_path / "series")
    mask = np.zeros(scan.hu.shape, bool)
    mask[4:8, 12:25, 15:30] = True
    write_overlay_png(tmp_path / "with.png", scan, mask)
    write_overlay_png(tmp_path / "without.png", scan, np.zeros_like(mask))
    red = []
    for name in ("with.png", "without.png"):
        pixels = picture.imread(tmp_path / name)
        red.append(int(((pixels[..., 0] - pixels[..., 1]) > 0.3).sum()))
    assert red[0] > 500
    assert red[1] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["series", "with.png", "without.png"]


def test_the_overlay_draws_the_border_of_what_was_looked_at_where_it_lies_within_the_scan(
    tmp_path, write_series, monkeypatch
):
    write_series(tmp_path / "series", shape=(12, 40, 40), pixel_spacing=(5.0, 5.0))
    scan = read_dicom(tmp_path / "series")
    drawn: dict[int, set[tuple[tuple[float, ...], tuple[float, ...]]]] = {}

    def plot(panel, x, y, **_):
        row = panel.get_subplotspec().rowspan.start
        drawn.setdefault(row, set()).add((tuple(map(float, x)), tuple(map(float, y))))

    monkeypatch.setattr(Axes, "plot", plot)
    monkeypatch.setattr(export, "write_atomically", lambda path, write: None)
    axial, coronal, sagittal = range(3)
    beyond = np.array([[-3.0, -4.0, -7.0], [14.0, 44.0, 50.0]])
    for field in (None, beyond):
        write_overlay_png(tmp_path / "a.png", scan, np.zeros(scan.hu.shape, bool), field=field)
    assert drawn == {}
    field = np.array([[2.0, 9.5, -7.0], [14.0, 30.5, 25.5]])
    write_overlay_png(tmp_path / "a.png", scan, np.zeros(scan.hu.shape, bool), field=field)
    assert drawn[axial] == {
        ((0.0, 25.5), (9.5, 9.5)),
        ((0.0, 25.5), (30.5, 30.5)),
        ((25.5, 25.5), (9.5, 30.5)),
    }
    # Slice 2 of 12 from the feet is the tenth row from the top.
    assert drawn[coronal] == {((0.0, 25.5), (9.0, 9.0)), ((25.5, 25.5), (0.0, 9.0))}
    assert drawn[sagittal] == {((9.5, 30.5), (9.0, 9.0)), ((9.5, 9.5), (0.0, 9.0)), ((30.5, 30.5), (0.0, 9.0))}


def test_wrong_shapes_and_names_are_refused(tmp_path, write_series):
    write_series(tmp_path / "series")
    scan = read_dicom(tmp_path / "series")
    mask = np.zeros(scan.hu.shape, bool)
    with pytest.raises(ValueError, match="mask: shape"):
        write_nifti_mask(tmp_path / "a.nii", mask[1:], scan)
    with pytest.raises(ValueError, match="mask: shape"):
        write_overlay_png(tmp_path / "a.png", scan, mask[1:])
    with pytest.raises(ValueError, match=r"end it in \.nii"):
        write_nifti_mask(tmp_path / "a.mha", mask, scan)
    with pytest.raises(ValueError, match=r"end it in \.png"):
        write_overlay_png(tmp_path / "a.jpg", scan, mask)


def test_an_unwritable_place_is_named_and_nothing_is_left(tmp_path, write_series):
    write_series(tmp_path / "series")
    scan = read_dicom(tmp_path / "series")
    mask = np.zeros(scan.hu.shape, bool)
    for write in (
        lambda place: write_nifti_mask(place / "a.nii.gz", mask, scan),
        lambda place: write_overlay_png(place / "a.png", scan, mask),
    ):
        with pytest.raises(StorageError, match="cannot be written"):
            write(tmp_path / "absent")
        (tmp_path / "taken" / "a.nii.gz").mkdir(parents=True, exist_ok=True)
        (tmp_path / "taken" / "a.png").mkdir(parents=True, exist_ok=True)
        with pytest.raises(StorageError, match="cannot be written"):
            write(tmp_path / "taken")
        assert sorted(path.name for path in (tmp_path / "taken").iterdir()) == ["a.nii.gz", "a.png"]


@pytest.mark.parametrize("orientation", [(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), SAGITTAL])
def test_a_mask_predicted_in_standard_space_returns_to_within_half_a_voxel(tmp_path, write_series, orientation):
    """An ellipsoid marked on the standard grid, exported, and measured against the ellipsoid itself in mm."""
    write_series(
        tmp_path / "series", shape=(40, 64, 60), orientation=orientation, origin=(-90.0, 60.0, -80.0),
        pixel_spacing=(2.1, 2.3),
    )  # fmt: skip
    scan = read_dicom(tmp_path / "series")
    volume = standardize(scan, config=VolumeConfig(center="volume"))
    middle = (scan.affine @ [*(np.array(scan.hu.shape) - 1) / 2, 1])[:3] + np.array([3.3, -2.7, 4.1])
    radii = np.array([31.0, 38.0, 35.0])

    def depth(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """About how many mm a voxel lies inside the ellipsoid."""
        index = np.moveaxis(np.indices(shape), 0, -1)
        points = index @ affine[:3, :3].T + affine[:3, 3]
        return (1 - np.linalg.norm((points - middle) / radii, axis=-1)) * radii.min()

    marked = (depth(volume.affine, volume.hu.shape) > 0).astype(np.float32)
    back = to_scan_space(marked, volume.affine, scan.affine, scan.hu.shape) >= 0.5
    write_nifti_mask(tmp_path / "mask.nii.gz", back, scan)
    stored = read_nifti_mask(tmp_path / "mask.nii.gz", like=scan)
    inside = depth(scan.affine, scan.hu.shape)
    # The largest side of a voxel, of the standard grid or the scan's own, whichever is coarser.
    half = max(*volume.spacing_mm, *scan.spacing_mm) / 2
    assert stored[inside > half].all()
    assert not stored[inside < -half].any()
    centre = np.argwhere(stored).mean(axis=0) @ scan.affine[:3, :3].T + scan.affine[:3, 3]
    np.testing.assert_allclose(centre, middle, atol=0.15 * half)
