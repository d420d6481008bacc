"""Listing the series of a folder tree: every file accounted for, nothing opened that hangs, no pixel decoded."""

import logging
import os
import socket
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian

from capsfl.ct import errors, headers, pixels, series
from capsfl.ct.dicom import ReaderConfig, read_dicom, read_series, scan_folder
from capsfl.ct.walk import walk

ODD_NAMES = ("with space", "50%20 %s {x}", "Röntgen-肺", "two\nlines", os.fsdecode(b"latin-\xe9"), "-rf", "*?[a]")


def test_every_file_is_in_a_series_or_skipped_or_broken(tmp_path, write_series):
    good = write_series(tmp_path / "a", uid="1.2.3.100")
    few = write_series(tmp_path / "b", uid="1.2.3.200", shape=(2, 10, 8))
    scout = write_series(
        tmp_path / "c",
        uid="1.2.3.300",
        edit=lambda _, ds: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]),
    )
    (tmp_path / "c" / "notes.txt").write_text("no image")
    (tmp_path / "c" / "empty").touch()
    bad = tmp_path / "d" / "broken.dcm"
    bad.parent.mkdir()
    bad.write_bytes(b"no DICOM" * 99)
    listing = scan_folder(tmp_path)
    assert [len(one.slices) for one in listing.series] == [6, 2]
    assert [type(one.refusal) for one in listing.series] == [type(None), errors.TooFewSlices]
    assert {reason for _, reason in listing.skipped} == {"localizer", ".txt file, not DICOM", "empty file"}
    assert [path for path, _ in listing.broken] == [bad]
    accounted = [file for one in listing.series for file in one.files]
    accounted += [path for path, _ in (*listing.skipped, *listing.broken)]
    assert sorted(accounted) == sorted(
        [*good, *few, *scout, bad, tmp_path / "c" / "notes.txt", tmp_path / "c" / "empty"]
    )


def test_a_series_says_what_it_is_without_its_pixels(tmp_path, write_series, monkeypatch):
    write_series(tmp_path, orientation=(0.0, 1.0, 0.0, 0.0, 0.0, -1.0))
    monkeypatch.setattr("capsfl.ct.pixels._frames", None)  # whoever decodes fails
    (one,) = scan_folder(tmp_path, salt=b"s").accepted
    assert (one.rows, one.columns, one.pixel_spacing_mm, one.slice_spacing_mm) == (10, 8, (2.0, 3.0), 5.0)
    assert (one.plane, one.transfer_syntax, one.facts.kernel) == ("sagittal", "Explicit VR Little Endian", "B40")
    assert one.pseudonym == scan_folder(tmp_path, salt=b"s").series[0].pseudonym
    assert one.pseudonym != scan_folder(tmp_path, salt=b"t").series[0].pseudonym
    assert "SECRET" not in repr(one)
    assert str(one) == "1: 6 slices of 10x8, 2.000 mm, kernel B40", "the UID identifies a person's examination"


def test_pixels_are_decoded_once_and_only_of_the_chosen_series(tmp_path, write_series, monkeypatch):
    wanted = write_series(tmp_path, uid="1.2.3.100")
    write_series(tmp_path, uid="1.2.3.200")
    decoded = []

    def frames(path, slices, real=pixels._frames):
        decoded.append(path)
        return real(path, slices)

    monkeypatch.setattr(pixels, "_frames", frames)
    read_dicom(tmp_path, series="1")
    assert sorted(decoded) == sorted(wanted)


def test_a_listed_series_is_read_as_if_named(tmp_path, write_series):
    write_series(tmp_path, uid="1.2.3.100")
    write_series(tmp_path, uid="1.2.3.200", shape=(5, 10, 8))
    for one in scan_folder(tmp_path).series:
        scan = read_series(one)
        assert (scan.hu == read_dicom(tmp_path, series=str(one.number)).hu).all()


def test_a_refused_series_carries_the_error_that_reading_it_raises(tmp_path, write_series):
    write_series(tmp_path / "gap", uid="1.2.3.1")[3].unlink()
    write_series(tmp_path / "tilt", uid="1.2.3.2", step=(0.0, 1.0, 5.0))
    write_series(tmp_path / "scale", uid="1.2.3.3", edit=lambda _, ds: delattr(ds, "RescaleSlope"))
    write_series(tmp_path / "colour", uid="1.2.3.4", edit=lambda _, ds: setattr(ds, "SamplesPerPixel", 3))
    expected = (errors.MissingSlices, errors.GantryTilt, errors.MissingRescale, errors.UnsupportedColor)
    listing = scan_folder(tmp_path)
    assert [type(one.refusal) for one in listing.series] == list(expected)
    for one, error in zip(listing.series, expected, strict=True):
        with pytest.raises(error):
            read_series(one)
    assert [len(one.files) for one in listing.series] == [5, 6, 6, 6]
    mended = scan_folder(tmp_path, config=ReaderConfig(allow_interpolation=True, allow_tilt_correction=True))
    assert [one.refusal is None for one in mended.series] == [True, True, False, False]


