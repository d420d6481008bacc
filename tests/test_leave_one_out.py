"""An arm in which every hospital is left out once: who trains, who decides, who is judged, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from capsfl.config import ArmConfig, ClassificationStage, ConsensusConfig, SegmentationStage, StudyConfig
from capsfl.ct.phantom import PhantomConfig
from capsfl.evaluation import average_members
from capsfl.learning.patients import Patient
from capsfl.privacy.plan import PrivacyConfig
from capsfl.study import Split
from capsfl.training.checks import check_before_training
from capsfl.training.run import plan_of_run, plan_runs

ARM = ArmConfig(name="without", partition="leave-one-out")


def patient(name: str, *, label: int = 1) -> Patient:
    """A patient of the hospital that the name begins with."""
    nothing = np.zeros((2, 2, 2), np.float32)
    return Patient(name, name[0], "", label, nothing, nothing > 0, nothing == 0, (1.0, 1.0, 1.0))


def split(hospitals: str = "ABC", *, tested: str = "ABC", validated: str = "ABC") -> Split:
    parts = (hospitals, "train"), (validated, "validation"), (tested, "test")
    return Split(*(tuple(patient(f"{h}-{part}-{n}") for h in names for n in range(2)) for names, part in parts))


def study(**changes) -> StudyConfig:
    return StudyConfig(
        phantom=PhantomConfig(), classification=ClassificationStage(rounds=2), arms=(ArmConfig(), ARM), **changes
    )


def test_each_hospital_is_left_out_once_and_judged_by_the_others(tmp_path: Path):
    whole = split()
    federated, *runs = plan_runs(study(), tmp_path, whole)
    assert federated.share_of(whole) == whole
    assert [run.place for run in runs] == ["without/A", "without/B", "without/C"]
    for run in runs:
        share = run.share_of(whole)
        assert run.holders == tuple(name for name in "ABC" if name != run.member)
        assert {p.hospital for part in (share.train, share.validation) for p in part} == set(run.holders)
        assert {p.hospital for p in share.test} == {run.member}
    assert len({run.chain_id for run in (federated, *runs)}) == 4


def test_it_is_private_like_the_federation_it_stands_beside_with_one_hospital_less(tmp_path: Path):
    private = PrivacyConfig(clip_norm=1.0, noise_multiplier=1.5)
    config = study(privacy=private, consensus=ConsensusConfig())
    federated, without, *_ = plan_runs(config, tmp_path, split())
    assert without.config.privacy == federated.config.privacy == private
    assert without.config.consensus == config.consensus
    assert (plan_of_run(federated, split()).expected_cohort, plan_of_run(without, split()).expected_cohort) == (3, 2)


def test_a_hospital_that_trains_alone_decides_by_its_own_validation_patients(tmp_path: Path):
    alone = study().model_copy(update={"arms": (ArmConfig(name="alone", partition="local"),)})
    whole = split(validated="AB")
    for run in plan_runs(alone, tmp_path, whole):
        share = run.share_of(whole)
        assert {p.hospital for p in share.validation} == ({run.member} if run.member in ("A", "B") else set())
        assert (share.train, share.test) == (whole.train, whole.test)
    check_before_training(alone, whole, plan_runs(alone, tmp_path, whole))
    learned = alone.model_copy(update={"segmentation": SegmentationStage(fusion="learned")})
    marked = Split(*(tuple(replace(p, truth=np.ones((2, 2, 2), bool)) for p in part) for part in whole))
    with pytest.raises(ValueError, match=r"local \(alone\): C has no validation patient with a mask, .* other"):
        check_before_training(learned, marked, plan_runs(learned, tmp_path, marked))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (split("A", tested="A"), r"leave-one-out \(without\): A is the only hospital; name a second one"),
        (split(tested="AC"), r"leave-one-out \(without\): B has no test patient with a label"),
    ],
)
def test_what_would_leave_nobody_to_judge_is_refused(tmp_path: Path, given: Split, message: str):
    with pytest.raises(ValueError, match=message):
        check_before_training(study(), given, plan_runs(study(), tmp_path, given))


def test_planes_cannot_be_fused_by_the_hospital_that_is_left_out(tmp_path: Path):
    config, given = study(segmentation=SegmentationStage(rounds=2, fusion="learned")), split(validated="A")
    with pytest.raises(ValueError, match="without A no validation patient has a mask"):
        check_before_training(config, given, plan_runs(config, tmp_path, given))


def test_it_does_not_go_with_hospitals_that_join_and_leave():
    with pytest.raises(ValueError, match=r"places = 4: who is left out .* leave places out"):
        study(places=4)


def test_its_figures_are_means_over_the_hospitals_left_out_and_so_are_its_controls():
    def row(auc: float | None, control: float) -> dict:
        return {"classification": {"overall": {"auc": auc}, "controls": {"always positive": {"accuracy": control}}}}

    found = average_members({"A": row(0.5, 0.2), "B": row(None, 0.4), "C": row(0.9, 0.6)}, partition="leave-one-out")
    assert found["classification"]["overall"]["auc"] == pytest.approx(0.7)
    assert found["classification"]["controls"]["always positive"]["accuracy"] == pytest.approx(0.4)
    assert found["members"].keys() == {"A", "B", "C"}
    alone = average_members({"A": row(0.5, 0.2), "B": row(0.7, 0.2)})
    assert alone["classification"]["controls"] == {"always positive": {"accuracy": 0.2}}, "the same patients for all"
