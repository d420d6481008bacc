"""Manifests and ingestion: every bad row by name, resumption, parallel equality, partial failure."""

import csv
import shutil
import stat

import nibabel
import numpy as np
import pytest

from capsfl.ct import errors
from capsfl.ct.collections import read_manifest
from capsfl.ct.ingest import MASK, ingest, read_index
from capsfl.ct.normalize import VolumeConfig
from capsfl.ct.volumes import read_attributes, read_volume

CONFIG = VolumeConfig(center="volume")


@pytest.fixture
def collection(tmp_path, write_series):
    """Three patients of two hospitals: two DICOM series, one of them with a mask, and one NIfTI."""
    root = tmp_path / "source"
    for name in ("a1", "b1"):
        write_series(root / "dicom" / name, shape=(6, 12, 12), uid=f"1.2.{name[1]}")
    affine = np.diag([-3.0, -3.0, 5.0, 1.0])
    values = np.full((12, 12, 6), -900, np.int16)
    nibabel.save(nibabel.Nifti1Image(values, affine), root / "a2.nii.gz")
    mask = np.zeros(values.shape, np.uint8)
    mask[3:9, 3:9, 1:5] = 255
    nibabel.save(nibabel.Nifti1Image(mask, affine), root / "a2-mask.nii.gz")
    write_manifest(root / "manifest.csv", ROWS)
    return root


HEADER = "patient,hospital,image,scanner,label,mask,mask_threshold,series,split"
ROWS = (
    HEADER,
    "A-1,alpha,dicom/a1,A1,1,,,,train",
    "A-2,alpha,a2.nii.gz,,0,a2-mask.nii.gz,127.5,,",
    "B-1,beta,dicom/b1,B3,,,,,test",
)


def write_manifest(path, rows):
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def run(source, out, **arguments):
    return ingest(source, out, config=CONFIG, processes=1, progress=False, **arguments)


def test_a_manifest_is_read_as_written(collection):
    first, second, third = read_manifest(collection / "manifest.csv")
    assert (first.patient, first.hospital, first.scanner, first.label) == ("A-1", "alpha", "A1", 1)
    assert (first.split, first.mask, first.mask_threshold) == ("train", None, 0.5)
    assert (second.mask, second.mask_threshold) == (collection / "a2-mask.nii.gz", 127.5)
    assert (second.scanner, second.label, second.split) == (None, 0, None)
    assert (third.image, third.label) == (collection / "dicom" / "b1", None)
    moved = collection.parent / "elsewhere.csv"
    moved.write_text("﻿" + (collection / "manifest.csv").read_text(), encoding="utf-8")
    assert read_manifest(moved, root=collection) == (first, second, third)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["patient,image", "p,dicom/a1"], r":1: column 'hospital' is absent"),
        ([HEADER + ",lable", "p,h,dicom/a1,,,,,,,1"], r":1: column 'lable' is unknown"),
        (["patient,hospital,image,image", "p,h,a,b"], r":1: column 'image' appears twice"),
        (["patient,hospital,image"], r"no scans"),
        ([""], r"empty"),
        (["patient,hospital,image", "p,h"], r":2: 2 cells for 3 columns"),
        (["patient,hospital,image", "", "../p,h,dicom/a1"], r":3: patient is '../p'"),
        (["patient,hospital,image", "p,h h,dicom/a1"], r":2: hospital is 'h h'"),
        (["patient,hospital,image", "p,h,"], r":2: image is blank"),
        (["patient,hospital,image", "p,h,absent"], r":2: image is 'absent'; no such file"),
        (["patient,hospital,image", "p,h,manifest.csv"], r":2: image is 'manifest.csv'; give a DICOM"),
        (["patient,hospital,image,label", "p,h,dicom/a1,yes"], r":2: label is 'yes'; use 0, 1"),
        (["patient,hospital,image,split", "p,h,dicom/a1,dev"], r":2: split is 'dev'; use train"),
        (["patient,hospital,image,mask", "p,h,dicom/a1,dicom"], r":2: mask is 'dicom'"),
        (["patient,hospital,image,mask_threshold", "p,h,dicom/a1,nan"], r":2: mask_threshold is 'nan'"),
        (["patient,hospital,image", "p,h,dicom/a1", "P,H,dicom/b1"], r":3: patient 'P'.*line 2"),
        (["patient,hospital,image", 'p,h,"dicom'], r"not valid CSV"),
    ],
)
def test_a_bad_row_is_named_with_its_value_and_remedy(collection, rows, message):
    path = write_manifest(collection / "manifest.csv", rows)
    with pytest.raises(errors.ManifestError, match=message) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(str(path))
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_absent_and_binary_manifests_are_named(tmp_path):
    with pytest.raises(errors.ManifestError, match="check the path"):
        read_manifest(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"patient,hospital,image\n\xff\xfe,h,x\n")
    with pytest.raises(errors.ManifestError, match="not UTF-8"):
        read_manifest(tmp_path / "binary.csv")