def test_a_broken_file_refuses_the_series_that_has_its_folder_for_itself(tmp_path, write_series):
    files = write_series(tmp_path / "a", uid="1.2.3.100")
    write_series(tmp_path / "b", uid="1.2.3.200")
    write_series(tmp_path / "c", uid="1.2.3.300")
    write_series(tmp_path / "c", uid="1.2.3.400")
    for folder in "ac":
        (tmp_path / folder / "lost.dcm").write_bytes(files[0].read_bytes()[:200])
    refused = [one.refusal is not None for one in scan_folder(tmp_path).series]
    assert refused == [True, False, False, False]


def test_processes_find_what_one_finds(tmp_path, write_series, monkeypatch):
    for number in range(3):
        write_series(tmp_path / str(number), uid=f"1.2.3.{number}", shape=(20, 4, 4))
    alone = scan_folder(tmp_path, salt=b"s", processes=1)
    monkeypatch.setattr(series, "FILES_PER_WORKER", 20)
    monkeypatch.setattr(series, "FILES_PER_TASK", 7)
    together = scan_folder(tmp_path, salt=b"s", processes=2)
    for one, other in zip(alone.series, together.series, strict=True):
        assert (one.uid, one.slices, one.pseudonym, str(one)) == (other.uid, other.slices, other.pseudonym, str(other))


def test_a_bar_is_drawn_only_when_asked_for_and_worth_it(tmp_path, write_series, monkeypatch, capsys):
    write_series(tmp_path)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if on a terminal

    def drawn(**options) -> str:
        scan_folder(tmp_path, **options)
        return capsys.readouterr().err

    assert drawn(progress=True) == ""
    monkeypatch.setattr(series, "FILES_WORTH_A_BAR", 3)
    assert drawn() == ""
    assert "6/6" in drawn(progress=True)
    monkeypatch.setenv("FORCE_COLOR", "")
    assert drawn(progress=True) == ""


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_read_and_named_on_one_printable_line(tmp_path, write_series, name, caplog):
    files = write_series(tmp_path / name)
    with caplog.at_level(logging.INFO):
        assert read_dicom(tmp_path / name).hu.shape[0] == 6
        (tmp_path / name / f"{name}.txt").touch()
        files[2].unlink()
        with pytest.raises(errors.MissingSlices) as caught:
            read_dicom(tmp_path / name)
    for text in (str(caught.value), *caplog.messages):
        assert text.isprintable()
        text.encode("utf-8")


def test_links_in_a_circle_end_and_links_out_of_the_folder_are_followed(tmp_path, write_series):
    write_series(tmp_path / "elsewhere")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "scan").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (folder / "scan" / "back").symlink_to(folder)
    assert read_dicom(folder).hu.shape[0] == 6
    listing = scan_folder(folder)
    assert {reason for _, reason in listing.skipped} == {"link to a folder that was read already"}
    assert len(listing.series[0].files) == 6


def test_links_to_nowhere_or_to_themselves_are_named(tmp_path, write_series):
    write_series(tmp_path / "scan")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    listing = scan_folder(tmp_path)
    assert {path.name for path, _ in listing.broken} == {"nowhere", "self"}
    with pytest.raises(errors.Unreadable, match="nowhere: cannot be read"):
        read_dicom(tmp_path)


def test_pipes_and_sockets_are_passed_by_unopened(tmp_path, write_series, monkeypatch):
    write_series(tmp_path)
    os.mkfifo(tmp_path / "pipe.dcm")
    monkeypatch.chdir(tmp_path)  # a socket's path has to be short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("socket.dcm")
        listing = scan_folder(tmp_path)
    assert [path.name for path, _ in listing.skipped] == ["pipe.dcm", "socket.dcm"]
    assert read_dicom(tmp_path).hu.shape[0] == 6
    with pytest.raises(errors.NoSeries, match="not a file or folder"):
        read_dicom(tmp_path / "pipe.dcm")
    with pytest.raises(errors.Unreadable, match="not a regular file"):
        read_dicom([tmp_path / "pipe.dcm"])


