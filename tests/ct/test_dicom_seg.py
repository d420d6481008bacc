"""DICOM SEG: on the source slices, referring to them, by a named algorithm, and of a patient only if asked."""

import sys

import numpy as np
import pydicom
import pytest

from capsfl.ct.dicom import read_series, scan_folder
from capsfl.ct.dicom_seg import Algorithm, MissingHighdicom, SegError, write_dicom_seg
from capsfl.ct.reader import ReaderConfig

highdicom = pytest.importorskip("highdicom", reason="the extra `seg` is not installed")

SAGITTAL = (0.0, -1.0, 0.0, 0.0, 0.0, 1.0)
BY = Algorithm("capsfl segcaps", "0.1.0", "ab" * 32, {"model": "ab" * 32, "ledger_head": "cd" * 32})
PRIVATE = ("SECRET", "19510203", "ACC77", "Mercy")


def patient_of(index: int, dataset: pydicom.Dataset) -> None:
    """What a series of a hospital says about its patient."""
    dataset.FrameOfReferenceUID = "1.2.3.9"
    dataset.PatientBirthDate, dataset.PatientSex, dataset.AccessionNumber = "19510203", "F", "ACC77"
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20200401", "1200", "S1"
    dataset.ReferringPhysicianName, dataset.InstitutionName = "Mercy^Doc", "Mercy Hospital"


def read(folder, **reader):
    """The only series of a folder: its scan and its slices."""
    (series,) = scan_folder(folder, config=ReaderConfig(**reader)).series
    return read_series(series), series.slices


def tags(path, keyword):
    return {pydicom.dcmread(file)[keyword].value for file in path}


@pytest.fixture(scope="module", params=[(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), SAGITTAL], ids=["axial", "sagittal"])
def written(request, tmp_path_factory, write_series):
    """A series, a mask of its scan, and the SEG in which it was written."""
    folder = tmp_path_factory.mktemp("seg")
    files = write_series(folder / "series", orientation=request.param, edit=patient_of)
    scan, slices = read(folder / "series")
    mask = np.zeros(scan.hu.shape, bool)
    mask[1:3, 2:5, 3] = mask[4, 5, 5] = True
    path = folder / "mask.dcm"
    write_dicom_seg(path, mask, scan, slices, target="lesion", algorithm=BY)
    return files, scan, mask, path


def test_every_frame_lies_on_the_slice_it_refers_to(written):
    files, scan, mask, path = written
    sources = {dataset.SOPInstanceUID: dataset for dataset in map(pydicom.dcmread, files)}
    seg = pydicom.dcmread(path)
    stored = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    points, seen = set(), set()
    for frame, groups in zip(stored, seg.PerFrameFunctionalGroupsSequence, strict=True):
        (image,) = groups.DerivationImageSequence[0].SourceImageSequence
        source = sources[image.ReferencedSOPInstanceUID]
        corner = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        np.testing.assert_allclose(corner, np.array(source.ImagePositionPatient, float), atol=1e-3)
        seen.add(source.SOPInstanceUID)
        row, column = np.array(source.ImageOrientationPatient, float).reshape(2, 3)
        for r, c in np.argwhere(frame):
            point = corner + row * source.PixelSpacing[1] * c + column * source.PixelSpacing[0] * r
            points.add(tuple(np.round(point, 3) + 0.0))
    expected = {tuple(np.round(scan.affine @ [*voxel, 1], 3)[:3] + 0.0) for voxel in np.argwhere(mask)}
    assert points == expected
    assert len(seen) < len(files), "slices without a mark have no frame"
    referenced = seg.ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == "1.2.3.4"
    assert {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence} == sources.keys()
    assert (seg.StudyInstanceUID, seg.FrameOfReferenceUID) == ("1.2.3", "1.2.3.9")


def test_highdicom_reads_back_the_volume(written):
    _, scan, mask, path = written
    seg = highdicom.seg.segread(path)
    volume = seg.get_volume(combine_segments=True, allow_missing_positions=True)
    assert volume.array.sum() == mask.sum()
    np.testing.assert_allclose(sorted(volume.spacing), sorted(scan.spacing_mm), atol=1e-4)


def test_the_maker_stands_in_it(written):
    seg = pydicom.dcmread(written[-1])
    (segment,) = seg.SegmentSequence
    assert (seg.Modality, segment.SegmentLabel, segment.SegmentAlgorithmType) == ("SEG", "lesion", "AUTOMATIC")
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == "52988006"
    (algorithm,) = segment.SegmentationAlgorithmIdentificationSequence
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("capsfl segcaps", "0.1.0")
    assert algorithm.AlgorithmParameters == f"model={'ab' * 32},ledger_head={'cd' * 32}"
    assert seg.DeviceSerialNumber == "ab" * 32
    assert "not for clinical use" in seg.SeriesDescription
    assert "not for clinical use" in seg.ContentDescription


def test_it_names_nobody_by_default(written):
    _, scan, _, path = written
    content = path.read_bytes()
    assert not [word for word in PRIVATE if word.encode() in content]
    seg = pydicom.dcmread(path)
    assert seg.PatientID == seg.PatientName == scan.source.pseudonym
    assert seg.PatientIdentityRemoved == "YES"
    assert not seg.StudyDate
    assert not seg.get("InstitutionName")


