"""Preflight: every series and its fate, duplicates across hospitals, and nothing that says who a patient is."""

import csv
import io
import re

import numpy as np
import pytest
from PIL import Image
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from rich.console import Console

from capsfl import cli
from capsfl.ct.collections import CollectionConfig
from capsfl.ct.deidentify import WITHHELD, identifying_words, shown
from capsfl.ct.errors import ManifestError, WrongLayout
from capsfl.ct.preflight import check
from capsfl.report.preflight import print_preflight, write_preflight

SHAPE = (6, 12, 12)
TEXT = {"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UT"}
NEEDED = {
    *("Modality", "ImageType", "PhotometricInterpretation", "SOPClassUID", "BurnedInAnnotation", "RescaleType"),
    *("PatientID", "PatientName"),
}
IDENTIFYING = [
    *("PatientAddress", "PatientComments", "PatientMotherBirthName", "OtherPatientNames", "ReferringPhysicianName"),
    *("PerformingPhysicianName", "OperatorsName", "InstitutionName", "InstitutionAddress", "StationName", "StudyID"),
    *("AccessionNumber", "StudyDescription", "SeriesDescription", "ProtocolName", "ImageComments", "RequestingService"),
    *("AdmissionID", "ContrastBolusAgent", "DeviceSerialNumber", "BodyPartExamined", "ReasonForStudy"),
]


def look(source, out, **arguments):
    """The preflight, all that was written, and what the console showed."""
    found = check(source, processes=1, progress=False, **arguments)
    console = Console(file=io.StringIO(), width=200)
    write_preflight(found, out)
    print_preflight(found, console)
    files = [path for path in out.rglob("*") if path.is_file()]
    written = "\n".join(path.name + "\n" + path.read_text() for path in files)
    assert isinstance(console.file, io.StringIO)
    return found, written, console.file.getvalue()


def plant(_, dataset):
    """Write the patient into every text that a header can hold, those that are shown included."""
    for keyword in IDENTIFYING:
        setattr(dataset, keyword, "DOE JANE")
    dataset.PatientName, dataset.PatientID = "Doe^Jane", "MRN7700123"
    dataset.PatientBirthDate, dataset.StudyDate, dataset.SeriesTime = "19610314", "20200311", "101500"
    dataset.add(DataElement(0x00091010, "LO", "Doe^Jane private"))
    for element in dataset:
        if element.VR in TEXT and element.keyword not in NEEDED:
            element.value = "DOE JANE"


def test_nothing_written_or_shown_identifies_a_patient(tmp_path, write_series):
    tree = tmp_path / "Jane Doe 1961" / "MRN7700123"
    for number in (1, 2):
        write_series(tree / f"Doe_{number}", shape=SHAPE, uid=f"1.2.840.99.{number}", edit=plant)

    def refused(index, dataset):
        plant(index, dataset)
        if index == 3:
            dataset.ImagePositionPatient = [-12.0, -9.0, 47.25]

    paths = write_series(tree / "Doe_3", shape=SHAPE, uid="1.2.840.99.3", edit=refused)
    for number, path in enumerate(paths):
        path.rename(path.with_name(f"DOE.{number}"))
    write_series(tree / "Doe_4", shape=(2, 8, 8), uid="1.2.840.99.4", edit=plant)
    (tree / "notes.janedoe").write_text("x")
    found, written, console = look(tmp_path / "Jane Doe 1961", tmp_path / "out")
    assert [finding.accepted for finding in found.findings] == [True, True, False, False]
    text = re.sub(r"\s+", " ", written + console).lower()
    for secret in ("doe", "jane", "mrn7700123", "7700123", "1961", "0314", "20200311", "1.2.840.99", str(tmp_path)):
        assert secret.lower() not in text, secret
    # Scanner and kernel, where a name had slipped in, are withheld rather than shown or lost.
    assert {finding.kernel for finding in found.findings} == {WITHHELD}
    assert {finding.scanner for finding in found.findings} == {WITHHELD}
    assert "InconsistentGeometry" in written or "MissingSlices" in written


