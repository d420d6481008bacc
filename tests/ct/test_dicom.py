"""Reading DICOM series: order, geometry, Hounsfield units, and every refusal by name."""

import dataclasses
import json
import logging
import pickle
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.encaps import encapsulate

from capsfl.ct import errors
from capsfl.ct.dicom import ReaderConfig, read_dicom, read_series, scan_folder

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
ORIENTATIONS = {
    "axial": AXIAL,
    "axial prone": (-1.0, 0.0, 0.0, 0.0, -1.0, 0.0),
    "axial feet up": (-1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    "coronal": (1.0, 0.0, 0.0, 0.0, 0.0, -1.0),
    "sagittal": (0.0, 1.0, 0.0, 0.0, 0.0, -1.0),
    "sagittal from below": (0.0, -1.0, 0.0, 0.0, 0.0, 1.0),
}


def points(scan):
    """LPS mm (x, y, z) of every voxel."""
    index = np.indices(scan.hu.shape).reshape(3, -1)
    mm = scan.affine @ np.vstack([index, np.ones(index.shape[1])])
    return [axis.reshape(scan.hu.shape) for axis in mm[:3]]


def one_line(error: Exception) -> str:
    text = str(error)
    assert "\n" not in text
    assert len(text) < 600
    return text


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_every_orientation_ends_in_patient_axes_with_a_true_affine(tmp_path, write_series, field, name):
    write_series(tmp_path, orientation=ORIENTATIONS[name])
    scan = read_dicom(tmp_path)
    directions = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
    np.testing.assert_allclose(directions, [[0, 0, 1], [0, 1, 0], [1, 0, 0]], atol=1e-9)
    np.testing.assert_array_equal(scan.hu, field(*points(scan)))
    assert scan.valid.all()


def test_a_small_obliquity_stays_in_the_affine(tmp_path, write_series, field):
    angle = np.deg2rad(4.0)
    rotated = (np.cos(angle), np.sin(angle), 0.0, -np.sin(angle), np.cos(angle), 0.0)
    write_series(tmp_path, orientation=rotated)
    scan = read_dicom(tmp_path)
    np.testing.assert_allclose(scan.hu, field(*points(scan)), atol=1)
    assert abs(scan.affine[1, 2]) > 0.1


def test_a_diagonal_orientation_is_refused(tmp_path, write_series):
    half = float(np.sqrt(0.5))
    write_series(tmp_path, orientation=(half, half, 0.0, -half, half, 0.0))
    with pytest.raises(errors.InconsistentGeometry, match="45 degrees off"):
        read_dicom(tmp_path)


def test_values_return_to_the_series_own_order(tmp_path, write_series):
    write_series(tmp_path, orientation=ORIENTATIONS["sagittal from below"])
    scan = read_dicom(tmp_path)
    series = scan.source.to_series(scan.hu)
    assert series.shape == scan.source.shape == (6, 10, 8)
    files = sorted(tmp_path.iterdir(), reverse=True)
    first = pydicom.dcmread(files[0]).pixel_array - 1024.0
    assert any(np.array_equal(series[end], first) for end in (0, -1))
    assert not np.array_equal(scan.hu.shape, series.shape)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(6)), st.booleans())
def test_order_never_depends_on_file_order(tmp_path_factory, write_series, order, downwards):
    folder = tmp_path_factory.mktemp("series")
    step = (0.0, 0.0, -5.0 if downwards else 5.0)
    files = write_series(folder, step=step)
    scan = read_dicom([files[index] for index in order])
    assert scan.spacing_mm == (5.0, 2.0, 3.0)
    assert np.all(np.diff(scan.hu[:, 0, 0]) < 0)  # the field falls towards the head


@pytest.mark.parametrize("signed", [True, False])
def test_signed_and_unsigned_pixels_give_the_same_hounsfield_units(tmp_path, write_series, field, signed):
    write_series(tmp_path, signed=signed)
    scan = read_dicom(tmp_path)
    assert scan.hu.dtype == np.float32
    np.testing.assert_array_equal(scan.hu, field(*points(scan)))


def test_the_rescale_is_taken_slice_by_slice(tmp_path, write_series, field):
    def edit(index, dataset):
        stored = dataset.pixel_array.astype(np.int64) - 1024
        dataset.RescaleSlope, dataset.RescaleIntercept = 0.5, -100 * index
        dataset.PixelData = (2 * (stored + 100 * index)).astype("<i2").tobytes()

    write_series(tmp_path, edit=edit)
    scan = read_dicom(tmp_path)
    np.testing.assert_array_equal(scan.hu, field(*points(scan)))


