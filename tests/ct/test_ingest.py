"""Manifests and ingestion: every bad row by name, resumption, parallel equality, partial failure."""

import csv
import os
import resource
import shutil
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pytest

from capsfl.ct import errors, salt
from capsfl.ct import ingest as ingest_module
from capsfl.ct.collections import CollectionConfig, read_manifest
from capsfl.ct.ingest import MASK, ingest, read_index
from capsfl.ct.normalize import VolumeConfig
from capsfl.ct.reader import ReaderConfig
from capsfl.ct.volumes import read_attributes, read_volume, write_volume
from capsfl.ct.zarr_group import open_store
from capsfl.workers import process_tag

CONFIG = VolumeConfig(center="volume")

DEAD = f"{process_tag().rpartition('-')[0]}-999999999"
"""A process of this host that is no more."""


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
        ["patient", "hospital", "scanner", "label", "split", "volume", "kind", "person"],
        ["A-1", "alpha", "A1", "1", "train", "alpha/A-1.zarr", "volume", ""],
        ["A-2", "alpha", "", "0", "", "alpha/A-2.zarr", "volume", ""],
        ["B-1", "beta", "B3", "", "test", "beta/B-1.zarr", "volume", ""],
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
    before = {entry.path: Path(entry.path, "zarr.json").stat().st_mtime_ns for entry in read_index(out)}
    again = run(collection, out)
    assert (again.written, again.kept) == (0, 3)
    assert {path: Path(path, "zarr.json").stat().st_mtime_ns for path in before} == before
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


def test_volumes_that_other_rules_left_behind_are_named(collection, tmp_path):
    out = tmp_path / "out"
    assert run(collection, out).notes == ()
    write_manifest(collection / "manifest.csv", [ROWS[0], ROWS[1].replace("A-1", "A-7"), ROWS[2]])
    (note,) = run(collection, out).notes
    assert (
        note == f"2 volumes in {out} are in the index no more (the first: alpha/A-1.zarr); remove what you do not need"
    )
    assert (out / "alpha" / "A-1.zarr").exists()


