"""What a study refuses before it trains, and what must not be mixed up between hospitals, tasks and runs."""

import dataclasses
import itertools
import os
import pickle
import runpy
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import pytest

from capsfl import train
from capsfl.audit import chain_of
from capsfl.checkpoint import CheckpointError, check_recorded, tensor_leaves
from capsfl.config import ArmConfig, ClassificationStage, SegmentationStage, StudyConfig
from capsfl.ct.phantom import PhantomConfig
from capsfl.evaluation import Segmented
from capsfl.federated import Federation, RoundsConfig
from capsfl.federated.hospitals import stack_hospitals
from capsfl.learning.patients import Patient
from capsfl.learning.tasks import Task
from capsfl.ledger.errors import DamageError, Divergence, LockedError, StorageError
from capsfl.ledger.records import RoundRecord, parameters_root
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.plan import PrivacyConfig
from capsfl.study import Split
from capsfl.training.checks import check_before_training
from capsfl.training.run import plan_of_run, plan_runs


def patient(name: str, hospital: str, *, label: int | None = 1, masked: bool = True, level: float = 0.0) -> Patient:
    hu = np.full((8, 8, 8), level, np.float32)
    truth = np.ones((8, 8, 8), bool) if masked else None
    return Patient(name, hospital, "", label, hu, np.ones((8, 8, 8), bool), truth, (1.0, 1.0, 1.0))


def study(**changes) -> StudyConfig:
    base = StudyConfig(
        phantom=PhantomConfig(),
        segmentation=SegmentationStage(rounds=4),
        classification=ClassificationStage(rounds=4),
    )
    return base.model_copy(update=changes)


SPLIT = Split(train=(patient("1", "A"), patient("2", "B")), validation=(), test=(patient("3", "A"), patient("4", "B")))


def check(config: StudyConfig, split: Split, tmp_path) -> None:
    check_before_training(config, split, plan_runs(config, tmp_path, split))


def test_a_sound_study_is_not_refused(tmp_path):
    check(study(), SPLIT, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masked": False}, "B has no training patient with a mask, which segmentation needs"),
        ({"label": None}, "B has no training patient with a label, which classification needs"),
    ],
)
def test_a_hospital_without_records_for_a_stage_is_named(tmp_path, change, message):
    split = SPLIT._replace(train=(patient("1", "A"), patient("2", "B", **change)))
    with pytest.raises(ValueError, match=message):
        check(study(), split, tmp_path)


def test_a_test_set_without_labels_is_refused(tmp_path):
    split = SPLIT._replace(test=(patient("3", "A", label=None),))
    with pytest.raises(ValueError, match="no test patient has a label, so classification cannot be scored"):
        check(study(), split, tmp_path)


def test_a_classifier_alone_needs_no_masks(tmp_path):
    train, test = (tuple(patient(p.name, p.hospital, masked=False) for p in part) for part in (SPLIT.train, SPLIT.test))
    check(study(segmentation=None), Split(train, (), test), tmp_path)


def test_a_label_that_is_no_class_is_refused_with_the_classes_it_needs(tmp_path):
    split = SPLIT._replace(test=(patient("3", "A", label=2),))
    message = r"classification.classes = 2: A/3 has label 2, .* set classification.classes = 3"
    with pytest.raises(ValueError, match=message):
        check(study(), split, tmp_path)
    check(study(classification=ClassificationStage(rounds=4, classes=3)), split, tmp_path)


def test_a_budget_spent_before_the_last_stage_is_refused(tmp_path):
    privacy = PrivacyConfig(clip_norm=1.0, noise_multiplier=1.0, target_epsilon=9.0)
    with pytest.raises(ValueError, match=r"privacy.target_epsilon = 9.0: spent after \d rounds, before classification"):
        check(study(privacy=privacy), SPLIT, tmp_path)
    check(study(privacy=privacy.model_copy(update={"target_epsilon": 12.0})), SPLIT, tmp_path)


def test_a_cohort_larger_than_the_federation_is_refused_before_training(tmp_path):
    privacy = PrivacyConfig(clip_norm=1.0, sampler="fixed", cohort=5)
    with pytest.raises(PrivacyError, match=r"privacy.cohort = 5"):
        check(study(privacy=privacy), SPLIT, tmp_path)


def test_a_plan_for_patients_counts_persons(tmp_path):
    scans = tuple(dataclasses.replace(patient(name, "A"), person="P") for name in ("1", "1-s2"))
    split = SPLIT._replace(train=(*scans, patient("2", "A"), patient("3", "B")))
    config = study(
        privacy=PrivacyConfig(
            unit="patient", expected_patients=1, patient_truncation=2, clip_norm=1.0, noise_multiplier=2.0
        ),
    )
    (run,) = plan_runs(config, tmp_path, split)
    plan = plan_of_run(run, split).patients
    assert plan is not None
    assert [stage.patients for stage in plan.stages] == [(("A", 2), ("B", 1))] * 2