@pytest.mark.parametrize("tag", ["RescaleSlope", "RescaleIntercept"])
def test_an_absent_rescale_is_never_guessed(tmp_path, write_series, tag):
    write_series(tmp_path, edit=lambda index, dataset: delattr(dataset, tag) if index == 2 else None)
    with pytest.raises(errors.MissingRescale, match=r"1_2_3_4-004\.dcm"):
        read_dicom(tmp_path)


@pytest.mark.parametrize("limit", [None, -1990])
def test_padding_is_found_on_stored_values_and_becomes_air(tmp_path, write_series, limit):
    def edit(index, dataset):
        stored = dataset.pixel_array.copy()
        stored[0, :4] = [-2000, -1995, -1990, -1989]
        dataset.PixelData = stored.astype("<i2").tobytes()
        dataset.RescaleIntercept = 1000.0  # -2000 stored is -1000 HU: only the stored value betrays it
        dataset.PixelPaddingValue = -2000
        if limit is not None:
            dataset.PixelPaddingRangeLimit = limit

    write_series(tmp_path, edit=edit)
    scan = read_dicom(tmp_path)
    padded = [False, True, True, True] if limit is None else [False, False, False, True]
    assert (scan.valid[:, 0, :4] == padded).all()
    assert (scan.hu[~scan.valid] == -1000).all()
    assert scan.valid[:, 1:].all()


def test_a_padding_value_written_with_the_other_sign_is_understood(tmp_path, write_series):
    def edit(index, dataset):
        stored = dataset.pixel_array.copy()
        stored[0, 0] = 63536  # the bits of -2000
        dataset.PixelData = stored.astype("<u2").tobytes()
        dataset.add_new("PixelPaddingValue", "SS", -2000)

    write_series(tmp_path, signed=False, edit=edit)
    scan = read_dicom(tmp_path)
    assert not scan.valid[:, 0, 0].any()
    assert scan.valid[:, 0, 1:].all()
    assert (scan.hu[:, 0, 0] == -1000).all()


def test_monochrome1_changes_display_not_hounsfield_units(tmp_path, write_series, field):
    write_series(tmp_path, edit=lambda _, ds: setattr(ds, "PhotometricInterpretation", "MONOCHROME1"))
    scan = read_dicom(tmp_path)
    np.testing.assert_array_equal(scan.hu, field(*points(scan)))


def test_several_series_are_listed_and_selectable(tmp_path, write_series):
    write_series(tmp_path / "a", uid="1.2.3.100")
    write_series(tmp_path / "b", uid="1.2.3.200", shape=(5, 10, 8))
    with pytest.raises(errors.SeveralSeries, match=r"1: 6 slices.*2: 5 slices") as caught:
        read_dicom(tmp_path)
    assert "--series" in one_line(caught.value)
    assert [len(one.slices) for one in scan_folder(tmp_path).accepted] == [6, 5]
    assert read_dicom(tmp_path, series="2").hu.shape[0] == 5
    assert read_dicom(tmp_path, series=".100").hu.shape[0] == 6
    with pytest.raises(errors.SeveralSeries, match="matches 0 of 2"):
        read_dicom(tmp_path, series="3")


def test_localizer_derived_and_foreign_objects_are_skipped_with_a_logged_reason(tmp_path, write_series, caplog):
    write_series(tmp_path)
    kinds = {"5.1": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "5.2": ["DERIVED", "SECONDARY", "MPR"]}
    for uid, kind in kinds.items():
        write_series(tmp_path, uid=uid, edit=lambda _, dataset, kind=kind: setattr(dataset, "ImageType", kind))
    write_series(tmp_path, uid="5.3", edit=lambda _, dataset: setattr(dataset, "Modality", "PT"))
    (tmp_path / "notes.txt").write_text("not an image")
    with caplog.at_level(logging.INFO, logger="capsfl.ct"):
        assert read_dicom(tmp_path).hu.shape[0] == 6
    for reason in ("localizer", "derived image", "not CT", ".txt file, not DICOM"):
        assert reason in caplog.text


@pytest.mark.parametrize("slices", [1, 3])
def test_fewer_than_four_slices_are_no_volume(tmp_path, write_series, slices):
    write_series(tmp_path, shape=(slices, 10, 8))
    with pytest.raises(errors.TooFewSlices, match="at least 4"):
        read_dicom(tmp_path)