def test_persons_are_listed_and_an_index_without_them_can_be_read(collection, tmp_path):
    out = tmp_path / "out"
    head, first, second, third = ROWS
    write_manifest(collection / "manifest.csv", [f"{head},person", f"{first},P", f"{second},", f"{third},"])
    report = run(collection, out)
    assert [entry.person for entry in report.index] == ["P", None, None]
    assert read_index(out) == report.index
    lines = (out / "index.csv").read_text().splitlines()
    (out / "index.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines))
    assert [entry.person for entry in read_index(out)] == [None, None, None]


def test_nothing_of_the_patient_is_stored_where_it_slipped_into_technical_values(tmp_path, write_series):
    def edit(_, dataset):
        dataset.PatientName, dataset.PatientID = "Roe^Jane", "MRN-77"
        dataset.ManufacturerModelName, dataset.ConvolutionKernel = "Scan of Roe", "B40 MRN-77"

    write_series(tmp_path / "tree" / "a", shape=(5, 8, 8), edit=edit)
    config = CollectionConfig(name="dicom-folder", hospitals="scanner")
    report = run(tmp_path / "tree", tmp_path / "out", collection=config)
    assert [(entry.hospital, entry.scanner) for entry in report.index] == [("ACME-withheld", "ACME withheld")]
    stored = "".join(
        str(path.relative_to(tmp_path / "out")) + path.read_text(errors="replace")
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    )
    for secret in ("Roe", "roe", "Jane", "MRN"):
        assert secret not in stored
    source = read_volume(report.index[0].path)[0].source
    assert (source.model, source.kernel, source.manufacturer) == ("withheld", "withheld", "ACME")


def test_a_damaged_group_is_redone(collection, tmp_path):
    out = tmp_path / "out"
    run(collection, out)
    (out / "alpha" / "A-1.zarr" / "zarr.json").write_text("{")
    assert (run(collection, out).written, run(collection, out).kept) == (1, 3)


def test_an_object_store_takes_what_a_folder_takes(collection, tmp_path):
    """`memory://` is the object store that needs no network; the others differ by their name alone."""
    out = "memory://bucket/study"
    report = run(collection, out)
    assert report.written == 3
    assert report.index == read_index(out)
    assert report.index[0].path == "memory://bucket/study/alpha/A-1.zarr"
    run(collection, tmp_path / "out")
    for stored, local in zip(report.index, read_index(tmp_path / "out"), strict=True):
        assert read_attributes(stored.path)["checksum"] == read_attributes(local.path)["checksum"]
    assert run(collection, out).kept == 3
    run(collection / "dicom" / "a1", out)
    run(collection / "dicom" / "a1", out)
    assert len(read_index(out)) == 4, "the pseudonym is the same a second time"
    with pytest.raises(ValueError, match="ftp://bucket: no place for volumes"):
        run(collection, "ftp://bucket")


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
    assert not (tmp_path / "out").exists()
    run(collection / "dicom" / "a1", tmp_path / "out")
    salt = tmp_path / "out" / ".pseudonym-salt"
    assert len(salt.read_bytes()) == 32
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    assert salt.stat().st_nlink == 1


REFUSED = {
    "a wrong layout": ("dicom", {"collection": CollectionConfig(name="covid-ct")}, errors.WrongLayout),
    "no series": ("texts", {}, errors.NoSeries),
    "no volume": ("broken.nii.gz", {}, errors.ScanError),
    "no such row": ("manifest.csv", {}, errors.ManifestError),
    "a series of a manifest": ("bad.csv", {}, errors.ScanError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_nothing(collection, tmp_path, case):
    source, options, error = REFUSED[case]
    (collection / "texts").mkdir()
    (collection / "texts" / "letter.txt").write_text("Dear colleague")
    (collection / "broken.nii.gz").write_bytes(b"no volume")
    write_manifest(collection / "manifest.csv", [HEADER, "A-1,alpha,absent,A1,1,,,,"])
    write_manifest(collection / "bad.csv", [HEADER, "A-1,alpha,broken.nii.gz,A1,1,,,,"])
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine").touch()
    for out in (tmp_path / "new" / "deep", kept, f"memory://refused/{source}"):
        with pytest.raises(error):
            run(collection / source, out, **options)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in kept.rglob("*")] == ["mine"]
    assert open_store(f"memory://refused/{source}").list().result() == []


def test_a_salt_that_volumes_were_made_with_outlives_what_is_refused(collection, tmp_path, monkeypatch):
    """Also where another call, which had made it and was refused, took it back meanwhile."""
    out = tmp_path / "out"
    stored = salt.secrets.token_bytes(32)
    monkeypatch.setattr("secrets.token_bytes", lambda _: stored)
    read = ingest_module._outcomes

    def meanwhile(*arguments):
        yield from read(*arguments)
        (out / ".pseudonym-salt").unlink()

    with monkeypatch.context() as patch:
        patch.setattr(ingest_module, "_outcomes", meanwhile)
        run(collection / "dicom" / "a1", out)
    assert (out / ".pseudonym-salt").read_bytes() == stored
    with pytest.raises(errors.ScanError):
        run(collection / "absent", out)
    (collection / "broken.nii.gz").write_bytes(b"no volume")
    with pytest.raises(errors.ScanError):
        run(collection / "broken.nii.gz", out)
    assert (out / ".pseudonym-salt").read_bytes() == stored
    assert len(read_index(out)) == 1


def test_leftovers_of_killed_processes_are_swept(collection, tmp_path):
    out = tmp_path / "out"
    dead = out / "alpha" / f".A-1.zarr.{DEAD}.partial"
    dead.mkdir(parents=True)
    (dead / "zarr.json").write_text("half")
    # Numbers say nothing across machines: on another one this process may be at work.
    others = [out / "alpha" / name for name in (".A-1.zarr.other-999999999.partial", ".A-1.zarr.999999999.partial")]
    mine = out / f".other.csv.{process_tag()}.partial"
    for path in (*others, mine):
        path.mkdir()
    run(collection, out)
    assert not dead.exists()
    assert all(path.exists() for path in (*others, mine))


def test_a_killed_ingest_leaves_whole_volumes_and_a_second_run_continues(collection, tmp_path, monkeypatch):
    out, written = tmp_path / "out", []

    def die_in_the_second(path, *arguments, **options):
        if written:
            path.with_name(f".{path.name}.{DEAD}.partial").mkdir(parents=True)
            raise KeyboardInterrupt
        written.append(path)
        write_volume(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("capsfl.ct.volumes.write_volume", die_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(collection, out)
    assert [path.name for path in out.rglob("*.zarr")] == ["A-1.zarr"]
    assert not (out / "index.csv").exists(), "an index says that all is there"
    report = run(collection, out)
    assert (report.written, report.kept) == (2, 1)
    assert not list(out.rglob("*.partial"))


@pytest.mark.torture
@pytest.mark.skipif("CAPSFL_TORTURE" not in os.environ, reason="a minute of processor time: make torture")
def test_ingests_killed_at_any_moment_end_as_one_that_was_not(collection, tmp_path):
    """SIGKILL after random fractions of a second, until a run comes through; then all volumes are right."""
    run(collection, tmp_path / "whole")
    out = tmp_path / "killed"
    program = "import sys; from capsfl.cli import main; main(sys.argv[1:])"
    script = [sys.executable, "-c", program, "ingest", str(collection), str(out), "--processes", "2"]
    generator, kills = np.random.default_rng(0), 0
    for _ in range(20):
        process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=float(generator.uniform(0.5, 6.0)))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            for path in out.rglob("*.zarr"):
                read_volume(path)
    assert kills
    ingest(collection, out, config=VolumeConfig(), processes=1, progress=False)
    ingest(collection, tmp_path / "whole", config=VolumeConfig(), processes=1, progress=False)
    for one, two in zip(read_index(tmp_path / "whole"), read_index(out), strict=True):
        assert read_attributes(one.path)["checksum"] == read_attributes(two.path)["checksum"]
    assert not list(out.rglob("*.partial"))


def test_a_disk_that_fills_up_is_named_and_what_stood_stays(collection, tmp_path):
    """Files may not grow over a limit, which fails as a full disk does."""
    out = tmp_path / "out"
    run(collection, out)
    index = (out / "index.csv").read_bytes()
    shutil.rmtree(out / "alpha" / "A-2.zarr")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        for on_error in ("raise", "skip"):  # a disk is no scan's fault: it is never skipped
            with pytest.raises(errors.StorageError, match=r"A-2\.zarr: cannot be written .*; free space") as caught:
                run(collection, out, on_error=on_error)
            assert "\n" not in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (out / "index.csv").read_bytes() == index
    assert sorted(path.name for path in out.rglob("*.zarr")) == ["A-1.zarr", "B-1.zarr"]
    assert not list(out.rglob("*.partial"))
    report = run(collection, out)
    assert (report.written, report.kept) == (1, 2)


def test_a_folder_of_several_series_asks_which_or_takes_each(tmp_path, write_series):
    for number in (1, 2):
        edit = partial(set_patient, f"Doe {number}")
        write_series(tmp_path / "many", shape=(5, 8, 8), uid=f"1.2.84.{number}", edit=edit)
    with pytest.raises(errors.SeveralSeries, match=r"2 series; .* --collection dicom-folder --series every$"):
        run(tmp_path / "many", tmp_path / "out")
    assert run(tmp_path / "many", tmp_path / "out", series="2").written == 1
    each = CollectionConfig(name="dicom-folder", series="every")
    report = run(tmp_path / "many", tmp_path / "each", collection=each)
    assert [(entry.hospital, entry.patient) for entry in report.index] == [
        ("local", "patient-0001"),
        ("local", "patient-0002"),
    ]


def set_patient(patient, _, dataset):
    dataset.PatientID = patient


def test_what_the_reader_may_mend_decides_and_is_part_of_the_volume(tmp_path, write_series):
    write_series(tmp_path / "tilted", shape=(6, 12, 12), step=(0.0, 1.0, 5.0))
    with pytest.raises(errors.GantryTilt, match=r"reader\.allow_tilt_correction"):
        run(tmp_path / "tilted", tmp_path / "out")
    mended = ReaderConfig(allow_tilt_correction=True)
    report = run(tmp_path / "tilted", tmp_path / "out", reader=mended)
    assert report.written == 1
    assert read_attributes(report.index[0].path)["reader"]["allow_tilt_correction"] is True
    assert run(tmp_path / "tilted", tmp_path / "out", reader=mended).kept == 1
    with pytest.raises(errors.GantryTilt):
        run(tmp_path / "tilted", tmp_path / "out")


def test_unreadable_and_circular_places_are_named_or_passed_by(collection, tmp_path):
    (collection / "dicom" / "a1" / "again").symlink_to(collection / "dicom" / "a1", target_is_directory=True)
    (collection / "dicom" / "a1" / "nowhere").symlink_to(collection / "absent")
    rows = [ROWS[0], ROWS[1], "B-2,beta,empty.nii.gz,,,,,,"]
    (collection / "empty.nii.gz").write_bytes(b"")
    write_manifest(collection / "manifest.csv", rows)
    report = run(collection, tmp_path / "out", on_error="skip")
    faults = dict(report.failed)
    assert "empty.nii.gz" in faults["beta/B-2"]
    assert "nowhere: cannot be read (No such file or directory)" in faults["alpha/A-1"]
    (collection / "dicom" / "a1" / "nowhere").unlink()
    report = run(collection, tmp_path / "out", on_error="skip")
    assert [entry.patient for entry in report.index] == ["A-1"]


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