def test_ingestion_lists_what_it_stored(collection, tmp_path):
    out = tmp_path / "out"
    report = run(collection, out)
    assert (report.written, report.kept, report.failed) == (3, 0, ())
    assert report.index == read_index(out)
    with (out / "index.csv").open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows == [
        ["patient", "hospital", "scanner", "label", "split", "volume"],
        ["A-1", "alpha", "A1", "1", "train", "alpha/A-1.zarr"],
        ["A-2", "alpha", "", "0", "", "alpha/A-2.zarr"],
        ["B-1", "beta", "B3", "", "test", "beta/B-1.zarr"],
    ]
    volume, attributes = read_volume(out / "alpha" / "A-2.zarr")
    assert volume.hu.shape == (128, 128, 128)
    litres = volume.masks[MASK].sum() * 4 * (334 / 128) ** 2
    assert litres == pytest.approx(6 * 6 * 4 * 45, rel=0.12)
    assert (attributes["patient"], attributes["label"]) == ("A-2", 0)
    assert not list(out.rglob("*.partial"))


def test_a_second_run_keeps_what_is_unchanged_and_redoes_what_is_not(collection, tmp_path, write_series):
    out = tmp_path / "out"
    run(collection, out)
    before = {entry.path: (entry.path / "zarr.json").stat().st_mtime_ns for entry in read_index(out)}
    again = run(collection, out)
    assert (again.written, again.kept) == (0, 3)
    assert {path: (path / "zarr.json").stat().st_mtime_ns for path in before} == before
    # The split and the window are applied later, so they redo nothing.
    rows = [row.replace(",test", ",train") for row in ROWS]
    write_manifest(collection / "manifest.csv", rows)
    windowed = VolumeConfig(center="volume", window="scanner")
    report = ingest(collection, out, config=windowed, processes=1, progress=False)
    assert (report.written, report.kept) == (0, 3)
    assert read_index(out)[2].split == "train"
    # A label, the source files and the grid do.
    write_manifest(collection / "manifest.csv", [rows[0], rows[1].replace(",1,", ",0,"), *rows[2:]])
    assert run(collection, out).written == 1
    assert read_index(out)[0].label == 0
    shutil.rmtree(collection / "dicom" / "b1")
    write_series(collection / "dicom" / "b1", shape=(7, 12, 12))
    assert run(collection, out).written == 1
    assert ingest(collection, out, config=VolumeConfig(), processes=1, progress=False).kept == 0


def test_a_damaged_group_is_redone(collection, tmp_path):
    out = tmp_path / "out"
    run(collection, out)
    (out / "alpha" / "A-1.zarr" / "zarr.json").write_text("{")
    assert (run(collection, out).written, run(collection, out).kept) == (1, 3)


