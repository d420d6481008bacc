"""Planes fused by learned weights: fitted to validation patients, said in the results, never called private."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from capsfl.config import ArmConfig, DataConfig, SegmentationStage, StudyConfig
from capsfl.evaluation import score_controls
from capsfl.evaluation.segmentation import Segmented, segmentation_results
from capsfl.learning.fusion import FusionError
from capsfl.learning.patients import Patient
from capsfl.learning.segmentation import SegmentationConfig, Segmenter
from capsfl.learning.tasks import Task
from capsfl.privacy.plan import PrivacyConfig
from capsfl.study import Split
from capsfl.training.checks import check_before_training

SHAPE = (8, 16, 16)
PLANES = ("xy", "xz")


def patient(name: str, *, masked: bool = True) -> Patient:
    """A body with a cube in it, of which the plane xy tells the truth and xz the opposite."""
    truth = np.zeros(SHAPE, bool)
    truth[2:5, 4:9, 6:11] = True
    body = np.zeros(SHAPE, bool)
    body[:, 2:14, 2:14] = True
    hu = np.zeros(SHAPE, np.float32)
    return Patient(name, "A", "A1", 1, hu, body, truth if masked else None, (1.0, 1.0, 1.0))


@pytest.fixture
def scans() -> Segmented:
    """A segmenter that needs no network: what its planes say is made up from the truth."""
    task: Any = Task("segmentation", *[None] * 4)  # type: ignore[arg-type]
    segmenter = Segmenter(task, SegmentationConfig(planes=PLANES, fusion="learned"))
    known = patient("any")
    assert known.truth is not None
    said = np.where(known.truth, 0.7, 0.4)
    noise = np.random.default_rng(0).normal(0, 0.05, (2, *SHAPE))
    planes = {"xy": (said + noise[0]) * known.body, "xz": (1 - said + noise[1]) * known.body}
    planes = {name: plane.astype(np.float32) for name, plane in planes.items()}
    segmenter.planes = lambda *_: planes  # type: ignore[method-assign]
    return Segmented(segmenter, None)


def test_the_rule_is_fitted_to_validation_patients_and_stands_in_the_results(scans):
    fitted = scans.learn_fusion([patient("v1"), patient("v2", masked=False)], seed=0)
    assert fitted["fitted_on"] == ["A/v1"]
    assert fitted["weights"]["xy"] > 0 > fitted["weights"]["xz"]
    split = Split((), (patient("v1"),), (patient("t1"),))
    config: Any = SimpleNamespace(segmentation=scans.segmenter.config, seed=0)
    control: Any = SimpleNamespace(dice={"A/t1": 0.1}, hu=-300.0)
    results = segmentation_results(split, scans, control, config)
    assert results["fusion"] == {"threshold": 0.5, **fitted}
    assert results["planes"]["fused"] > 0.99 > results["planes"]["xz"]
    np.testing.assert_array_equal(scans.fused(patient("t1")) > 0.5, patient("t1").truth)


def test_what_the_field_leaves_out_counts_as_missed(scans):
    scans.learn_fusion([patient("v1")], seed=0)
    whole, cut, gone = patient("t1"), patient("t2"), patient("t3")
    assert whole.truth is not None
    marked = int(whole.truth.sum())
    cut = replace(cut, truth_outside=2 * marked)
    gone = replace(gone, truth=np.zeros(SHAPE, bool), truth_outside=5)
    config: Any = SimpleNamespace(segmentation=scans.segmenter.config, seed=0)
    split = Split((patient("p1"),), (), (whole, cut, gone))
    control = score_controls(split, SimpleNamespace(segmentation=config.segmentation, classification=None))  # type: ignore[arg-type]
    assert control.segmentation is not None
    assert control.segmentation.dice["A/t3"] == 0
    found = segmentation_results(split, scans, control.segmentation, config)
    dices = [row["fused"] for row in found["patients"]]
    assert dices[0] > 0.99
    assert dices[1] == pytest.approx(0.5, abs=0.01), "2 n / (n + 3 n)"
    assert dices[2] == 0
    assert [row["outside_field"] for row in found["patients"]] == [0, pytest.approx(2 / 3), 1]
    assert found["overall"]["patients"] == 3
    assert found["overall"]["outside_field"] == pytest.approx((2 * marked + 5) / (4 * marked + 5))


def study(**words: Any) -> StudyConfig:
    data = DataConfig(source="somewhere")
    return StudyConfig(data=data, segmentation=SegmentationStage(fusion="learned"), **words)


def test_no_noise_covers_what_the_rule_knows():
    assert study().segmentation
    with pytest.raises(ValidationError, match=r'segmentation\.fusion = "learned".*no guarantee would cover'):
        study(privacy=PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0))
    with pytest.raises(ValidationError, match="choose mean, max or min, or train without noise"):
        study(arms=(ArmConfig(), ArmConfig(name="noisy", noise_multiplier=1.0)))


def test_a_study_that_holds_out_no_mark_is_refused_before_it_trains():
    healthy = replace(patient("v2"), truth=np.zeros(SHAPE, bool))
    split = Split((patient("p1"),), (patient("v1", masked=False), healthy), (patient("t1"),))
    with pytest.raises(FusionError, match=r"no validation patient has a mask that marks anything.*validation_fraction"):
        check_before_training(study(), split, [])
    check_before_training(study(), split._replace(validation=(healthy, patient("v3"))), [])
