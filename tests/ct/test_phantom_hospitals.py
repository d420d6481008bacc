"""What the phantom on disk must be: Table II's cohort, a CT series a patient, the same bytes every time."""

import csv
import errno
import hashlib
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydicom.uid import CTImageStorage

from capsfl.ct.phantom import (
    SCANNERS,
    PhantomConfig,
    PhantomMismatch,
    acquire,
    hospitals,
    patient,
    write_hospitals,
)
from capsfl.ct.phantom.cohort import apportion, cohort
from capsfl.settings import Settings

SMALL = PhantomConfig(hospitals=3, patients=6, seed=5, matrix=128, slice_thickness_mm=10.0)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("phantom")
    assert write_hospitals(out, config=SMALL, processes=1, progress=False) == out / "manifest.csv"
    return out


@pytest.fixture(scope="module")
def rows(phantom) -> list[dict[str, str]]:
    with (phantom / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def slices(folder: Path) -> list[pydicom.Dataset]:
    found = [pydicom.dcmread(path) for path in folder.iterdir()]
    return sorted(found, key=lambda slice_: float(slice_.ImagePositionPatient[2]))


def test_the_default_cohort_is_table_two():
    assert isinstance(PhantomConfig(), Settings)
    subjects = cohort(PhantomConfig())
    by_scanner = Counter(subject.scanner.id for subject in subjects)
    assert by_scanner == {"A1": 30, "A2": 10, "B3": 13, "B4": 7, "C5": 20, "C6": 9}
    assert Counter(subject.positive for subject in subjects) == {True: 68, False: 21}


def test_scanners_carry_table_twos_windows():
    windows = [(scanner.window_level, scanner.window_width) for scanner in SCANNERS]
    assert windows == [(-600, 1200)] * 2 + [(-600, 1600)] * 3 + [(-500, 1500)]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_cohort_is_balanced_by_hospital_scanner_and_prefix(data):
    count = data.draw(st.integers(1, 7))
    patients = data.draw(st.integers(count, 150))
    fraction = data.draw(st.floats(0.05, 0.95))
    config = PhantomConfig(hospitals=count, patients=patients, positives_fraction=fraction)
    subjects = cohort(config)
    assert len(subjects) == patients
    assert len({subject.id for subject in subjects}) == patients
    assert len({subject.seed for subject in subjects}) == patients
    names = sorted({subject.hospital for subject in subjects})
    assert len(names) == count
    for name in names:
        labels = [subject.positive for subject in subjects if subject.hospital == name]
        if len(labels) > 1:
            assert set(labels[:2]) == {True, False} or len(set(labels)) == 2
        elif patients >= 2 * count:
            pytest.fail(f"{name} has one patient of {patients}")
        share = np.mean(labels)
        for length in range(1, len(labels) + 1):
            assert abs(sum(labels[:length]) - share * length) < 1 + 1e-9
        scanners = {subject.scanner.id for subject in subjects if subject.hospital == name}
        for scanner in scanners:
            seen = [s.positive for s in subjects if s.hospital == name and s.scanner.id == scanner]
            assert abs(sum(seen) - share * len(seen)) <= 1 + 1e-9


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 150), st.floats(0.05, 0.95))
def test_a_third_class_halves_the_rest_everywhere_and_leaves_covid_as_it_was(count, patients, fraction):
    config = PhantomConfig(hospitals=count, patients=max(count, patients), positives_fraction=fraction)
    two, three = cohort(config), cohort(config.model_copy(update={"classes": 3}))
    for old, new in zip(two, three, strict=True):
        assert (old.id, old.seed, old.scanner) == (new.id, new.seed, new.scanner)
        assert (old.label, old.pattern) == (int(old.positive), "covid")
        assert new.label == (2 if old.positive else new.label)
        assert (new.positive, new.pattern) == (new.label > 0, "pneumonia" if new.label == 1 else "covid")
        assert old.positive == (new.label == 2)
    rest = [subject for subject in three if subject.label < 2]
    for groups in ([()] * len(rest), [s.hospital for s in rest], [s.scanner.id for s in rest]):
        for group in set(groups):
            labels = [s.label for s, own in zip(rest, groups, strict=True) if own == group]
            assert abs(2 * sum(labels) - len(labels)) <= 1, group


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=8), total=st.integers(0, 300))
def test_shares_add_up_and_are_within_one_of_proportional(weights, total):
    shares = apportion(total, weights, low=[0] * len(weights), high=[total] * len(weights))
    assert sum(shares) == total
    assert all(abs(n - total * w / sum(weights)) < 1 for n, w in zip(shares, weights, strict=True))