def test_reasons_name_no_file_and_no_series(tmp_path, write_series):
    def twice(index, dataset):
        if index == 5:
            dataset.ImagePositionPatient = [-12.0, -9.0, 50.0]

    for number, path in enumerate(write_series(tmp_path / "roe family" / "x", shape=SHAPE, edit=twice)):
        path.rename(path.with_name(f"roejunior{number}.dcm"))
    for uid, kernel in (("1.2.840.77.1", "B40f"), ("1.2.840.77.2", "B70f")):
        write_series(
            tmp_path / "two", shape=SHAPE, uid=uid, edit=lambda _, d, k=kernel: setattr(d, "ConvolutionKernel", k)
        )
    (tmp_path / "m.csv").write_text("patient,hospital,image\nP1,h,roe family/x\nP2,h,two\n")
    found, written, console = look(tmp_path / "m.csv", tmp_path / "out")
    assert [finding.fault for finding in found.findings] == ["DuplicatePositions", "SeveralSeries"]
    assert "differ at one position" in found.findings[0].reason
    assert "kernel B70f" in found.findings[1].remedy
    for secret in ("roe", "77.1", "77.2", str(tmp_path)):
        assert secret not in (written + console).lower(), secret


def test_technical_values_are_shown_where_nobody_stands_in_them(tmp_path, write_series):
    def edit(_, dataset):
        dataset.PatientName, dataset.PatientID = "Siemens^Werner", "128"

    path, *_ = write_series(tmp_path / "a", shape=SHAPE, edit=edit)
    words = identifying_words(path)
    assert {"siemens", "werner"} <= words
    assert shown("ACME Scan 128", words) == "ACME Scan 128"
    assert shown("128", words) == WITHHELD, "all of a value is the patient's whole id"
    assert shown("SIEMENS Sensation", words) == WITHHELD
    (tmp_path / "b").write_text("no DICOM")
    assert identifying_words(tmp_path / "b") == frozenset()


def test_short_names_whole_ids_and_sequences_identify_too(tmp_path, write_series):
    def edit(_, dataset):
        dataset.SpecificCharacterSet = "ISO_IR 192"
        dataset.PatientName, dataset.PatientID = "Li^王", "4711"
        inner, outer = Dataset(), Dataset()
        inner.ReferringPhysicianName, inner.PatientID = "Ng", "AB-1"
        outer.OtherPatientIDsSequence = [inner]
        dataset.RequestAttributesSequence = [outer]

    path, *_ = write_series(tmp_path / "a", shape=SHAPE, edit=edit)
    words = identifying_words(path)
    for text in ("Scan Li", "Scan 王", "GE 4711", "dr. NG", "kernel AB 1"):
        assert shown(text, words) == WITHHELD, text
    for text in ("Light", "B40f", "AB", "Scan 1", "GE 47", "king"):
        assert shown(text, words) == text


@pytest.fixture
def tree(tmp_path, write_series):
    """Two usable series of different patients, one tilted, one without rescale, one too small, and a text."""

    def of(patient, **changes):
        def edit(index, dataset):
            dataset.PatientID = patient
            for keyword, value in changes.items():
                setattr(dataset, keyword, value)

        return edit

    def bare(_, dataset):
        dataset.PatientID = "p4"
        del dataset.RescaleSlope
        del dataset.RescaleIntercept

    root = tmp_path / "tree"
    write_series(root / "a", shape=SHAPE, uid="1.1", edit=of("p1", ConvolutionKernel="B70f"))
    write_series(root / "b", shape=SHAPE, uid="1.2", origin=(-12.0, -9.0, 31.0), edit=of("p2"))
    write_series(root / "c", shape=SHAPE, uid="1.3", step=(0.0, 2.0, 5.0), edit=of("p3"))
    write_series(root / "d", shape=SHAPE, uid="1.4", edit=bare)
    write_series(root / "e", shape=(2, 12, 12), uid="1.5", edit=of("p5"))
    (root / "notes.txt").write_text("x")
    return root


def test_every_series_of_a_tree_is_used_or_refused_with_its_reason(tree, tmp_path):
    found, _, console = look(tree, tmp_path / "out")
    assert [(finding.patient, finding.fault) for finding in found.findings] == [
        ("patient-0001", ""),
        ("patient-0002", ""),
        ("patient-0003", "GantryTilt"),
        ("patient-0004", "TooFewSlices"),
        ("patient-0005", "MissingRescale"),
    ]
    assert found.notes == ("files passed by: 1 x not DICOM",)
    first = found.findings[0]
    assert (first.images, first.rows, first.columns, first.spacing_mm) == (6, 12, 12, (5.0, 2.0, 3.0))
    assert (first.scanner, first.kernel, first.tube_voltage_kv) == ("ACME Scan 1", "B70f", 120.0)
    assert sum(first.histogram) == 6 * 12 * 12
    assert first.padding_share == 0
    assert "GantryTilt: gantry tilt of 21.8 degrees" in console
    with (tmp_path / "out" / "local.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["accepted"] for row in rows] == ["1", "1", "0", "0", "0"]
    assert rows[2]["reason"].startswith("gantry tilt of 21.8 degrees")
    page = (tmp_path / "out" / "local.html").read_text()
    assert "2 of 5" in page
    assert not re.search(r"https?://(?!www\.w3\.org)|<script|src=\"(?!data:)|<link", page), "one file, no network"


def test_a_tree_without_series_is_told_how_to_say_what_it_is(tmp_path):
    (tmp_path / "tree").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "tree" / "a.png")
    with pytest.raises(WrongLayout, match=r"found 1 x \.png file, not DICOM; say what .* --collection"):
        check(tmp_path / "tree", processes=1, progress=False)


