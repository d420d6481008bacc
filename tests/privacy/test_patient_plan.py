"""Each hospital's patients have an epsilon of their own, through all tasks of a run; the worst one is the headline."""

import json
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from capsfl.privacy import PrivacyConfig, PrivacyError, PrivacyPlan, noise_for
from capsfl.privacy.patient_plan import Stage
from capsfl.privacy.patient_report import patient_report, solve_patients

SETTING: dict[str, Any] = {
    "unit": "patient",
    "clip_norm": 1.0,
    "expected_patients": 5,
    "delta": 1e-3,
    "patient_truncation": 16,
}
STAGES = (
    Stage("segmentation", rounds=3, epochs=2, patients=(("north", 20), ("south", 60))),
    Stage("classification", rounds=2, epochs=1, patients=(("north", 15), ("south", 60))),
)


def _plan(stages=STAGES, num_hospitals=2, **changes):
    words: dict[str, Any] = SETTING | {"noise_multiplier": 2.0} | changes
    config = PrivacyConfig(**words)
    return PrivacyPlan.build(config, num_hospitals=num_hospitals, stages=stages)


def _epsilon(plan, rounds) -> float:
    figure = plan.epsilon(rounds)
    assert figure is not None
    return figure


def _event(patients, multiplier=2.0):
    return dp_accounting.TruncatedSubsampledGaussianDpEvent(patients, 5 / patients, min(16, patients), multiplier)


def test_local_steps_of_all_tasks_add_up_and_the_worst_hospital_is_the_headline():
    statement = _plan().statement(4)
    north, south = statement.patients
    # Four rounds: three of two epochs over 20 patients, one of one epoch over 15.
    assert (north.hospital, north.patients, north.steps) == ("north", 20, 3 * 2 * 4 + 1 * 3)
    assert (south.hospital, south.patients, south.steps) == ("south", 60, 3 * 2 * 12 + 12)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
    accountant.compose(_event(20), 24).compose(_event(15), 3)
    assert north.epsilon == pytest.approx(accountant.get_epsilon(1e-3), rel=1e-3)
    assert (north.epsilon or 0) > (south.epsilon or 0) > 0
    assert statement.epsilon == north.epsilon == _epsilon(_plan(), 4)
    assert (statement.unit, statement.relation, statement.hospitals) == ("patient", "add_or_remove_one", 2)
    assert "that of north" in statement.remark
    assert (statement.beside_epsilon or 0) > _epsilon(_plan(), 4)
    row = statement.to_json()
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_hospital_without_patients_for_a_task_pays_nothing_for_it():
    stages = (STAGES[0], Stage("classification", rounds=2, patients=(("south", 60),)))
    before, after = _plan(stages).statement(3).patients, _plan(stages).statement(5).patients
    assert after[0] == before[0]
    assert (after[1].epsilon or 0) > (before[1].epsilon or 0)


def test_training_stops_at_the_budget_of_the_worst_hospital():
    plan = _plan()
    curve = [_epsilon(plan, rounds) for rounds in range(1, 6)]
    assert curve == sorted(curve)
    assert plan.max_rounds(curve[2]) == 3
    assert plan.max_rounds(curve[2] - 1e-6) == 2
    assert plan.max_rounds(1e-3) == 0
    assert plan.max_rounds(1e3) == 5, "no more than are configured"
    assert _plan(noise_multiplier=0.0).max_rounds(1e3) == 0
    assert _plan(noise_multiplier=0.0).statement(2).epsilon is None


def test_the_server_adds_nothing_and_clips_nothing():
    plan = _plan()
    assert not plan.noises_sum
    assert plan.sum_multiplier == 0
    assert plan.sum_clip_norm > 1e38
    assert plan.num_slots == 2


def test_an_open_cap_costs_less_than_a_thousandth():
    stages = (Stage("task", rounds=2, patients=(("north", 30),)),)
    capped, whole = (_plan(stages, num_hospitals=1, patient_truncation=cap) for cap in (None, 30))
    assert capped.patients is not None
    assert max(capped.patients.truncations) < 30
    assert _epsilon(whole, 2) < _epsilon(capped, 2) <= _epsilon(whole, 2) * 1.001


def test_the_noise_for_a_target_meets_it_and_hardly_less_would():
    config = PrivacyConfig(**SETTING)
    multiplier = noise_for(2.0, config, num_hospitals=2, rounds=5, stages=STAGES)
    assert _epsilon(_plan(noise_multiplier=multiplier), 5) <= 2.0
    assert _epsilon(_plan(noise_multiplier=multiplier / 1.002), 5) > 2.0


def test_delta_is_warned_of_against_the_largest_hospital():
    assert _plan().caution() == ""
    assert "privacy.delta = 0.02: delta should stay well below 1/60" in _plan(delta=0.02).caution()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"expected_patients": None}, r"privacy\.expected_patients = None: unit \"patient\" needs"),
        ({"expected_patients": 16}, r"privacy\.expected_patients = 16: north has 15 patients for classification"),
        ({"patient_truncation": 4}, r"privacy\.patient_truncation = 4: must be at least the expected patients \(5\)"),
        ({"clipping": "quantile"}, r"privacy\.clipping = quantile: unit \"patient\""),
        ({"mechanism": "laplace", "local_epsilon": 1.0}, r"privacy\.mechanism = laplace: unit \"patient\""),
        ({"noise": "banded", "sampler": "cyclic", "cohort": 1}, r"privacy\.noise = banded: unit \"patient\""),
        ({"unit": "hospital"}, r"privacy\.expected_patients = 5: unit \"hospital\" has no use for it"),
        ({"stages": ()}, r"privacy\.unit = patient: needs the number of each hospital's patients"),
        ({"noise_multiplier": 0.0, "target_epsilon": 1.0}, r"privacy\.target_epsilon = 1\.0: no noise"),
    ],
)
def test_what_does_not_fit_patients_is_refused_by_name(words, message):
    with pytest.raises(PrivacyError, match=message) as refusal:
        _plan(**words)
    assert "\n" not in str(refusal.value)


REPORT: dict[str, Any] = {"patients": 40, "epochs": 2, "delta": 1e-3, "truncation": 14}


def test_a_report_is_what_the_plan_states_for_one_hospital():
    row = patient_report(expected_patients=5, noise_multiplier=2.0, rounds=3, **REPORT)
    plan = _plan((Stage("task", 3, 2, (("only", 40),)),), num_hospitals=1, patient_truncation=14)
    assert row["epsilon"] == row["epsilon_add_or_remove_one"] == plan.epsilon(3)
    assert row["epsilon_replace_one"] > row["epsilon"]
    assert (row["unit"], row["local_steps"], row["patients"]) == ("patient", 48, 40)
    assert not [value for value in row.values() if isinstance(value, dict | list)]


@pytest.mark.parametrize(
    ("unknown", "given", "following"),
    [
        ("noise_multiplier", {"rounds": 3, "expected_patients": 5}, lambda value: value / 1.002),
        ("rounds", {"noise_multiplier": 2.0, "expected_patients": 5}, lambda value: value + 1),
        ("expected_patients", {"noise_multiplier": 2.0, "rounds": 3}, lambda value: value + 1),
    ],
)
def test_what_is_solved_for_meets_the_target_and_the_next_value_does_not(unknown, given, following):
    row = solve_patients(2.0, for_=unknown, **given, **REPORT)
    assert row["epsilon"] <= 2.0
    assert (row["target_epsilon"], row["solved_for"]) == (2.0, unknown)
    assert patient_report(**(given | {unknown: following(row[unknown])}), **REPORT)["epsilon"] > 2.0