def test_missing_slices_are_named_and_interpolated_only_on_request(tmp_path, write_series, field):
    files = write_series(tmp_path, shape=(8, 10, 8))
    for index in (3, 4, 6):
        files[index].unlink()
    with pytest.raises(errors.MissingSlices, match=r"3 missing, at 45\.00, 50\.00, 60\.00 mm"):
        read_dicom(tmp_path)
    scan = read_dicom(tmp_path, config=ReaderConfig(allow_interpolation=True))
    np.testing.assert_allclose(scan.hu, field(*points(scan)), atol=1e-3)
    assert scan.source.interpolated_slices == 3


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.floats(0.02, 0.4), st.sampled_from([-1, 1]))
def test_spacing_holds_to_one_percent(index, excess, sign):
    from capsfl.ct.stack import stack_slices

    positions = np.zeros((8, 3))
    positions[:, 2] = 5.0 * np.arange(8)
    arguments = {
        "names": [f"{number}.dcm" for number in range(8)],
        "place": Path("series"),
        "config": ReaderConfig(),
    }
    jitter = positions.copy()
    jitter[index, 2] += 0.02 * sign  # rounding of decimal strings
    assert stack_slices(jitter, np.array(AXIAL), (1.0, 1.0), **arguments).missing == 0
    positions[index, 2] += sign * excess * 5.0
    with pytest.raises(errors.InconsistentGeometry, match="uneven slice spacing"):
        stack_slices(positions, np.array(AXIAL), (1.0, 1.0), **arguments)


def test_equal_duplicates_are_dropped_and_different_ones_refused(tmp_path, write_series, caplog):
    files = write_series(tmp_path)
    twin = tmp_path / "twin.dcm"
    twin.write_bytes(files[2].read_bytes())
    scan = read_dicom(tmp_path)
    assert scan.hu.shape[0] == 6
    assert scan.source.dropped_duplicates == 1
    assert "twin.dcm" in caplog.text
    dataset = pydicom.dcmread(twin)
    dataset.PixelData = bytes(len(dataset.PixelData))
    dataset.save_as(twin)
    with pytest.raises(errors.DuplicatePositions, match=r"twin\.dcm"):
        read_dicom(tmp_path)


def test_gantry_tilt_is_found_from_geometry_and_corrected_only_on_request(tmp_path, write_series, field):
    angle = np.deg2rad(12.0)
    tilted = (1.0, 0.0, 0.0, 0.0, np.cos(angle), -np.sin(angle))
    write_series(tmp_path, orientation=tilted, step=(0.0, 0.0, 5.0), shape=(6, 24, 8))
    with pytest.raises(errors.GantryTilt) as caught:
        read_dicom(tmp_path)
    assert caught.value.angle_degrees == pytest.approx(12.0, abs=0.01)
    assert "12.0 degrees" in one_line(caught.value)
    scan = read_dicom(tmp_path, config=ReaderConfig(allow_tilt_correction=True))
    assert scan.source.corrected_tilt_degrees == pytest.approx(12.0, abs=0.01)
    difference = np.abs(scan.hu - field(*points(scan)))[scan.valid]
    assert scan.valid.mean() > 0.8
    assert np.quantile(difference, 0.95) <= 1.0  # the field is linear, so shearing keeps it up to rounding


@pytest.mark.parametrize(("rows", "columns"), [(0.0, 12.0), (0.0, -12.0), (-25.0, 0.0), (9.0, 14.0)])
def test_straightening_loses_nothing_and_finds_every_voxel_again(tmp_path, write_series, field, rows, columns):
    # Table travel across the slices: the stack leans towards rows, columns or both.
    lean = tuple(5.0 * np.tan(np.deg2rad(angle)) for angle in (columns, rows))
    write_series(tmp_path, step=(*lean, 5.0), shape=(6, 24, 20))
    scan = read_dicom(tmp_path, config=ReaderConfig(allow_tilt_correction=True))
    measured = 6 * 24 * 20
    assert 6 * 23 * 19 <= scan.valid.sum() <= measured  # what is interpolated needs both neighbours
    assert np.abs(scan.hu - field(*points(scan)))[scan.valid].max() <= 1.0
    assert scan.source.shape == scan.hu.shape
    assert scan.hu.size > measured


def test_a_gap_is_filled_after_the_slices_are_straightened(tmp_path, write_series, field):
    files = write_series(tmp_path, step=(2.0, 0.0, 5.0), shape=(6, 10, 20))
    files[2].unlink()
    config = ReaderConfig(allow_tilt_correction=True, allow_interpolation=True)
    scan = read_dicom(tmp_path, config=config)
    assert scan.source.interpolated_slices == 1
    assert scan.valid[2].sum() > 100
    assert np.abs(scan.hu - field(*points(scan)))[scan.valid].max() <= 1.0