def test_padding_and_lungs_are_measured(shared_data, tmp_path):
    (tmp_path / "m.csv").write_text(
        "patient,hospital,image\nricord,h,ricord1a-covid-ct-jpegll\nsiemens,h,lung-pet-ct-dx-siemens\n"
    )
    found, _, _ = look(tmp_path / "m.csv", tmp_path / "out", root=shared_data)
    ricord, siemens = found.findings
    assert siemens.lung_ml is not None
    assert ricord.lung_ml is not None
    assert 2500 < siemens.lung_ml < 3100
    assert 2500 < ricord.lung_ml < 3400
    assert siemens.padding_share == 0
    assert ricord.padding_share == pytest.approx(1 - np.pi / 4, abs=0.03), "a circle in a square"
    assert (siemens.scanner, siemens.kernel) == ("SIEMENS Sensation 10", "B40f")
    assert ricord.encoding.startswith("JPEG Lossless")
    assert found.shared == ()


def test_patients_and_images_that_two_hospitals_hold_are_found(tmp_path, write_series):
    def of(patient):
        def edit(_, dataset):
            dataset.PatientID = patient

        return edit

    write_series(tmp_path / "a1", shape=SHAPE, uid="1.1", edit=of("anna"))
    write_series(tmp_path / "a2", shape=SHAPE, uid="1.2", origin=(-12.0, -9.0, 31.0), edit=of("bert"))
    # The same patient, another scan; and the same pixels under another name, as an export would have them.
    write_series(tmp_path / "b1", shape=SHAPE, uid="1.3", origin=(-12.0, -9.0, 33.0), edit=of("anna"))
    write_series(tmp_path / "b2", shape=(5, 12, 12), uid="1.4", origin=(-12.0, -9.0, 31.0), slope=0.5, edit=of("cleo"))
    write_series(tmp_path / "b3", shape=SHAPE, uid="1.5", origin=(-12.0, -9.0, 34.0), edit=of("dora"))
    (tmp_path / "m.csv").write_text("patient,hospital,image\nA1,a,a1\nA2,a,a2\nB1,b,b1\nB2,b,b2\nB3,b,b3\n")
    found, written, console = look(tmp_path / "m.csv", tmp_path / "out")
    assert [(pair.first, pair.second, pair.same_patient, pair.images) for pair in found.shared] == [
        (("a", "A1"), ("b", "B1"), True, 0),
        (("a", "A2"), ("b", "B2"), False, 5),
    ]
    assert all(pair.across_hospitals for pair in found.shared)
    assert "a/A2 and b/B2 share 5 equal images" in console
    assert written.count("a/A1 and b/B1 share one patient&#39;s id") == 2
    again, _, _ = look(tmp_path / "m.csv", tmp_path / "again")
    assert again.findings[0].identity != found.findings[0].identity, "hashes end with their run"


def test_a_person_at_two_institutions_of_a_tree_is_found(tmp_path, write_series):
    for number, site in enumerate(("north", "south")):

        def edit(_, dataset, site=site):
            dataset.PatientID, dataset.InstitutionName = "anna", site

        write_series(tmp_path / site, shape=SHAPE, uid=f"1.{number}", origin=(-12.0, -9.0, 30.0 + number), edit=edit)
    found = check(tmp_path, processes=1, progress=False)
    (pair,) = found.shared
    assert (pair.first, pair.second) == (("site-0001", "patient-0001"), ("site-0002", "patient-0001-s2"))
    assert pair.same_patient
    assert pair.across_hospitals
    assert "1 person with scans in several hospitals: all scans count with the hospital of the first" in found.notes