def test_a_folder_or_file_that_cannot_be_opened_is_named(tmp_path, write_series, monkeypatch):
    files = write_series(tmp_path / "scan")
    (tmp_path / "locked").mkdir()
    denied = PermissionError(13, "Permission denied")

    def listdir(folder, real=os.listdir):
        if Path(folder).name == "locked":
            raise denied
        return real(folder)

    # By hand, since the administrator may open everything.
    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(errors.Unreadable, match=r"locked: cannot be read \(Permission denied\)"):
        read_dicom(tmp_path)
    monkeypatch.undo()

    def opened(path, *arguments, real=Path.open):
        if path == files[1]:
            raise denied
        return real(path, *arguments)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(errors.Unreadable, match=f"{files[1].name}: cannot be read"):
        read_dicom(tmp_path / "scan")


def test_files_of_other_systems_are_no_broken_dicom(tmp_path, write_series):
    files = write_series(tmp_path)
    (tmp_path / f"._{files[0].name}").write_bytes(b"\0\5\x16\7" + bytes(200))
    assert read_dicom(tmp_path).hu.shape[0] == 6
    assert walk(tmp_path).skipped == [(tmp_path / f"._{files[0].name}", "macOS resource fork")]


def test_a_series_without_a_uid_is_held_together_by_its_folder(tmp_path, write_series):
    for folder in "ab":
        write_series(tmp_path / folder, edit=lambda _, ds: delattr(ds, "SeriesInstanceUID"))
    assert [len(one.slices) for one in scan_folder(tmp_path).accepted] == [6, 6]


def test_a_truncated_file_is_found_before_its_pixels_are_read(tmp_path, write_series):
    files = write_series(tmp_path, shape=(6, 64, 64))
    files[1].write_bytes(files[1].read_bytes()[:-4000])
    (one,) = scan_folder(tmp_path).series
    assert isinstance(one.refusal, errors.CorruptFile)
    assert "truncated" in str(one.refusal)


def test_more_voxels_than_allowed_are_refused_unread(tmp_path, write_series):
    write_series(tmp_path)
    assert read_dicom(tmp_path, config=ReaderConfig(max_voxels=480)).hu.size == 480
    with pytest.raises(errors.TooLarge, match=r"6 x 10 x 8 voxels; raise reader\.max_voxels = 479"):
        read_dicom(tmp_path, config=ReaderConfig(max_voxels=479))


def test_deflated_data_sets_are_read_and_bombs_among_them_refused(tmp_path, write_series, monkeypatch):
    files = write_series(tmp_path / "plain", shape=(6, 64, 64))
    (tmp_path / "deflated").mkdir()
    for file in files:
        dataset = pydicom.dcmread(file)
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.save_as(tmp_path / "deflated" / file.name)
    assert (read_dicom(tmp_path / "deflated").hu == read_dicom(tmp_path / "plain").hu).all()
    monkeypatch.setattr(headers, "MOST_UNPACKED_BYTES", 4096)
    with pytest.raises(errors.TooLarge, match="unpacks to more than"):
        read_dicom(tmp_path / "deflated")
    # Without a preamble, and with a file header that puts the transfer syntax far into the file.
    whole = (tmp_path / "deflated" / files[0].name).read_bytes()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "1.dcm").write_bytes(whole[132:])
    private = b"\x02\0\x01\0OB\0\0" + (1 << 17).to_bytes(4, "little") + bytes(1 << 17)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "1.dcm").write_bytes(whole[:144] + private + whole[144:])
    for place in ("bare", "far"):
        ((_, error),) = scan_folder(tmp_path / place).broken
        assert isinstance(error, errors.TooLarge), place


def test_people_without_an_id_are_told_apart_by_study_and_else_by_folder(tmp_path, write_series):
    def forget(_, dataset):
        dataset.PatientID = "Anonymous"
        del dataset.StudyInstanceUID

    for folder, study in (("a", "1.9.1"), ("b", "1.9.1"), ("c", "1.9.2")):

        def edit(_, dataset, study=study):
            dataset.PatientID, dataset.StudyInstanceUID = "Anonymous", study

        write_series(tmp_path / folder, uid=f"1.2.{ord(folder)}", edit=edit)
    for folder in "de":
        write_series(tmp_path / folder, uid=f"1.2.{ord(folder)}", edit=forget)
    listed = scan_folder(tmp_path, salt=b"s").series
    names = {one.files[0].parent.name: one.pseudonym for one in listed}
    assert names["a"] == names["b"]
    assert len(set(names.values())) == 4
    assert not any(read_series(one).source.patient_known for one in listed)
    write_series(tmp_path / "f", uid="1.2.7")
    assert read_dicom(tmp_path / "f").source.patient_known
