"""New scans through a trained study: a folder tree of good and bad series, every file it leaves, and the page."""

import csv
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest

from capsfl.ct.dicom import read_dicom
from capsfl.ct.dicom_seg import Algorithm
from capsfl.ct.errors import StorageError
from capsfl.ct.export import write_nifti_mask
from capsfl.ct.scan import Scan
from capsfl.learning.segmentation import SegmentationConfig
from capsfl.ledger.chain import Ledger
from capsfl.predict import run
from capsfl.predict.model import Answer
from capsfl.predict.run import predict_one
from capsfl.predict.scans import find_scans

pytestmark = pytest.mark.journey

NOTICE = "not for clinical use"


def edit_series(folder: Path, **elements: str) -> None:
    """Changes elements of every file of a folder."""
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        dataset.save_as(path)


@pytest.fixture(scope="module")
def inbox(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good series, two of one patient, a NIfTI volume, a series that is cut short, and a letter."""
    place = tmp_path_factory.mktemp("tree") / "inbox"
    series = phantom / "hospital-A" / "A-002"
    shutil.copytree(series, place / "first")
    shutil.copytree(series, place / "first" / "sécond read%")
    edit_series(place / "first" / "sécond read%", SeriesInstanceUID="1.2.826.77")
    shutil.copytree(phantom / "hospital-C" / "C-002", place / "third")
    edit_series(place / "third", PatientName="Doe^Jane", PatientBirthDate="19510203")
    shutil.copytree(series, place / "cut")
    edit_series(place / "cut", SeriesInstanceUID="1.2.826.78")
    slice_ = sorted((place / "cut").iterdir())[3]
    slice_.write_bytes(slice_.read_bytes()[:-5000])
    scan = read_dicom(phantom / "hospital-B" / "B-001")
    write_nifti_mask(place / "volume.nii.gz", scan.hu, scan)
    (place / "letter.txt").write_text("Dear colleague")
    return place


@pytest.fixture(scope="module")
def predicted(study, inbox: Path, tmp_path_factory: pytest.TempPathFactory, capsfl):
    """The tree predicted by the command, over what a killed command had left."""
    out = tmp_path_factory.mktemp("predicted") / "out"
    (out / ".first.partial").mkdir(parents=True)
    (out / ".first.partial" / "mask.nii.gz").touch()
    answer = capsfl("predict", study.run, inbox, "--out", out, expect=3)
    return out, answer


def test_every_good_series_gets_a_folder_and_the_bad_one_is_named(predicted):
    out, answer = predicted
    names = {"first", "first-s-cond-read", "third", "volume"}
    assert {path.name for path in out.iterdir()} == names | {f"predictions.{kind}" for kind in ("json", "csv", "html")}
    lines = [line for line in answer.out.splitlines() if line.startswith("left out")]
    assert len(lines) == 1
    assert lines[0].startswith("left out cut: ")
    assert "truncated" in lines[0]
    for name in names:
        assert re.search(rf"^{name} .* \d+ lesion +0\.\d{{3}}", answer.out, re.MULTILINE), answer.out
    files = {"mask.nii.gz", "probability.nii.gz", "overlay.png", "prediction.json"}
    assert {path.name for path in (out / "volume").iterdir()} == files
    pytest.importorskip("highdicom", reason="the extra `seg` is not installed")
    assert {path.name for path in (out / "third").iterdir()} == files | {"mask.dcm"}


def test_every_file_says_what_it_is_not_for(predicted):
    out, _ = predicted
    for name in ("predictions.json", "predictions.csv", "predictions.html", "third/prediction.json"):
        assert NOTICE in (out / name).read_text(), name
    for name in ("mask", "probability"):
        header = nibabel.Nifti1Image.from_filename(out / "third" / f"{name}.nii.gz").header
        assert NOTICE in bytes(header["descrip"]).decode()
    assert NOTICE in predicted[1].out
    with (out / "predictions.csv").open() as stream:
        assert {row["notice"] for row in csv.DictReader(stream)} == {NOTICE}


def test_the_model_is_the_one_that_the_ledger_recorded(study, predicted):
    out, _ = predicted
    row = json.loads((out / "third" / "prediction.json").read_text())
    with Ledger.open(study.run / "federated" / "ledger") as ledger:
        assert row["ledger_head"] == ledger.blocks()[-1].hash().hex()
        last = {record.task: record for record in ledger.rounds()}
    for task, record in last.items():
        assert row["models"][task]["digest"] == record.parameters_digest
        assert row["models"][task]["round"] == record.round == 2
    with (out / "predictions.csv").open() as stream:
        rows = {row["scan"]: row for row in csv.DictReader(stream)}
    assert rows["third"]["model_segmentation"] == last["segmentation"].parameters_digest
    assert rows["third"]["ledger_head"] == row["ledger_head"]
    assert float(rows["third"]["probability"]) == row["probability"]
    assert "truncated" in rows["cut"]["fault"]


def test_a_patient_with_two_series_has_one_probability(predicted):
    out, _ = predicted
    summary = json.loads((out / "predictions.json").read_text())
    rows = {row["scan"]: row for row in summary["scans"]}
    by_scans = {tuple(row["scans"]): row["probability"] for row in summary["patients"]}
    assert by_scans.keys() == {("first", "first-s-cond-read"), ("third",), ("volume",)}
    assert by_scans["third",] == pytest.approx(rows["third"]["probability"])
    # top_slices = 2 of both series together: the highest one of each, for they show the same.
    highest = 1 - min(image[0] for image in rows["first"]["image_probabilities"])
    assert by_scans["first", "first-s-cond-read"] == pytest.approx(highest)
    assert highest > rows["first"]["probability"]


def test_the_page_stands_on_its_own_and_shows_the_pictures(predicted):
    out, _ = predicted
    page = (out / "predictions.html").read_text()
    outside = [link for link in re.findall(r'(?:src|href)="([^"]*)"', page) if not link.startswith(("data:", "#"))]
    assert outside == []
    assert page.count("data:image/jpeg;base64,") == 4
    assert "cut" in page
    assert "first, first-s-cond-read" in page, "the patient with two scans"


def test_nothing_names_the_patient(predicted):
    out, answer = predicted
    assert "Jane" not in answer.out + answer.err
    for path in out.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert b"Jane" not in content, path
            assert b"19510203" not in content, path


def test_the_seg_lies_on_its_slices_and_names_the_model(inbox: Path, predicted):
    pytest.importorskip("highdicom", reason="the extra `seg` is not installed")
    out, _ = predicted
    seg = pydicom.dcmread(out / "third" / "mask.dcm")
    row = json.loads((out / "third" / "prediction.json").read_text())
    algorithm = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == "capsfl segcaps"
    for digest in (row["models"]["segmentation"]["digest"], row["ledger_head"], row["configuration_hash"]):
        assert digest in algorithm.AlgorithmParameters
    uids = {pydicom.dcmread(path).SOPInstanceUID for path in (inbox / "third").iterdir()}
    assert {i.ReferencedSOPInstanceUID for i in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence} == uids
    mask = np.asarray(nibabel.Nifti1Image.from_filename(out / "third" / "mask.nii.gz").dataobj)
    assert seg.pixel_array.sum() == mask.sum()
    assert row["patient_identity"] == "removed"


@pytest.fixture
def model(predicted) -> Any:
    """The networks as they were, which answer without being asked: a ball in the middle of the scan."""
    record = json.loads((predicted[0] / "third" / "prediction.json").read_text())

    def answer(scan: Scan) -> Answer:
        index = np.moveaxis(np.indices(scan.hu.shape), 0, -1) - np.array(scan.hu.shape) / 2
        ball = np.linalg.norm(index * scan.spacing_mm, axis=-1) < 40
        return Answer(ball, ball.astype(np.float32), None)

    return SimpleNamespace(
        answer=answer,
        target="lesion",
        facts={name: record[name] for name in ("arm", "models", "ledger_head", "configuration_hash")},
        algorithm=Algorithm("capsfl segcaps", "0", "0"),
        classes=("class 0", "class 1"),
        config=SimpleNamespace(segmentation=SegmentationConfig()),
    )


def test_a_second_prediction_replaces_the_first_and_names_the_patient_if_asked(model: Any, inbox: Path, tmp_path: Path):
    found = {one.name: one for one in find_scans(inbox)}
    older = predict_one(model, found["third"], tmp_path, ("nifti",), identified=False)
    assert older["source"] != found["first"].digest() != found["first-s-cond-read"].digest()
    (tmp_path / "third" / "of an older run").touch()
    row = predict_one(model, found["third"], tmp_path, ("nifti", "png", "seg"), identified=True)
    assert row["mask_ml"] == pytest.approx(4 / 3 * np.pi * 4**3, rel=0.1)
    assert row["probability"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["third"]
    assert not (tmp_path / "third" / "of an older run").exists()
    pytest.importorskip("highdicom", reason="the extra `seg` is not installed")
    assert row["patient_identity"] == "source"
    assert pydicom.dcmread(tmp_path / "third" / "mask.dcm").PatientName == "Doe^Jane"


def test_a_write_that_fails_leaves_the_older_result(model: Any, inbox: Path, tmp_path: Path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise StorageError(28, "No space left on device")

    monkeypatch.setattr(run, "write_overlay_png", full)
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "prediction.json").write_text("{}")
    found = next(one for one in find_scans(inbox) if one.name == "third")
    with pytest.raises(StorageError):
        predict_one(model, found, tmp_path, ("nifti", "png"), identified=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["third", "prediction.json"]


def test_a_study_of_volumes_does_not_answer_for_pictures(study, predicted, tmp_path: Path, refused):
    place = tmp_path / "pictures"
    place.mkdir()
    shutil.copy(predicted[0] / "third" / "overlay.png", place)
    message = refused("predict", study.run, place, "--out", tmp_path / "out")
    assert message.startswith(f"{place}: pictures, whose grey values are not Hounsfield units")
    assert "trained on volumes" in message
    assert not (tmp_path / "out").exists()


def test_the_page_says_how_much_of_the_lungs_was_examined(predicted):
    out, _ = predicted
    rows = {row["scan"]: row for row in json.loads((out / "predictions.json").read_text())["scans"]}
    page = (out / "predictions.html").read_text()
    assert "lungs examined" in page
    for row in rows.values():
        # data.field is 128 mm of 512 high and 167 of 334 wide, and the phantom's lungs are about 240 high.
        assert 0.4 < row["outside_field"] < 0.95
        (remark,) = (remark for remark in row["remarks"] if "of the lungs" in remark)
        assert remark in page
    with (out / "predictions.csv").open() as stream:
        assert {row["outside_field"] for row in csv.DictReader(stream) if not row["fault"]} >= {
            str(row["outside_field"]) for row in rows.values()
        }


def test_a_tree_without_one_good_series_is_refused_in_one_line(study, inbox: Path, tmp_path: Path, refused):
    bad = tmp_path / "bad"
    shutil.copytree(inbox / "cut", bad / "a")
    (bad / "note.nii.gz").write_bytes(b"no volume")
    message = refused("predict", study.run, bad, "--out", tmp_path / "out")
    assert "none of 2 series can be used" in message
    assert "truncated" in message
    assert not (tmp_path / "out").exists()