def test_a_filled_slice_is_valid_where_both_its_neighbours_are(tmp_path, write_series):
    def pad(index, dataset):
        stored = dataset.pixel_array.copy()
        stored[0, : index + 1] = -2000
        dataset.PixelData = stored.astype("<i2").tobytes()

    files = write_series(tmp_path, edit=pad)
    files[2].unlink()
    scan = read_dicom(tmp_path, config=ReaderConfig(allow_interpolation=True))
    assert (~scan.valid).sum(axis=(1, 2)).tolist() == [1, 2, 4, 4, 5, 6]
    assert (scan.hu[~scan.valid] == -1000).all()


def test_a_gap_longer_than_the_setting_is_refused(tmp_path, write_series):
    files = write_series(tmp_path, shape=(10, 10, 8))
    for file in files[4:6]:
        file.unlink()
    assert read_dicom(tmp_path, config=ReaderConfig(allow_interpolation=True)).source.interpolated_slices == 2
    with pytest.raises(errors.MissingSlices, match=r"2 slices in a row.*reader\.max_gap_slices = 1"):
        read_dicom(tmp_path, config=ReaderConfig(allow_interpolation=True, max_gap_slices=1))


def test_reading_holds_one_volume(tmp_path, write_series):
    write_series(tmp_path, shape=(30, 192, 192), orientation=ORIENTATIONS["axial prone"])
    read_dicom(tmp_path)  # imports and caches
    tracemalloc.start()
    try:
        scan = read_dicom(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * (scan.hu.nbytes + scan.valid.nbytes)


def test_a_slice_of_another_grid_in_the_series_is_named(tmp_path, write_series):
    write_series(tmp_path)
    write_series(tmp_path / "odd", shape=(1, 12, 8), origin=(-12.0, -9.0, 60.0))
    with pytest.raises(errors.InconsistentGeometry, match="odd"):
        read_dicom(tmp_path)


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("PixelSpacing", [0.0, 1.0]),
        ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0]),
        ("ImagePositionPatient", None),
    ],
)
def test_unusable_geometry_is_refused(tmp_path, write_series, tag, value):
    write_series(tmp_path, edit=lambda _, dataset: setattr(dataset, tag, value))
    with pytest.raises(errors.InconsistentGeometry):
        read_dicom(tmp_path)


def test_colour_and_multiframe_are_refused(tmp_path, write_series):
    def color(_, dataset):
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0

    write_series(tmp_path / "color", edit=color)
    with pytest.raises(errors.UnsupportedColor):
        read_dicom(tmp_path / "color")
    write_series(tmp_path / "frames", edit=lambda _, dataset: setattr(dataset, "NumberOfFrames", 2))
    with pytest.raises(errors.UnsupportedMultiframe, match="dcm2niix"):
        read_dicom(tmp_path / "frames")


def test_broken_files_are_named(tmp_path, write_series):
    files = write_series(tmp_path)
    files[1].write_bytes(files[1].read_bytes()[:-40])
    with pytest.raises(errors.CorruptFile, match=files[1].name):
        read_dicom(tmp_path)
    files[1].write_bytes(b"")
    with pytest.raises(errors.CorruptFile, match="empty"):
        read_dicom(tmp_path)
    files[1].write_bytes(b"this is no DICOM file" * 40)
    with pytest.raises(errors.NotDicom, match=files[1].name):
        read_dicom(tmp_path)


@pytest.mark.parametrize("change", ["longer", "shorter"])
def test_a_file_that_changes_after_its_header_was_read_is_named(tmp_path, write_series, change):
    path = write_series(tmp_path)[2]
    (series,) = scan_folder(tmp_path).series
    if change == "longer":
        dataset = pydicom.dcmread(path)
        dataset.SeriesDescription = "written anew, so that the pixels have moved"
        dataset.save_as(path)
    else:
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(errors.CorruptFile, match=f"{path.name}: changed since its header was read"):
        read_series(series)


