"""What predict finds, under which name a result lies, and which study may answer; networks are stood in for."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest

from capsfl.config import DataConfig
from capsfl.ct.errors import ScanError, TooLarge
from capsfl.ct.normalize import EXTENT_MM, LUNG_WINDOW, VolumeConfig
from capsfl.ct.reader import ReaderConfig
from capsfl.ct.scan import Scan, ScanSource, as_rows
from capsfl.learning.segmentation import SegmentationConfig
from capsfl.predict import model as answering
from capsfl.predict.model import Answer, Model
from capsfl.predict.run import predict_one
from capsfl.predict.scans import find_scans
from capsfl.report.predictions import Prediction
from capsfl.study import study_kinds

SHAPE = (8, 24, 24)


def write_scan(path: Path, seed: int) -> Path:
    hu = np.random.default_rng(seed).integers(-1000, 200, SHAPE[::-1]).astype(np.int16)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(hu, np.diag([2.0, 2.0, 5.0, 1.0])), path)  # pyright: ignore[reportPrivateImportUsage]
    return path


@pytest.fixture
def model() -> Any:
    """A study that marks every tenth of a scan."""

    def answer(scan: Scan) -> Answer:
        mask = np.indices(scan.hu.shape).sum(axis=0) % 10 == 0
        return Answer(mask, mask.astype(np.float32), None)

    config = SimpleNamespace(segmentation=SegmentationConfig())
    return SimpleNamespace(answer=answer, target="lesion", facts={}, classes=(), config=config)


def predicted(model: Any, place: Path, out: Path) -> list[dict[str, Any]]:
    return [predict_one(model, found, out, ("nifti",), identified=False) for found in find_scans(place)]


def test_a_result_takes_the_place_of_the_same_scan_s_and_of_no_other(model: Any, tmp_path: Path):
    """Two hospitals number their patients alike; each is predicted twice."""
    out = tmp_path / "out"
    one, other = (write_scan(tmp_path / name / "patient 1.nii.gz", seed) for seed, name in enumerate("AB"))
    (first,) = predicted(model, one, out)
    (out / first["scan"] / "note").touch()
    for _ in range(2):
        (second,) = predicted(model, other, out)
        assert (first["scan"], second["scan"]) == ("patient-1", "patient-1-2") or first["scan"] != second["scan"]
        assert json.loads((out / first["scan"] / "prediction.json").read_text())["source"] == first["source"]
        assert (out / first["scan"] / "note").exists()
    assert len(list(out.iterdir())) == 2
    (again,) = predicted(model, one, out)
    assert (again["scan"], again["source"]) == (first["scan"], first["source"])
    assert not (out / first["scan"] / "note").exists(), "its own older result is replaced"
    assert len(list(out.iterdir())) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"scan": "older"}'])
def test_what_is_not_this_scan_s_result_stays(model: Any, tmp_path: Path, content: str):
    place = write_scan(tmp_path / "in" / "a.nii", 0)
    name = next(find_scans(place)).name
    theirs = tmp_path / "out" / name / "prediction.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text(content)
    (row,) = predicted(model, place, tmp_path / "out")
    assert row["scan"] == f"{name}-2"
    assert theirs.read_text() == content


def test_what_the_reader_may_load_holds_for_nifti_too(tmp_path: Path):
    place = write_scan(tmp_path / "in" / "a.nii.gz", 0)
    small = ReaderConfig(max_voxels=int(np.prod(SHAPE)) - 1)
    for where in (place, place.parent):
        (found,) = find_scans(where, reader=small)
        with pytest.raises(TooLarge):
            found.read()
        (found,) = find_scans(where)
        assert found.read()[0].hu.shape == SHAPE


def seeing(
    config: VolumeConfig,
    scanner: str | None,
    monkeypatch: pytest.MonkeyPatch,
    field: tuple[int, int, int] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """A model without networks, and what they were shown."""
    shown: dict[str, Any] = {}

    def planes(weights: Any, hu: np.ndarray, body: np.ndarray, window_hu: Any) -> dict[str, np.ndarray]:
        shown["segmenter"] = window_hu
        return {"xy": hu}

    def images_of(patient: Any, *_: Any, **__: Any) -> np.ndarray:
        shown["classifier"] = patient.window_hu
        return np.zeros((1, 8, 8, 1), np.float32)

    monkeypatch.setattr(answering, "images_of", images_of)
    model: Any = Model.__new__(Model)
    model._scanner, model._marking_weights, model._judging_weights = scanner, None, None
    model.config = SimpleNamespace(data=DataConfig(volumes=config, field=field))
    model.segmenter = SimpleNamespace(planes=planes, fused=lambda p: p["xy"], config=SegmentationConfig())
    model.classifier = SimpleNamespace(config=None, probabilities=lambda weights, images: np.ones((1, 2)))
    return model, shown


def test_a_new_scan_is_seen_through_the_window_that_the_study_was_trained_with(tmp_path, monkeypatch):
    scan = next(find_scans(write_scan(tmp_path / "a.nii.gz", 0))).read()[0]
    model, shown = seeing(VolumeConfig(), None, monkeypatch)
    model.answer(scan)
    assert set(shown.values()) == {LUNG_WINDOW}
    model, shown = seeing(VolumeConfig(window="scanner"), "C6", monkeypatch)
    model.answer(scan)
    assert shown == {"segmenter": (-500.0, 1500.0), "classifier": (-500.0, 1500.0)}
    model, shown = seeing(VolumeConfig(window="scanner"), None, monkeypatch)
    with pytest.raises(ScanError, match=r"no scanner named: Table II .* one of A1, .*C6"):
        model.answer(scan)
    assert not shown


def test_what_a_study_answers_for_is_what_it_was_trained_on(tmp_path: Path):
    (tmp_path / "study.json").write_text('{"configuration": {}}')
    assert study_kinds(tmp_path) == ("volume",)
    (tmp_path / "study.json").write_text('{"configuration": {}, "kinds": ["pictures", "volume"]}')
    assert study_kinds(tmp_path) == ("pictures", "volume")


def test_masks_of_an_earlier_call_are_no_volumes_to_predict(model: Any, tmp_path: Path):
    """Results may lie within the tree that is predicted."""
    write_scan(tmp_path / "in" / "a.nii.gz", 0)
    out = tmp_path / "in" / "out"
    for _ in range(2):
        found = list(find_scans(tmp_path / "in", out=out))
        assert [one.name for one in found] == ["a"]
        predict_one(model, found[0], out, ("nifti",), identified=False)
    assert (out / "a" / "mask.nii.gz").exists()


@pytest.fixture(scope="module")
def chest() -> Scan:
    """Two lungs in a body in a field of view that is wider than the body."""
    z, y, x = np.indices((48, 64, 80))
    inside = ((y - 32) / 26) ** 2 + ((x - 40) / 36) ** 2 < 1
    hu = np.where(inside, 40, -1000).astype(np.float32)
    for middle in (24, 56):
        hu[((z - 24) / 20) ** 2 + ((y - 32) / 16) ** 2 + ((x - middle) / 11) ** 2 < 1] = -850
    affine = np.array([[0, 0, 4.0, 0], [0, 4.0, 0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])
    source = ScanSource("nifti", "p", hu.shape, as_rows(affine), (0, 1, 2), (False, False, False))
    return Scan(hu, np.ones(hu.shape, bool), affine, source)


@pytest.mark.parametrize("slices", [128, 24])
def test_how_much_of_the_lungs_was_not_looked_at_is_their_part_outside_the_field(chest: Scan, monkeypatch, slices):
    """A field of 24 slices of 4 mm is 96 mm high, and the lungs, two ellipsoids, are 200 mm."""
    field = (slices, 128, 128)
    model, _ = seeing(VolumeConfig(), None, monkeypatch, field=field)
    answer = model.answer(chest)
    inside = min(slices * 4 / 200, 1)
    assert answer.outside_field == pytest.approx(1 - (3 * inside - inside**3) / 2, abs=0.03)
    low, high = answer.field
    assert (high - low) * np.array(chest.spacing_mm) == pytest.approx(np.array(EXTENT_MM) * np.array(field) / 128)
    centre = (low + high) / 2
    assert centre == pytest.approx((24, 32, 40), abs=1.1), "around the lungs"


def test_the_remark_on_the_field_is_for_readers_of_scans(chest: Scan, model: Any, tmp_path: Path):
    found = SimpleNamespace(read=lambda: (chest, ()), digest=lambda: "0", name="a")
    told = {}
    for outside in (None, 0.0, 0.004, 0.125):
        answer = replace(model.answer(chest), outside_field=outside)
        marked = SimpleNamespace(**{**vars(model), "answer": lambda _, answer=answer: answer})
        row = predict_one(marked, found, tmp_path, (), identified=False)  # pyright: ignore[reportArgumentType]
        assert row["outside_field"] == outside
        told[outside] = row["remarks"], Prediction(row, "").examined
    assert told[None] == (["no lungs were found in the scan"], "no lungs found")
    assert told[0.0] == told[0.004] == ([], "all")
    (remark,), words = told[0.125]
    assert remark.startswith("12% of the lungs lie outside the region that was examined: nothing there is marked")
    assert words == "88%"