def test_runs_have_chains_of_their_own(tmp_path):
    config = study(arms=(ArmConfig(), ArmConfig(name="alone", partition="local")))
    runs = plan_runs(config, tmp_path, SPLIT)
    assert [run.place for run in runs] == ["federated", "alone/A", "alone/B"]
    assert len({run.chain_id for run in runs}) == 3
    assert chain_of(config, "federated") != chain_of(study(seed=5), "federated")


def test_patients_of_one_name_in_two_hospitals_are_kept_apart():
    class Constant:
        def planes(self, parameters, hu, body, window_hu):
            return {"xy": hu}

        def fused(self, planes):
            return planes["xy"]

    scans = Segmented(Constant(), None)  # type: ignore[arg-type]
    first, second = patient("001", "A", level=0.1), patient("001", "B", level=0.9)
    assert scans.fused(first).mean() == pytest.approx(0.1, abs=1e-3)
    assert scans.fused(second).mean() == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(
    "error",
    [
        PrivacyError("cohort", 5, "at most 3"),
        StorageError("full"),
        LockedError("held"),
        DamageError("bad", height=3),
        Divergence("differs"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_refusal_crosses_from_a_worker_process_whole(error):
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_tasks_and_runs_of_one_seed_draw_different_noise():
    zero = Task(
        "first", lambda w, batch: 0.0 * w.sum(), lambda w, batch, weight: {}, np.zeros(50, np.float32), lambda w: w
    )
    rows = stack_hospitals({"A": {"x": np.ones((2, 1), np.float32)}})

    def noise(task: Task, stream: str, noise_multiplier: float = 1.0, rounds: int = 10) -> np.ndarray:
        privacy = PrivacyConfig(clip_norm=1.0, noise_multiplier=noise_multiplier)
        engine = Federation(task, rows, config=RoundsConfig(rounds=rounds), privacy=privacy, stream=stream)
        return np.asarray(engine.step(engine.init())[0].parameters)

    draws = [
        noise(zero, "federated"),
        noise(zero, "private"),
        noise(dataclasses.replace(zero, name="second"), "private"),
        # Of two releases that differ in z alone the noise could be eliminated.
        noise(zero, "federated", noise_multiplier=2.0),
        noise(zero, "federated", rounds=11),
    ]
    assert np.array_equal(draws[0], noise(zero, "federated"))
    for i, j in itertools.combinations(range(len(draws)), 2):
        assert abs(np.corrcoef(draws[i], draws[j])[0, 1]) < 0.5


def test_weights_the_ledger_does_not_vouch_for_are_refused_by_tensor(tmp_path):
    weights = {"first": np.ones(3, np.float32), "second": np.zeros(2, np.float32)}
    leaves = tensor_leaves(weights)
    record = RoundRecord(
        round=1, task="segmentation", parameters_digest=parameters_root(leaves), leaves=tuple(sorted(leaves.items())),
        cohort=(), sampler="all", clip_norm=None, noise_multiplier=None, expected_cohort=None, epsilon=None, delta=None,
        configuration_hash="0" * 64, code_version="1",
    )  # fmt: skip
    check_recorded(record, weights, tmp_path)
    weights["second"] = np.nextafter(weights["second"], np.float32(1))
    with pytest.raises(CheckpointError, match="second is not what the ledger recorded"):
        check_recorded(record, weights, tmp_path)
    with pytest.raises(CheckpointError, match="is not what the ledger recorded"):
        check_recorded(None, weights, tmp_path)


def test_every_run_beside_others_has_a_process_of_its_own_and_a_dead_one_is_noticed(tmp_path, monkeypatch):
    """A script stands for the training: `runpy.run_path(script, globals, name)` is called as it is."""
    monkeypatch.setattr(train, "train_in_worker", runpy.run_path)
    script = tmp_path / "run.py"
    script.write_text("import os, pathlib\npathlib.Path(folder, str(os.getpid())).touch()\nglobals().clear()\n")
    start: Any = train.train_in_process
    for _ in range(2):
        start(str(script), {"folder": str(tmp_path)}, "run")
    assert len({path.name for path in tmp_path.iterdir()} - {"run.py", str(os.getpid())}) == 2
    script.write_text("import os\nos._exit(3)\n")
    with pytest.raises(BrokenProcessPool):
        start(str(script), {}, "run")
