"""Real chest series against SimpleITK: the body lies where it should, in its Hounsfield units, padding or not."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from capsfl.ct.dicom import read_dicom
from capsfl.ct.normalize import VolumeConfig, standardize
from capsfl.ct.scan import Scan

BODY_HU = -300.0
MUSCLES_MM = {
    # Shoulder muscles by eye on the pictures: (x, y, z) LPS.
    "lung-pet-ct-dx-siemens": (-145.0, -75.0, 200.0),
    "ricord1a-covid-ct-jpegll": (140.0, 70.0, 138.25),
}
EVERY = {"lung-pet-ct-dx-siemens": 1, "ricord1a-covid-ct-jpegll": 2}
"""Every slice or every other: half the time, and the same geometry."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """One series, read by us and by SimpleITK."""

    name: str
    scan: Scan
    image: Any
    """SimpleITK image, int16 or int32 HU."""


@pytest.fixture(scope="module", params=MUSCLES_MM)
def pair(request, shared_data: Path) -> Pair:
    """The Siemens and the RICORD series."""
    sitk = pytest.importorskip("SimpleITK", reason="pip install 'capsfl[test]'")
    folder = shared_data / request.param
    reader = sitk.ImageSeriesReader()
    names = reader.GetGDCMSeriesFileNames(str(folder))[1 :: EVERY[request.param]]
    reader.SetFileNames(names)
    return Pair(request.param, read_dicom(Path(name) for name in names), sitk.DICOMOrient(reader.Execute(), "LPS"))


def test_every_voxel_has_the_value_that_simpleitk_reads(pair):
    import SimpleITK as sitk

    theirs = sitk.GetArrayFromImage(pair.image)
    np.testing.assert_array_equal(pair.scan.hu[pair.scan.valid], theirs[pair.scan.valid])
    assert (theirs[~pair.scan.valid] < -1500).all()


def test_centroid_and_extent_of_the_body_are_those_of_simpleitk(pair):
    import SimpleITK as sitk

    components = sitk.RelabelComponent(sitk.ConnectedComponent(pair.image > BODY_HU))
    statistics: Any = sitk.LabelShapeStatisticsImageFilter()
    statistics.Execute(components == 1)
    box = np.array(statistics.GetBoundingBox(1), int)
    first, last = box[:3], box[:3] + box[3:] - 1
    theirs = [pair.image.TransformIndexToPhysicalPoint(corner.tolist()) for corner in (first, last)]

    found: Any = ndimage.label(pair.scan.hu > BODY_HU)
    labels = found[0]
    body = np.argwhere(labels == np.bincount(labels.ravel())[1:].argmax() + 1)
    to_mm = pair.scan.affine
    ours = [to_mm[:3, :3] @ corner + to_mm[:3, 3] for corner in (body.min(axis=0), body.max(axis=0))]
    centroid = to_mm[:3, :3] @ body.mean(axis=0) + to_mm[:3, 3]
    np.testing.assert_allclose(centroid, statistics.GetCentroid(1), atol=0.5)
    np.testing.assert_allclose(ours, theirs, atol=0.5)
    assert len(body) * np.prod(pair.scan.spacing_mm) == pytest.approx(statistics.GetPhysicalSize(1), rel=1e-4)


def test_air_and_muscle_have_their_hounsfield_units(pair):
    x, y, z = MUSCLES_MM[pair.name]
    k, j, i, _ = np.linalg.inv(pair.scan.affine) @ np.array([x, y, z, 1.0])
    rows, columns = np.indices(pair.scan.hu.shape[1:])
    disc = ((rows - j) * pair.scan.spacing_mm[1]) ** 2 + ((columns - i) * pair.scan.spacing_mm[2]) ** 2 < 6.0**2
    assert pair.scan.hu[round(k)][disc].mean() == pytest.approx(40, abs=30)
    # Air in front of the body, well away from it and from what was never measured.
    hu, valid = pair.scan.hu[::4], pair.scan.valid[::4]
    square = np.ones((1, 3, 3))
    body = np.asarray(ndimage.binary_dilation(hu > -800, square, iterations=8))
    measured = np.asarray(ndimage.binary_erosion(valid, square, iterations=8))
    air = hu[(np.cumsum(body, axis=1) == 0) & measured]
    assert air.size > 10_000
    assert air.mean() == pytest.approx(-1000, abs=15)


def test_padding_leaves_no_trace_in_the_resampled_body(pair):
    import SimpleITK as sitk

    # The same scan by another road: SimpleITK's values, in which the padding was replaced by air by hand.
    theirs = sitk.GetArrayFromImage(pair.image).astype(np.float32)
    clean = dataclasses.replace(pair.scan, hu=np.where(theirs < -1500, np.float32(-1000), theirs))
    config = VolumeConfig(preset="tiny")
    np.testing.assert_array_equal(standardize(pair.scan, config=config).hu, standardize(clean, config=config).hu)
    # And had it stayed, it would show: the fixture is able to tell.
    if not pair.scan.valid.all():
        raw = dataclasses.replace(pair.scan, hu=theirs)
        assert np.abs(standardize(raw, config=config).hu - standardize(clean, config=config).hu).max() > 20