def test_folders_without_a_series_say_what_they_hold(tmp_path, write_series):
    with pytest.raises(errors.NoSeries, match="empty"):
        read_dicom(tmp_path)
    with pytest.raises(errors.NoSeries, match="no such"):
        read_dicom(tmp_path / "absent")
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(200))
    with pytest.raises(errors.NoSeries, match=r"3 x \.png"):
        read_dicom(tmp_path)
    scouts = tmp_path / "scout"
    write_series(scouts, edit=lambda _, ds: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    with pytest.raises(errors.NoSeries, match="6 x localizer"):
        read_dicom(scouts)


def test_nothing_about_the_patient_leaves_the_reader(tmp_path, write_series, caplog):
    def edit(index, dataset):
        dataset.BurnedInAnnotation = "YES"
        dataset.add_new("AccessionNumber", "SH", "SECRET far too long for what the standard allows")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about the odd value that is written on purpose
        write_series(tmp_path, edit=edit)
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        scan = read_dicom(tmp_path, salt=b"salt")
    kept = json.dumps(dataclasses.asdict(scan.source))
    for secret in ("Doe", "Jane", "SECRET", "1.2.3"):
        assert secret not in kept
        assert secret not in caplog.text
    assert scan.source.burned_in_annotation
    assert scan.source.manufacturer == "ACME"
    assert scan.source.pseudonym == read_dicom(tmp_path, salt=b"salt").source.pseudonym
    assert scan.source.pseudonym != read_dicom(tmp_path, salt=b"other").source.pseudonym
    assert read_dicom(tmp_path).source.pseudonym != read_dicom(tmp_path).source.pseudonym


def test_errors_survive_the_way_between_processes():
    tilt = pickle.loads(pickle.dumps(errors.GantryTilt("folder", 18.5)))
    assert (tilt.angle_degrees, str(tilt)) == (18.5, str(errors.GantryTilt("folder", 18.5)))
    plain = pickle.loads(pickle.dumps(errors.CorruptFile("a.dcm", "fault", "remedy")))
    assert str(plain) == "a.dcm: fault; remedy"


def test_a_missing_decoder_names_the_syntax_and_the_extra(tmp_path, write_series):
    from pydicom.uid import JPEGLosslessSV1

    def compress(_, dataset):
        dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
        dataset.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])

    write_series(tmp_path, edit=compress)
    # A fresh process in which the decoding packages do not exist.
    code = (
        "import sys\n"
        "sys.modules.update({'gdcm': None, 'pylibjpeg': None, 'PIL': None})\n"
        "from capsfl.ct.dicom import read_dicom\n"
        "from capsfl.ct.errors import MissingDecoder\n"
        "from pathlib import Path\n"
        "try:\n    read_dicom(Path(sys.argv[1]))\n"
        "except MissingDecoder as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "JPEG Lossless" in run.stdout
    assert "pip install 'capsfl[dicom]'" in run.stdout


# Real scanners -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "shape", "spacing"),
    [
        ("lung-pet-ct-dx-siemens", (30, 512, 512), (8.0, 0.646484375, 0.646484375)),
        ("ricord1a-covid-ct-jpegll", (62, 512, 512), (5.0, 0.703125, 0.703125)),
    ],
)
def test_real_chest_series_have_their_known_geometry_and_air(shared_data, folder, shape, spacing):
    scan = read_dicom(shared_data / folder)
    assert scan.hu.shape == shape
    np.testing.assert_allclose(scan.spacing_mm, spacing, rtol=1e-6)
    # The air in front of the chest is the histogram's peak around -1000.
    air = scan.hu[:, :120][scan.valid[:, :120]]
    air = air[(air > -1100) & (air < -900)]
    assert np.median(air) == pytest.approx(-1000, abs=15)
    body = np.argwhere(scan.hu[::2, ::4, ::4] > -200).mean(axis=0) / (np.array(scan.hu[::2, ::4, ::4].shape))
    assert np.all(np.abs(body - 0.5) < 0.15)
    # Gravity and anatomy: the spine lies towards posterior, so dense bone does too.
    bone = np.argwhere(scan.hu[::2, ::4, ::4] > 400).mean(axis=0)[1] / (shape[1] / 4)
    assert bone > 0.45


def test_lossless_encodings_decode_identically(shared_data, tmp_path):
    source = shared_data / "odd-dicom" / "wg04"
    volumes = {}
    for name in ("UNC", "RLE", "JPLL", "JLSL", "J2KR", "JLSN", "J2KI"):
        with pytest.raises(errors.TooFewSlices):
            read_dicom(source / f"CT1_{name}.dcm")
        folder = tmp_path / name
        folder.mkdir()
        for index in range(4):
            dataset = pydicom.dcmread(source / f"CT1_{name}.dcm")
            dataset.ImagePositionPatient = [0.0, 0.0, 5.0 * index]
            dataset.save_as(folder / f"{index}.dcm")
        volumes[name] = read_dicom(folder)
    reference = volumes["UNC"].hu
    assert reference.max() > 500
    for name in ("RLE", "JPLL", "JLSL", "J2KR"):
        np.testing.assert_array_equal(volumes[name].hu, reference)
    # The lossy two also blur the padding's edge, which is no Hounsfield unit.
    for name, most in (("JLSN", 4), ("J2KI", 352)):
        inside = volumes["UNC"].valid & volumes[name].valid
        assert 0 < np.abs(volumes[name].hu - reference)[inside].max() <= most