def test_it_belongs_to_its_patient_where_that_is_asked_for(tmp_path, write_series):
    write_series(tmp_path / "series", edit=patient_of)
    scan, slices = read(tmp_path / "series")
    write_dicom_seg(
        tmp_path / "a.dcm", scan.hu > 0, scan, slices, target="gallstone", algorithm=BY, identified=True
    )  # fmt: skip
    seg = pydicom.dcmread(tmp_path / "a.dcm")
    assert (seg.PatientID, seg.PatientBirthDate, seg.AccessionNumber) == ("Doe^Jane^SECRET", "19510203", "ACC77")
    assert "PatientIdentityRemoved" not in seg
    assert b"Mercy Hospital" not in (tmp_path / "a.dcm").read_bytes(), "the institution is not the patient's"
    kind = seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0]
    assert (kind.CodingSchemeDesignator, kind.CodeMeaning) == ("99CAPSFL", "gallstone")


def test_an_empty_mask_is_a_seg_without_a_mark(tmp_path, write_series):
    write_series(tmp_path / "series", edit=patient_of)
    scan, slices = read(tmp_path / "series")
    write_dicom_seg(tmp_path / "a.dcm", np.zeros(scan.hu.shape, bool), scan, slices, target="lung", algorithm=BY)
    assert pydicom.dcmread(tmp_path / "a.dcm").pixel_array.sum() == 0


def crooked(index: int, dataset: pydicom.Dataset) -> None:
    """A slice whose position is noted up to 1.9 mm beside the others, less than the reader's pixel of tolerance."""
    patient_of(index, dataset)
    x, y, z = map(float, dataset.ImagePositionPatient)
    aside = (0.0, 1.7, -1.4, 1.9, -1.9, 0.0)[index], (0.0, -1.1, 1.8, 0.2, -1.8, 0.0)[index]
    dataset.ImagePositionPatient = [x + aside[0], y + aside[1], z]


def test_a_mask_of_an_untilted_series_is_written_as_it_is(tmp_path, write_series):
    """Positions that jump within the reader's tolerance, or drift by less than a tilt, move no pixel of the mask."""
    rng = np.random.default_rng(0)
    for name, given in {"jumps": {"edit": crooked}, "drifts": {"step": (0.0, 0.008, 5.0), "edit": patient_of}}.items():
        files = write_series(tmp_path / name, **given)
        scan, slices = read(tmp_path / name)
        assert scan.source.corrected_tilt_degrees == 0
        mask = rng.random(scan.hu.shape) > 0.6
        write_dicom_seg(tmp_path / f"{name}.dcm", mask, scan, slices, target="lesion", algorithm=BY)
        seg = pydicom.dcmread(tmp_path / f"{name}.dcm")
        numbers = {pydicom.dcmread(file).SOPInstanceUID: number for number, file in enumerate(files)}
        for frame, groups in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
            source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
            np.testing.assert_array_equal(frame, mask[numbers[source]])


def test_a_mask_of_a_tilted_series_is_moved_back_onto_its_slices(tmp_path, write_series):
    """The scan is sheared straight; in each source slice the mark lies shifted by the table's travel."""
    tilt = (0.0, 2.0, 5.0)  # one row of 2 mm from slice to slice
    files = write_series(tmp_path / "series", step=tilt, edit=patient_of)
    scan, slices = read(tmp_path / "series", allow_tilt_correction=True)
    mask = np.zeros(scan.hu.shape, bool)
    mask[:, scan.hu.shape[1] // 2, 3] = True
    write_dicom_seg(tmp_path / "a.dcm", mask, scan, slices, target="lesion", algorithm=BY)
    seg = pydicom.dcmread(tmp_path / "a.dcm")
    sources = {dataset.SOPInstanceUID: dataset for dataset in map(pydicom.dcmread, files)}
    expected = scan.affine @ [0, scan.hu.shape[1] // 2, 3, 1]
    found = 0
    for frame, groups in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        source = sources[groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        corner = np.array(source.ImagePositionPatient, float)
        for r, c in np.argwhere(frame):
            np.testing.assert_allclose(corner[0] + 3.0 * c, expected[0], atol=1e-3)
            assert abs(corner[1] + 2.0 * r - expected[1]) <= 1.0, "within half a row"
            found += 1
    assert found >= len(files) - 1


def test_what_no_seg_can_refer_to_is_refused_by_name(tmp_path, write_series):
    write_series(tmp_path / "series")
    scan, slices = read(tmp_path / "series")
    mask = np.ones(scan.hu.shape, bool)
    with pytest.raises(SegError, match="no FrameOfReferenceUID, to which a SEG refers; write NIfTI, or"):
        write_dicom_seg(tmp_path / "a.dcm", mask, scan, slices, target="lung", algorithm=BY)
    with pytest.raises(SegError, match="a NIfTI scan has no slices"):
        write_dicom_seg(tmp_path / "a.dcm", mask, scan, (), target="lung", algorithm=BY)
    write_series(tmp_path / "far", origin=(500.0, 0.0, 9000.0), edit=patient_of)
    (far,) = scan_folder(tmp_path / "far").series
    with pytest.raises(SegError, match="none of its slices lies in the scan"):
        write_dicom_seg(tmp_path / "a.dcm", mask, scan, far.slices, target="lung", algorithm=BY)
    with pytest.raises(ValueError, match=r"end it in \.dcm"):
        write_dicom_seg(tmp_path / "a.seg", mask, scan, slices, target="lung", algorithm=BY)
    with pytest.raises(ValueError, match="mask: shape"):
        write_dicom_seg(tmp_path / "a.dcm", mask[1:], scan, slices, target="lung", algorithm=BY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["far", "series"]


def test_a_missing_extra_is_told_by_the_command_that_installs_it(tmp_path, write_series, monkeypatch):
    write_series(tmp_path / "series", edit=patient_of)
    scan, slices = read(tmp_path / "series")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(MissingHighdicom, match=r"pip install 'capsfl\[seg\]'"):
        write_dicom_seg(tmp_path / "a.dcm", scan.hu > 0, scan, slices, target="lung", algorithm=BY)
