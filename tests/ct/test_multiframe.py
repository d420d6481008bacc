"""Enhanced (multi-frame) CT gives the scan that its frames would give as single files, or a named refusal."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import dicom_edits as e
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
)

from capsfl.ct import errors
from capsfl.ct.dicom import ReaderConfig, read_dicom, read_series, scan_folder
from capsfl.ct.dicom_seg import Algorithm, write_dicom_seg

SHAPE = (6, 36, 40)  # JPEG 2000 needs 32 pixels a side
ORIGIN = np.array([-12.0, -9.0, 30.0])
ROW_MM, COLUMN_MM, STEP_MM = 2.0, 3.0, 5.0
REPEATED = (0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5)
FrameEdit = Callable[[int, Dataset], None]


def item(**elements) -> Sequence:
    """A functional group's sequence with its one item."""
    dataset = Dataset()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return Sequence([dataset])


@pytest.fixture(scope="module")
def write_enhanced(field):
    """Write an enhanced CT of the position field; frames in any order, groups edited at will."""

    def write(
        path: Path,
        *,
        planes=range(SHAPE[0]),
        edit_frame: FrameEdit = lambda index, group: None,
        edit: Callable[[FileDataset], None] = lambda dataset: None,
        compress: str | None = None,
    ) -> Path:
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, EnhancedCTImageStorage
        meta.MediaStorageSOPInstanceUID = UID("1.2.3.9")
        dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.SOPClassUID, dataset.SOPInstanceUID = EnhancedCTImageStorage, "1.2.3.9"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.PatientID = "1.2.3", "1.2.3.4", "Doe^SECRET"
        dataset.Modality, dataset.ImageType = "CT", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        dataset.Manufacturer, dataset.ManufacturerModelName = "ACME", "Scan 2"
        dataset.Rows, dataset.Columns, dataset.NumberOfFrames = SHAPE[1], SHAPE[2], len(planes)
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
        shared, frames, pixels = Dataset(), [], []
        shared.PlaneOrientationSequence = item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
        shared.PixelMeasuresSequence = item(PixelSpacing=[ROW_MM, COLUMN_MM], SliceThickness=99.0)
        shared.PixelValueTransformationSequence = item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
        shared.CTReconstructionSequence = item(ConvolutionKernel=["B", "40"])
        shared.CTXRayDetailsSequence = item(KVP=120.0)
        row, column = np.mgrid[: SHAPE[1], : SHAPE[2]]
        for index, plane in enumerate(planes):
            x, y, z = ORIGIN + np.array([0.0, 0.0, plane * STEP_MM])
            group = Dataset()
            group.PlanePositionSequence = item(ImagePositionPatient=[x, y, z])
            group.CTImageFrameTypeSequence = item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])
            group.FrameContentSequence = item(InStackPositionNumber=index + 1)
            hu = field(x + column * COLUMN_MM, y + row * ROW_MM, np.full(row.shape, z))
            edit_frame(index, group)
            own = group.get("PixelValueTransformationSequence", shared.PixelValueTransformationSequence)[0]
            pixels.append(np.rint((hu - float(own.RescaleIntercept)) / float(own.RescaleSlope)))
            frames.append(group)
        dataset.SharedFunctionalGroupsSequence = Sequence([shared])
        dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
        dataset.PixelData = np.stack(pixels).astype("<i2").tobytes()
        edit(dataset)
        if compress is not None:
            dataset.compress(compress, generate_instance_uid=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        pydicom.dcmwrite(path, dataset, enforce_file_format=True)
        return path

    return write


@pytest.fixture(scope="module")
def single(tmp_path_factory, write_series):
    """The same volume read from single-frame files."""
    folder = tmp_path_factory.mktemp("single")
    write_series(folder, shape=SHAPE)
    return read_dicom(folder)


def equal(scan, single) -> None:
    np.testing.assert_array_equal(scan.hu, single.hu)
    np.testing.assert_array_equal(scan.valid, single.valid)
    np.testing.assert_allclose(scan.affine, single.affine, atol=1e-9)


@pytest.mark.parametrize("planes", [range(6), range(5, -1, -1), (3, 0, 5, 1, 4, 2)])
@pytest.mark.parametrize("compress", [None, RLELossless, JPEG2000Lossless])
def test_frames_in_any_order_and_encoding_are_the_single_files(tmp_path, write_enhanced, single, planes, compress):
    if compress == JPEG2000Lossless:
        pytest.importorskip("openjpeg", reason="needs capsfl[dicom]")
    scan = read_dicom(write_enhanced(tmp_path / "scan.dcm", planes=planes, compress=compress))
    equal(scan, single)
    facts = (scan.source.manufacturer, scan.source.model, scan.source.kernel, scan.source.tube_voltage_kv)
    assert facts == ("ACME", "Scan 2", "B 40", 120.0)


def test_each_frame_s_own_group_goes_before_the_shared_one(tmp_path, write_enhanced, single):
    def edit(index, group):
        group.PixelValueTransformationSequence = item(RescaleSlope=0.5, RescaleIntercept=-100 * index)

    equal(read_dicom(write_enhanced(tmp_path / "scan.dcm", edit_frame=edit)), single)


def test_frames_that_lie_otherwise_than_the_shared_group_says_are_oriented(tmp_path, write_enhanced):
    # All frames turned by half a turn about z: the same pixels, seen from the other side of both axes.
    def turned(dataset):
        dataset.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence = item(
            ImageOrientationPatient=[-1, 0, 0, 0, -1, 0]
        )

    straight = read_dicom(write_enhanced(tmp_path / "a" / "scan.dcm"))
    scan = read_dicom(write_enhanced(tmp_path / "b" / "scan.dcm", edit=turned))
    np.testing.assert_array_equal(scan.hu, straight.hu[:, ::-1, ::-1])


def test_padding_of_a_multi_frame_file_is_masked(tmp_path, write_enhanced):
    def pad(dataset):
        stored = np.frombuffer(dataset.PixelData, "<i2").reshape(SHAPE).copy()
        stored[:, 0, :3] = 24  # -1000 HU: only the declaration betrays it
        dataset.PixelData, dataset.PixelPaddingValue = stored.tobytes(), 24

    scan = read_dicom(write_enhanced(tmp_path / "scan.dcm", edit=pad))
    assert not scan.valid[:, 0, :3].any()
    assert scan.valid.sum() == np.prod(SHAPE) - 18


def test_several_stacks_are_listed_and_selectable(tmp_path, write_enhanced, single):
    def stacks(index, group):
        group.FrameContentSequence[0].StackID = "lung" if index < 6 else "soft"
        if index >= 6:
            group.PixelValueTransformationSequence = item(RescaleSlope=1, RescaleIntercept=-1000)

    path = write_enhanced(tmp_path / "scan.dcm", planes=REPEATED, edit_frame=stacks)
    with pytest.raises(errors.SeveralSeries, match=r"2 series.*stack lung.*stack soft"):
        read_dicom(path)
    for number in ("1", "2"):
        equal(read_dicom(path, series=number), single)
    assert [one.slices[0].stack for one in scan_folder(tmp_path).accepted] == ["lung", "soft"]


def test_phases_are_told_apart_by_their_temporal_index_and_refused_without(tmp_path, write_enhanced):
    def phases(index, group):
        group.FrameContentSequence[0].TemporalPositionIndex = 1 + index // 6

    def differ(dataset):
        stored = np.frombuffer(dataset.PixelData, "<i2").copy()
        stored[stored.size // 2 :] += 7
        dataset.PixelData = stored.tobytes()

    with pytest.raises(errors.SeveralSeries):
        read_dicom(write_enhanced(tmp_path / "a.dcm", planes=REPEATED, edit_frame=phases, edit=differ))
    with pytest.raises(errors.DuplicatePositions, match=r"frame 1 and .*frame 7"):
        read_dicom(write_enhanced(tmp_path / "b.dcm", planes=REPEATED, edit=differ))
    assert read_dicom(write_enhanced(tmp_path / "c.dcm", planes=REPEATED)).source.dropped_duplicates == 6


def test_a_series_in_several_multi_frame_files_is_one_volume(tmp_path, write_enhanced, single):
    write_enhanced(tmp_path / "2.dcm", planes=range(3))
    write_enhanced(tmp_path / "1.dcm", planes=range(3, 6))
    equal(read_dicom(tmp_path), single)


def test_a_converted_series_keeps_its_rescale_at_the_top(tmp_path, write_enhanced, single):
    def legacy(dataset):
        dataset.SOPClassUID = LegacyConvertedEnhancedCTImageStorage
        dataset.file_meta.MediaStorageSOPClassUID = LegacyConvertedEnhancedCTImageStorage
        del dataset.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024

    equal(read_dicom(write_enhanced(tmp_path / "scan.dcm", edit=legacy)), single)


def test_missing_frames_are_missing_slices(tmp_path, write_enhanced, single):
    path = write_enhanced(tmp_path / "scan.dcm", planes=(0, 1, 3, 4, 5))
    with pytest.raises(errors.MissingSlices, match=r"at 40\.00 mm.*frame 2 and scan\.dcm frame 3"):
        read_dicom(path)
    scan = read_dicom(path, config=ReaderConfig(allow_interpolation=True))
    np.testing.assert_allclose(scan.hu, single.hu, atol=1e-3)


def without(keyword):
    return lambda dataset: delattr(dataset.SharedFunctionalGroupsSequence[0], keyword)


def lose_a_position(index, group):
    if index == 2:
        del group.PlanePositionSequence


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"edit": lambda ds: delattr(ds, "PerFrameFunctionalGroupsSequence")}, errors.UnsupportedMultiframe, "0 func"),
        (
            {"edit": lambda ds: ds.PerFrameFunctionalGroupsSequence.pop()},
            errors.UnsupportedMultiframe,
            "6 frames and 5",
        ),
        ({"edit": lambda ds: setattr(ds, "NumberOfFrames", 10**9)}, errors.UnsupportedMultiframe, "1e\\+09 frames"),
        ({"edit": without("PixelMeasuresSequence")}, errors.InconsistentGeometry, "frame 1: .*absent"),
        ({"edit": without("PixelValueTransformationSequence")}, errors.MissingRescale, "frame 1: "),
        ({"edit_frame": lose_a_position}, errors.InconsistentGeometry, "frame 3: .*absent"),
        ({"edit": lambda ds: setattr(ds, "PixelData", ds.PixelData[:-200])}, errors.CorruptFile, "describes 17280"),
        ({"edit": lambda ds: setattr(ds, "PhotometricInterpretation", "RGB")}, errors.UnsupportedColor, "colour"),
        (
            {"edit": lambda ds: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])},
            errors.NoSeries,
            "locali",
        ),
        ({"planes": range(3)}, errors.TooFewSlices, "at least 4"),
    ],
)
def test_what_the_groups_do_not_say_is_refused_by_name(tmp_path, write_enhanced, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        read_dicom(write_enhanced(tmp_path / "scan.dcm", **changes))
    assert "\n" not in str(caught.value)


def test_frames_are_read_one_at_a_time(tmp_path):
    e.enhanced(tmp_path, count=100)
    read_dicom(tmp_path)  # imports and caches
    tracemalloc.start()
    try:
        scan = read_dicom(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert scan.hu.shape[0] == 100
    assert peak < 1.2 * (scan.hu.nbytes + scan.valid.nbytes)


def test_a_frame_type_makes_a_localizer_too(tmp_path, write_enhanced):
    def scout(index, group):
        group.CTImageFrameTypeSequence[0].FrameType = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]

    with pytest.raises(errors.NoSeries, match="1 x localizer"):
        read_dicom(write_enhanced(tmp_path / "scan.dcm", edit_frame=scout))


@pytest.mark.parametrize("name", ["rtdose.dcm", "SC_rgb_rle_2frame.dcm", "liver_1frame.dcm"])
def test_foreign_multi_frame_files_are_no_ct(name):
    path = get_testdata_file(name, download=False)
    assert path is not None
    with pytest.raises(errors.NoSeries, match="not CT"):
        read_dicom(Path(str(path)))


def test_a_mask_becomes_a_seg_that_refers_to_the_frames(tmp_path, write_enhanced):
    pytest.importorskip("highdicom", reason="the extra `seg` is not installed")

    def edit(dataset):
        dataset.FrameOfReferenceUID = "1.2.3.8"

    path = write_enhanced(tmp_path / "scan.dcm", planes=(3, 0, 5, 1, 4, 2), edit=edit)
    (series,) = scan_folder(path).series
    scan = read_series(series)
    mask = np.zeros(scan.hu.shape, bool)
    mask[2, 5, 7] = mask[5, 30, 1] = True
    by = Algorithm("capsfl segcaps", "0.1.0", "ab" * 32)
    write_dicom_seg(tmp_path / "mask.dcm", mask, scan, series.slices, target="lesion", algorithm=by)
    seg = pydicom.dcmread(tmp_path / "mask.dcm")
    found = {}
    for frame, groups in zip(seg.pixel_array, seg.PerFrameFunctionalGroupsSequence, strict=True):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        assert source.ReferencedSOPInstanceUID == "1.2.3.9"
        z = groups.PlanePositionSequence[0].ImagePositionPatient[2]
        found[source.ReferencedFrameNumber] = (float(z), np.argwhere(frame).tolist())
    assert found == {6: (40.0, [[5, 7]]), 3: (55.0, [[30, 1]])}
