"""What predict finds, under which name a result lies, and which study may answer; networks are stood in for."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest

from capsfl.config import DataConfig
from capsfl.ct.errors import ScanError, TooLarge
from capsfl.ct.normalize import LUNG_WINDOW, VolumeConfig
from capsfl.ct.reader import ReaderConfig
from capsfl.ct.scan import Scan
from capsfl.learning.segmentation import SegmentationConfig
from capsfl.predict import model as answering
from capsfl.predict.model import Answer, Model
from capsfl.predict.run import predict_one
from capsfl.predict.scans import find_scans
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
    return SimpleNamespace(answer=answer, target="lesion", facts={}, config=config)


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


def seeing(config: VolumeConfig, scanner: str | None, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
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
    model.config = SimpleNamespace(data=DataConfig(volumes=config))
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


def test_a_study_of_pictures_does_not_answer_for_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(answering, "load_study_config", lambda study: SimpleNamespace(arms=()))
    (tmp_path / "study.json").write_text('{"configuration": {}, "kinds": ["pictures"]}')
    with pytest.raises(ValueError, match=r"trained on pictures, .* cannot judge CT scans; name a study"):
        Model(tmp_path)
    (tmp_path / "study.json").write_text('{"configuration": {}, "kinds": ["pictures", "volume"]}')
    assert study_kinds(tmp_path) == ("pictures", "volume")