def test_processes_do_not_change_the_volumes(collection, tmp_path):
    run(collection, tmp_path / "one")
    report = ingest(collection, tmp_path / "two", config=CONFIG, processes=2, progress=False)
    assert report.written == 3
    for one, two in zip(read_index(tmp_path / "one"), read_index(tmp_path / "two"), strict=True):
        assert one.patient == two.patient
        assert read_attributes(one.path)["checksum"] == read_attributes(two.path)["checksum"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bad_scan_stops_or_is_skipped_and_reported(collection, tmp_path, processes):
    broken = sorted((collection / "dicom" / "a1").iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:-10])
    out = tmp_path / "out"
    with pytest.raises(errors.CorruptFile, match=broken.name):
        ingest(collection, out, config=CONFIG, processes=processes, progress=False)
    report = ingest(collection, out, config=CONFIG, processes=processes, progress=False, on_error="skip")
    assert [entry.patient for entry in report.index] == ["A-2", "B-1"]
    ((who, why),) = report.failed
    assert who == "alpha/A-1"
    assert broken.name in why
    assert not (out / "alpha" / "A-1.zarr").exists()
    assert not list(out.rglob("*.partial"))


def test_single_scans_join_the_index_under_pseudonyms(collection, tmp_path):
    out = tmp_path / "out"
    run(collection / "dicom" / "a1", out)
    run(collection / "a2.nii.gz", out)
    report = run(collection / "dicom" / "a1", out)
    assert (report.written, report.kept) == (0, 1)
    first, second = read_index(out)
    assert first.hospital == second.hospital == "local"
    assert first.patient != second.patient
    files = [path for path in out.rglob("*") if path.is_file()]
    everything = "".join(path.read_text(errors="replace") + str(path.relative_to(out)) for path in files)
    for secret in ("Doe", "SECRET", "a2.nii", "dicom/a1", "1.2.3"):
        assert secret not in everything
    assert stat.S_IMODE((out / ".pseudonym-salt").stat().st_mode) == 0o600
    run(collection / "dicom" / "a1", tmp_path / "other")
    assert read_index(tmp_path / "other")[0].patient != first.patient


def test_sources_that_are_none_are_named(tmp_path):
    with pytest.raises(errors.ScanError, match="no such file"):
        run(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(errors.ScanError, match="not a scan"):
        run(tmp_path / "notes.txt", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.NoSeries, match="empty"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(errors.ManifestError, match=r"index\.csv: no such file; run `capsfl ingest"):
        read_index(tmp_path / "empty")


def test_an_unwritable_output_is_named(collection, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(errors.StorageError, match=r"cannot be written .*; free space or choose"):
        run(collection, tmp_path / "file")


def test_a_salt_is_made_whole_or_not_at_all(collection, tmp_path, monkeypatch):
    """One without its bytes would be kept, and pseudonyms made with it could be guessed from names."""

    def die(_: int) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("secrets.token_bytes", die)
        with pytest.raises(KeyboardInterrupt):
            run(collection / "dicom" / "a1", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    run(collection / "dicom" / "a1", tmp_path / "out")
    salt = tmp_path / "out" / ".pseudonym-salt"
    assert len(salt.read_bytes()) == 32
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    assert salt.stat().st_nlink == 1


def test_leftovers_of_killed_processes_are_swept(collection, tmp_path):
    out = tmp_path / "out"
    dead = out / "alpha" / ".A-1.zarr.999999999.partial"
    dead.mkdir(parents=True)
    (dead / "zarr.json").write_text("half")
    run(collection, out)
    assert not dead.exists()


def test_a_real_series_and_real_masks_go_all_the_way(shared_data, tmp_path):
    stem = "lung-masks-3d/id001-128x128x64"
    rows = (
        "patient,hospital,image,mask,mask_threshold",
        "siemens,a,lung-pet-ct-dx-siemens,,",
        "ricord,b,ricord1a-covid-ct-jpegll,,",
        f"nifti,b,{stem}.nii.gz,{stem}-msk.nii.gz,127.5",
    )
    manifest = write_manifest(tmp_path / "real.csv", rows)
    report = ingest(manifest, tmp_path / "out", config=VolumeConfig(), root=shared_data, processes=1, progress=False)
    assert report.written == 3
    for entry in report.index:
        volume, _ = read_volume(entry.path)
        assert volume.hu.shape == (128, 128, 128)
        assert -1000 < np.median(volume.hu[volume.valid & (volume.hu < -500)]) < -800
        assert volume.cropped_lung_fraction == 0
    assert volume.masks[MASK].any()
