"""Solving for noise, rounds or cohort: the answer meets the target, and the next one would not."""

import dp_accounting
import pytest

from capsfl.privacy import PrivacyError, epsilon_report, solve
from capsfl.privacy.accounting import LEAST_NOISE, epsilon
from capsfl.privacy.calibration import max_rounds
from capsfl.privacy.events import SampledGaussian

STUDY = {"hospitals": 60, "delta": 1e-3}
GIVEN = {
    "noise_multiplier": {"cohort": 6, "rounds": 20},
    "rounds": {"cohort": 6, "noise_multiplier": 3.0},
    "cohort": {"rounds": 20, "noise_multiplier": 3.0},
}
NEXT = {
    "noise_multiplier": lambda value: value / 1.002,
    "rounds": lambda value: value + 1,
    "cohort": lambda value: value + 1,
}


def _report(solution, **changes):
    fields = ("hospitals", "cohort", "noise_multiplier", "rounds", "delta", "sampler", "truncation")
    return epsilon_report(**({field: solution[field] for field in fields} | changes))


@pytest.mark.parametrize("sampler", ["poisson", "fixed"])
@pytest.mark.parametrize("unknown", ["noise_multiplier", "rounds", "cohort"])
def test_the_solution_meets_the_target_and_the_next_value_does_not(sampler, unknown):
    cap = {"truncation": 20} if sampler == "poisson" else {}
    solution = solve(4.0, for_=unknown, sampler=sampler, **STUDY, **cap, **GIVEN[unknown])
    assert solution["epsilon"] <= 4.0
    assert _report(solution)["epsilon"] == solution["epsilon"]
    assert _report(solution, **{unknown: NEXT[unknown](solution[unknown])})["epsilon"] > 4.0
    assert (solution["target_epsilon"], solution["solved_for"]) == (4.0, unknown)


@pytest.mark.parametrize("unknown", ["noise_multiplier", "rounds"])
def test_all_hospitals_solve_by_the_exact_composition(unknown):
    given = {key: value for key, value in GIVEN[unknown].items() if key != "cohort"}
    solution = solve(25.0, for_=unknown, sampler="all", **STUDY, **given)
    assert solution["cohort"] == 60
    assert solution["epsilon"] <= 25.0
    assert _report(solution, **{unknown: NEXT[unknown](solution[unknown])})["epsilon"] > 25.0


@pytest.mark.parametrize("unknown", ["noise_multiplier", "rounds", "cohort"])
def test_an_open_poisson_cap_stays_within_the_target(unknown):
    solution = solve(4.0, for_=unknown, sampler="poisson", **STUDY, **GIVEN[unknown])
    assert 4.0 * 0.9 < solution["epsilon"] <= 4.0
    assert solution["cohort"] <= solution["truncation"] <= 60


def test_a_full_cohort_without_replacement_wins_where_it_displaces_nobody():
    solution = solve(4.0, for_="cohort", sampler="fixed", rounds=1, noise_multiplier=2.0, **STUDY)
    assert solution["cohort"] == 60


def test_a_poisson_cohort_never_outgrows_its_cap():
    solution = solve(50.0, for_="cohort", sampler="poisson", rounds=1, noise_multiplier=5.0, truncation=9, **STUDY)
    assert solution["cohort"] == 9


@pytest.mark.parametrize("target", [0.05, 1.0, 300.0])
def test_the_least_noise_is_the_exact_one_of_a_single_gaussian(target):
    solution = solve(target, for_="noise_multiplier", sampler="all", rounds=1, **STUDY)
    exact = dp_accounting.get_sigma_gaussian(target, STUDY["delta"])
    assert exact <= solution["noise_multiplier"] <= exact * (1 + 1e-4)


def test_a_target_beyond_any_accountable_noise_takes_the_least():
    solution = solve(1e9, for_="noise_multiplier", sampler="all", rounds=1, **STUDY)
    assert solution["noise_multiplier"] == LEAST_NOISE
    assert solution["epsilon"] <= 1e9


def test_max_rounds_is_the_last_round_within_budget_and_may_be_none():
    mechanism = SampledGaussian("all", 10, 10, 4.0)
    last = max_rounds(mechanism, target_epsilon=3.0, delta=1e-5)
    assert epsilon(mechanism, rounds=last, delta=1e-5) <= 3.0
    assert epsilon(mechanism, rounds=last + 1, delta=1e-5) > 3.0
    assert max_rounds(mechanism, target_epsilon=0.1, delta=1e-5) == 0
    assert max_rounds(SampledGaussian("all", 10, 10, 0.0), target_epsilon=1e9, delta=1e-5) == 0


@pytest.mark.parametrize(
    ("target", "unknown", "values", "message"),
    [
        (0.0, "rounds", {"noise_multiplier": 1.0}, "target_epsilon = 0.0: must be finite and positive"),
        (1.0, "rounds", {"noise_multiplier": 1.0, "rounds": 4}, "rounds = 4: is what is solved for"),
        (1.0, "rounds", {}, "noise_multiplier = None: must be above 0 to solve for rounds"),
        (1.0, "noise_multiplier", {}, "rounds = None: must be above 0 to solve for noise_multiplier"),
        (1.0, "rounds", {"noise_multiplier": 0.5}, "target_epsilon = 1.0: is exceeded by one round"),
        (1e-9, "noise_multiplier", {"rounds": 3, "delta": 1e-9}, "out of reach of any noise multiplier"),
        (1.0, "cohort", {"rounds": 1, "noise_multiplier": 1.0}, "sampler = all: has no cohort to choose"),
    ],
)
def test_questions_without_an_answer_are_refused(target, unknown, values, message):
    with pytest.raises(PrivacyError, match=message):
        solve(target, for_=unknown, sampler="all", **(STUDY | values))


def test_a_cohort_of_one_that_already_exceeds_the_target_is_refused():
    with pytest.raises(PrivacyError, match="is exceeded by a cohort of 1"):
        solve(0.01, for_="cohort", sampler="fixed", rounds=5, noise_multiplier=1.0, **STUDY)