def test_fewer_patients_than_hospitals_are_refused_by_name():
    with pytest.raises(ValidationError, match="patients=2 is fewer than hospitals=3"):
        PhantomConfig(patients=2)


def test_the_manifest_lists_every_patient_with_relative_paths(phantom, rows):
    assert list(rows[0]) == ["patient", "hospital", "image", "scanner", "label", "mask", "split"]
    assert len(rows) == 6
    assert Counter(row["label"] for row in rows) == {"0": 3, "1": 3}
    for row in rows:
        assert (phantom / row["image"]).is_dir()
        assert (phantom / row["mask"]).is_file()
        assert row["image"] == f"{row['hospital']}/{row['patient']}"
        assert row["split"] == ""


def test_each_series_is_a_valid_evenly_spaced_ct_series(phantom, rows):
    instances = set()
    for row in rows:
        series = slices(phantom / row["image"])
        scanner = next(scanner for scanner in SCANNERS if scanner.id == row["scanner"])
        heights = np.array([float(slice_.ImagePositionPatient[2]) for slice_ in series])
        np.testing.assert_allclose(np.diff(heights), 10.0, atol=1e-3)
        numbers = [int(slice_.InstanceNumber) for slice_ in series]
        assert numbers == list(range(len(series), 0, -1))
        assert len({slice_.SeriesInstanceUID for slice_ in series}) == 1
        instances |= {slice_.SOPInstanceUID for slice_ in series}
        for slice_ in series:
            assert slice_.file_meta.MediaStorageSOPInstanceUID == slice_.SOPInstanceUID
            assert slice_.SOPInstanceUID.is_valid
            assert slice_.SOPInstanceUID.startswith("2.25.")
            assert slice_.SOPClassUID == CTImageStorage
            assert slice_.Modality == "CT"
            assert slice_.ManufacturerModelName == scanner.model
            assert list(slice_.ImageOrientationPatient) == [1, 0, 0, 0, 1, 0]
            assert (slice_.Rows, slice_.Columns) == (128, 128)
            assert slice_.pixel_array.shape == (128, 128)
            assert float(slice_.PixelSpacing[0]) == pytest.approx(scanner.field_of_view_mm / 128)
            assert slice_.pixel_array.min() >= (-2000 if scanner.signed else 0)
    assert len(instances) == sum(len(list((phantom / row["image"]).iterdir())) for row in rows)


def test_stored_values_rescale_to_the_acquired_hounsfield_units(phantom, rows):
    subjects = {subject.id: subject for subject in cohort(SMALL)}
    row = rows[1]
    subject = subjects[row["patient"]]
    hu, _, lesion, geometry = acquire(
        patient(subject.seed, positive=subject.positive), subject.scanner,
        matrix=128, slice_thickness_mm=10.0, seed=subject.seed,
    )  # fmt: skip
    series = slices(phantom / row["image"])
    stored = np.stack([slice_.pixel_array.astype(int) for slice_ in series])
    np.testing.assert_array_equal(stored * int(series[0].RescaleSlope) + int(series[0].RescaleIntercept), hu)
    first = [float(v) for v in series[0].ImagePositionPatient]
    np.testing.assert_allclose(first, geometry.origin_mm, atol=1e-4)

    image = nibabel.Nifti1Image.from_filename(phantom / row["mask"])
    np.testing.assert_array_equal(np.asarray(image.dataobj).transpose(2, 1, 0), lesion)
    index = np.array([7, 11, 3, 1.0])  # i, j, k
    in_lps = geometry.affine @ index[[2, 1, 0, 3]]
    np.testing.assert_allclose(image.affine @ index, in_lps * [-1, -1, 1, 1], atol=1e-3)


def test_the_manifest_of_three_classes_labels_them_and_masks_both_pneumonias(tmp_path):
    config = PhantomConfig(
        hospitals=1, patients=3, positives_fraction=1 / 3, classes=3, matrix=128, slice_thickness_mm=10.0
    )
    with write_hospitals(tmp_path, config=config, processes=1, progress=False).open(newline="") as file:
        found = list(csv.DictReader(file))
    assert sorted(row["label"] for row in found) == ["0", "1", "2"]
    for row in found:
        mask = np.asarray(nibabel.Nifti1Image.from_filename(tmp_path / row["mask"]).dataobj)
        assert mask.any() == (row["label"] != "0")