def test_pictures_show_what_their_files_give_away(tmp_path):
    rng = np.random.default_rng(0)
    for kind, mode, suffix in (("COVID", "RGBA", "png"), ("normal", "L", "jpg")):
        for number in range(3):
            grey = rng.integers(0, 256, (30 + number, 40), np.uint8)
            (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey).convert(mode).save(tmp_path / "set" / kind / f"p{number}.{suffix}")
    (tmp_path / "set" / "normal" / "p9.png").write_text("broken")
    found, written, _ = look(tmp_path / "set", tmp_path / "out", collection=CollectionConfig(name="image-folder"))
    assert [finding.fault for finding in found.findings].count("WrongFormat") == 1
    for formats in ("3 x PNG RGBA", "3 x JPEG L"):
        assert formats in written
    assert "31 × 40" in written
    assert "grey values, not Hounsfield units" in written


def test_one_slice_published_twice_is_found_whatever_its_size_and_window(tmp_path):
    rng = np.random.default_rng(0)

    def smooth(seed):
        small = np.random.default_rng(seed).integers(0, 256, (9, 12), np.uint8)
        return Image.fromarray(small).resize((160, 120), Image.Resampling.BICUBIC)

    for number in range(6):
        for kind in ("COVID", "normal"):
            (tmp_path / "set" / kind).mkdir(parents=True, exist_ok=True)
            smooth(10 * number + len(kind)).save(tmp_path / "set" / kind / f"p{number}_1.png")
    again = smooth(5).resize((77, 51), Image.Resampling.BILINEAR).point(lambda grey: 30 + 0.6 * grey)
    again = Image.fromarray(np.clip(np.asarray(again) + rng.normal(0, 3, (51, 77)), 0, 255).astype(np.uint8))
    again.save(tmp_path / "set" / "normal" / "p7_1.jpg", quality=60)
    config = CollectionConfig(name="image-folder")
    found, written, _ = look(tmp_path / "set", tmp_path / "out", collection=config)
    (pair,) = found.shared
    assert (pair.same_patient, pair.images, pair.alike, pair.classes_differ) == (False, 0, 1, True)
    assert "share 1 picture that look alike, under different classes" in written
    left = config.model_copy(update={"leave_out": (pair.second[1],)})
    found, _, _ = look(tmp_path / "set", tmp_path / "left", collection=left)
    assert found.shared == ()
    assert found.notes == ("1 entries are left out as asked",)
    with pytest.raises(ManifestError, match="leave_out = 'nobody': no such patient"):
        check(tmp_path / "set", collection=config.model_copy(update={"leave_out": ("nobody",)}), progress=False)


def test_the_real_covid_ct_has_two_slices_under_both_classes(shared_data, tmp_path):
    """Published as COVID in the test list and as non-COVID in the training list: none is equal, both are the same."""
    config = CollectionConfig(name="covid-ct")
    found, _, _ = look(shared_data / "covid-ct", tmp_path / "out", collection=config)
    assert {(pair.first[1], pair.second[1]) for pair in found.shared} == {
        ("crawled_patient_71", "Patient-195"),
        ("crawled_patient_71", "Patient-196"),
    }
    assert all(pair.alike == 1 and pair.images == 0 and pair.classes_differ for pair in found.shared)


def test_the_command_checks_without_storing(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        cli.main(["ingest", str(tree), "--check", "--processes", "1"])
    assert done.value.code == 3
    assert sorted(path.name for path in (tmp_path / "preflight").iterdir()) == ["local.csv", "local.html"]
    assert "page: preflight/local.html" in capsys.readouterr().out
    for name in "cde":
        for path in (tree / name).iterdir():
            path.unlink()
    with pytest.raises(SystemExit) as done:
        cli.main(["ingest", str(tree), str(tmp_path / "looked"), "--check", "--processes", "1"])
    assert done.value.code == 0
    assert not list((tmp_path / "looked").rglob("*.zarr"))


def test_the_command_names_what_does_not_fit_together(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        ([str(tree)], "out: missing; name a folder for the volumes, or add --check"),
        ([str(tree), "out", "--side", "64"], "side: only with --collection"),
        ([str(tree), "out", "--collection", "covid"], 'capsfl ingest: collection = "covid": Input should be'),
        ([str(tree), "out", "--collection", "covid-ct"], "not COVID-CT: expected Images/CT_NonCOVID"),
        ([str(tree), "out", "--collection", "cc-19", "--alpha", "0"], "alpha = 0.0: Input should be greater than 0"),
    ):
        with pytest.raises(SystemExit) as done:
            cli.main(["ingest", *words])
        assert done.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
