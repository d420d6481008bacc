"""Pictures through a study: whose each is, how it is prepared, what counts, and what a study refuses to judge."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from capsfl.config import DataConfig
from capsfl.ct.collections import CollectionConfig
from capsfl.ct.errors import CorruptFile, NoSeries, WrongFormat
from capsfl.ct.ingest import ingest
from capsfl.ct.normalize import VolumeConfig
from capsfl.ct.pictures import read_pictures
from capsfl.learning.classification import ClassificationConfig, judge
from capsfl.predict.model import Model
from capsfl.predict.picture_result import predict_pictures
from capsfl.predict.pictures import FoundPictures, find_pictures
from capsfl.predict.sources import check_options, find_sources
from capsfl.report.predictions import read_records, write_summary

CLASSES = ("normal", "CAP", "COVID")


def draw(path: Path, grey: int, shape: tuple[int, int] = (70, 90)) -> Path:
    """A noisy picture of about one grey."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(grey).integers(0, 40, shape)
    Image.fromarray((noise + grey).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    """Two loose pictures of one name, a patient of fourteen, a note, and a slice of a scan."""
    place = tmp_path / "inbox"
    draw(place / "a b%.png", 10)
    draw(place / "a b%.jpg", 20)
    for number in range(14):
        draw(place / "ward" / "päтient $x$" / f"{number:02d}.png", 15 * number)
    (place / "note.txt").write_text("Dear colleague")
    (place / "scan").mkdir()
    for name in ("1.dcm", "2.dcm"):
        (place / "scan" / name).write_bytes(b"slice")
    return place


@pytest.fixture
def model() -> Any:
    """A network of three classes that takes bright for ill; all but its answers is the study's own code."""
    told: Any = Model.__new__(Model)
    stage = ClassificationConfig(slices_per_scan=4, top_slices=2)
    told.config = SimpleNamespace(
        data=DataConfig(source="x", collection=CollectionConfig(name="image-folder", side=32, levels="kept"))
    )
    told.facts = {"arm": "federated", "models": {"classification": {"digest": "d" * 64}}, "ledger_head": "h" * 64}
    told.classes, told.kinds, told._judging_weights = CLASSES, ("pictures",), None

    def probabilities(_: None, images: np.ndarray) -> np.ndarray:
        ill = images.mean(axis=(1, 2, 3))
        return np.stack([1 - ill, 0.4 * ill, 0.6 * ill], axis=1)

    told.classifier = SimpleNamespace(
        config=stage, probabilities=probabilities, judge=lambda values: judge(values, stage.top_slices)
    )
    return told


def test_a_loose_picture_is_a_patient_and_a_folder_of_them_is_one(inbox: Path):
    found = {one.name: one for one in find_pictures(inbox)}
    assert [len(one.files) for one in found.values()] == [1, 1, 14, 0]
    assert list(found)[:2] == ["a-b", "a-b-2"]
    assert [path.name for path in next(one.files for one in found.values() if len(one.files) == 14)][:2] == [
        "00.png",
        "01.png",
    ]
    (refusal,) = (one.refusal for one in found.values() if one.refusal)
    assert str(refusal).startswith(f"{inbox}/scan/1.dcm: not a picture and 1 more, and the study was trained on pic")
    (alone,) = find_pictures(inbox / "a b%.png")
    assert (alone.name, alone.files) == ("a-b", (inbox / "a b%.png",))


def test_new_pictures_are_prepared_as_the_importer_prepared_the_study_s(inbox: Path, model: Any, tmp_path: Path):
    for kind in ("ill", "well"):
        for path in inbox.glob("a b%.*"):
            draw(tmp_path / "set" / kind / path.name, len(kind) * 20, shape=(50, 61))
    for options in ({"side": 32}, {"side": 48, "fit": "pad", "levels": "kept"}):
        collection = CollectionConfig.model_validate({"name": "image-folder"} | options)
        index = ingest(
            tmp_path / "set",
            tmp_path / str(len(options)),
            config=VolumeConfig(),
            collection=collection,
            processes=1,
            progress=False,
        ).index
        model.config.data = DataConfig(source="x", collection=collection)
        stored = np.concatenate([read_pictures(entry.path)[0].pixels for entry in index])
        seen = [one.read(model.square).pixels for one in find_pictures(tmp_path / "set") if one.files]
        assert sorted(map(bytes, np.concatenate(seen))) == sorted(map(bytes, stored))
        assert len(stored) == 4


def test_every_picture_has_a_probability_and_the_patient_s_is_of_those_that_the_study_would_have_looked_at(
    inbox: Path, model: Any, tmp_path: Path
):
    found = next(one for one in find_pictures(inbox) if len(one.files) == 14)
    row = predict_pictures(model, found, tmp_path / "out", ("png",))
    chances = [picture["probability"] for picture in row["pictures"]]
    assert chances == sorted(chances)
    counted = [index for index, picture in enumerate(row["pictures"]) if picture["counted"]]
    assert counted == [1, 5, 8, 12], "the middles of four equal parts of fourteen"
    assert row["probability"] == pytest.approx((chances[8] + chances[12]) / 2)
    assert row["remarks"] == ["4 of 14 pictures count, taken evenly as in the study"]
    assert row["class_probabilities"][2] == pytest.approx(0.6 * row["probability"])
    folder = tmp_path / "out" / row["scan"]
    assert json.loads((folder / "prediction.json").read_text()) == row
    with Image.open(folder / "pictures.png") as sheet:
        assert min(sheet.size) > 400
    assert row["preparation"] == {"side": 32, "fit": "stretch", "levels": "kept"}


def test_a_folder_that_holds_a_damaged_picture_is_left_out_by_its_name(inbox: Path, model: Any, tmp_path: Path):
    damaged = draw(inbox / "third" / "2.png", 50)
    damaged.write_bytes(damaged.read_bytes()[:-200])
    draw(inbox / "third" / "1.png", 50)
    found = next(one for one in find_pictures(inbox) if one.name == "third")
    with pytest.raises(CorruptFile, match=r"third/2\.png: the pixels cannot be read"):
        predict_pictures(model, found, tmp_path / "out", ("png",))
    assert not (tmp_path / "out").exists()


def test_the_page_and_the_tables_show_patients_pictures_and_classes(inbox: Path, model: Any, tmp_path: Path):
    out = inbox / "out"
    for formats in ((), ("png",)):  # the second time with results in the tree, which are not predicted
        rows = [predict_pictures(model, one, out, formats) for one in find_pictures(inbox, out=out) if one.files]
    assert len(rows) == len(read_records(out)) == 3
    assert len([one for one in find_pictures(inbox, out=out) if one.files]) == 3, "sheets are no pictures to predict"
    page = write_summary(out, [], [("scan", "not a picture")], study="demo").read_text()
    for words in ("not for clinical use", "3 patients, by pictures", "4 of 14 pictures count", "d" * 64, "h" * 64):
        assert words in page
    assert page.count("data:image/jpeg;base64,") == 3
    assert "slices" not in page
    likeliest, second = rows[0]["class_probabilities"][0], rows[0]["class_probabilities"][2]
    assert f"normal\u00a0{likeliest:.3f}, COVID\u00a0{second:.3f}" in page
    with (out / "predictions-pictures.csv").open() as stream:
        pictures = list(csv.DictReader(stream))
    assert len(pictures) == 16
    assert {row["notice"] for row in pictures} == {"not for clinical use"}
    assert {(row["model_classification"], row["ledger_head"]) for row in pictures} == {("d" * 64, "h" * 64)}
    assert pictures[0]["class_probabilities"].startswith("normal=0.")
    with (out / "predictions.csv").open() as stream:
        assert sorted(row["pictures"] for row in csv.DictReader(stream)) == ["", "1", "1", "14"]


@pytest.mark.parametrize("kinds", [("pictures",), ("volume",), ("pictures", "volume")])
def test_a_study_judges_what_it_was_trained_on_and_says_so_of_the_rest(inbox: Path, tmp_path: Path, kinds):
    nifti = tmp_path / "scans" / "a.nii.gz"
    nifti.parent.mkdir()
    nifti.write_bytes(b"a volume")
    (tmp_path / "empty").mkdir()
    if "pictures" in kinds:
        assert [len(one.files) for one in find_sources(kinds, inbox) if isinstance(one, FoundPictures)][:3] == [
            1,
            1,
            14,
        ]
        assert len(find_sources(kinds, inbox / "a b%.png")) == 1
    else:
        for place in (inbox / "ward", inbox / "a b%.png"):
            with pytest.raises(WrongFormat, match=r"pictures, whose grey values .* trained on volumes in Hounsfield"):
                find_sources(kinds, place)
    if "volume" in kinds:
        assert [one.name for one in find_sources(kinds, nifti.parent)] == ["a"]
    else:
        for place in (nifti, nifti.parent):
            with pytest.raises(
                WrongFormat, match=r"pictures, whose grey values are not Hounsfield units, so it cannot"
            ):
                find_sources(kinds, place)
    with pytest.raises((NoSeries, WrongFormat)):
        find_sources(kinds, tmp_path / "empty")
    with pytest.raises(NoSeries, match="no such file"):
        find_sources(kinds, tmp_path / "absent")


def test_options_of_scans_are_refused_where_a_study_knows_pictures_alone():
    with pytest.raises(ValueError, match=r"scanner = A1: of CT scans, and the study was trained on pictures; leave"):
        check_options(("pictures",), None, series=None, scanner="A1")
    with pytest.raises(ValueError, match=r"formats = nifti seg: of CT scans"):
        check_options(("pictures",), ("nifti", "seg"))
    check_options(("pictures",), ("nifti", "png"), series=None, identified=False)
    check_options(("pictures", "volume"), ("nifti",), series="1", scanner="A1")