def test_masks_are_empty_for_negatives_and_only_for_them(phantom, rows):
    for row in rows:
        mask = np.asarray(nibabel.Nifti1Image.from_filename(phantom / row["mask"]).dataobj)
        assert mask.dtype == np.uint8
        assert set(np.unique(mask)) == ({0, 1} if row["label"] == "1" else {0})


def test_padding_is_declared_only_where_no_real_voxel_takes_its_value(phantom, rows):
    declared = {}
    for row in rows:
        slice_ = slices(phantom / row["image"])[3]
        declared[row["scanner"][0]] = slice_.get("PixelPaddingValue")
        corner = int(slice_.pixel_array[0, 0]) + int(slice_.RescaleIntercept)
        scanner = next(scanner for scanner in SCANNERS if scanner.id == row["scanner"])
        assert corner == scanner.padding_hu
        if "PixelPaddingValue" in slice_:
            padded = slice_.pixel_array == slice_.PixelPaddingValue
            assert padded.mean() == pytest.approx(1 - np.pi / 4, abs=0.02)
    assert declared["A"] == 0
    assert declared["B"] is None


def test_two_processes_write_the_same_bytes_as_one(phantom, tmp_path):
    write_hospitals(tmp_path / "out", config=SMALL, processes=2, progress=False)
    assert digests(tmp_path / "out") == digests(phantom)


def test_a_second_call_keeps_what_is_there_and_completes_what_is_not(phantom, rows, monkeypatch):
    before = digests(phantom)
    removed = phantom / rows[2]["mask"]
    removed.unlink()
    (phantom / "hospital-A" / ".A-001.partial").mkdir()
    written = []
    write = hospitals._write_patient
    monkeypatch.setattr(hospitals, "_write_patient", lambda *a: (written.append(a[2].id), write(*a)))
    write_hospitals(phantom, config=SMALL, processes=1, progress=False)
    assert written == [rows[2]["patient"]]
    (phantom / "hospital-A" / ".A-001.partial").rmdir()
    assert digests(phantom) == before


def test_another_configuration_in_the_same_folder_is_refused_naming_both(phantom):
    other = SMALL.model_copy(update={"seed": 6})
    with pytest.raises(PhantomMismatch, match=r"seed=5.*seed=6") as caught:
        write_hospitals(phantom, config=other, progress=False)
    assert str(phantom) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_foreign_manifest_is_not_overwritten(tmp_path):
    (tmp_path / "manifest.csv").write_text("mine\n")
    with pytest.raises(PhantomMismatch, match=r"manifest\.csv"):
        write_hospitals(tmp_path, config=SMALL, progress=False)
    assert (tmp_path / "manifest.csv").read_text() == "mine\n"


def test_a_full_disk_is_one_line_and_leaves_nothing_partial(tmp_path, monkeypatch):
    write = hospitals.write_mask
    calls = []

    def fill_up(path, mask, geometry):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, mask, geometry)

    monkeypatch.setattr(hospitals, "write_mask", fill_up)
    with pytest.raises(OSError, match="No space left") as caught:
        write_hospitals(tmp_path, config=SMALL, processes=1, progress=False)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "manifest.csv").exists()
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]
    assert (tmp_path / "hospital-A" / "A-001").is_dir()
    assert not (tmp_path / "hospital-A" / "A-002").exists()


def test_a_path_that_is_a_file_is_one_line_naming_it(tmp_path):
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(OSError, match="choose a folder") as caught:
        write_hospitals(place, config=SMALL, progress=False)
    assert str(place) in str(caught.value)


def test_no_processes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="processes=0"):
        write_hospitals(tmp_path, config=SMALL, processes=0)


def test_the_reader_sees_the_phantoms_geometry(phantom, rows):
    dicom = pytest.importorskip("capsfl.ct.dicom")
    row = rows[1]
    scan = dicom.read_dicom(phantom / row["image"])
    series = slices(phantom / row["image"])
    stored = np.stack([slice_.pixel_array.astype(int) for slice_ in series]) - 1024
    np.testing.assert_allclose(scan.hu[scan.valid], stored[scan.valid])
    assert scan.spacing_mm == pytest.approx((10.0, *map(float, series[0].PixelSpacing)))
    np.testing.assert_allclose(scan.affine[:3, 3], [float(v) for v in series[0].ImagePositionPatient], atol=1e-3)
