"""A plan draws the cohorts it accounts, and refuses what contradicts itself."""

import itertools
import json
import time
from typing import Any

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from capsfl.privacy import PrivacyConfig, PrivacyError, PrivacyPlan


def _plan(hospitals=3, rounds=30, **settings: Any):
    defaults: dict[str, Any] = {"clip_norm": 1.0, "noise_multiplier": 1.0}
    config = PrivacyConfig(**(defaults | settings))
    return PrivacyPlan.build(config, num_hospitals=hospitals, rounds=rounds)


@pytest.mark.parametrize(
    ("settings", "slots", "expected"),
    [
        ({}, 12, 12.0),
        ({"sampler": "all", "cohort": 12}, 12, 12.0),
        ({"sampler": "fixed", "cohort": 5}, 5, 5.0),
        ({"sampler": "fixed"}, 12, 12.0),
        ({"sampler": "poisson", "cohort": 5, "truncation": 8}, 8, 5.0),
        ({"sampler": "poisson"}, 12, 12.0),
    ],
)
def test_slots_and_divisor_follow_the_sampler(settings, slots, expected):
    plan = _plan(12, **settings)
    cohort = jax.jit(lambda key: plan.sample(key=key))(jax.random.key(0))
    assert plan.num_slots == slots
    assert plan.expected_cohort == expected
    assert cohort.indices.shape == cohort.mask.shape == (slots,)
    assert len(set(cohort.indices.tolist())) == slots
    if settings.get("sampler") != "poisson":
        assert int(cohort.mask.sum()) == expected


def test_poisson_plans_take_the_expected_number_of_hospitals_on_average():
    plan = _plan(50, sampler="poisson", cohort=10)
    masks = jax.vmap(lambda key: plan.sample(key=key).mask)(jax.random.split(jax.random.key(2), 3000))
    assert 10 < plan.num_slots < 50
    assert np.asarray(masks).sum(axis=1).mean() == pytest.approx(10, abs=4 * np.sqrt(8 / 3000))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "fixed", "cohort": 12}, r"privacy\.cohort = 12: must lie between 1 and .* \(10\)"),
        ({"cohort": 4}, r'privacy\.cohort = 4: sampler "all" takes all 10 hospitals'),
        ({"sampler": "poisson", "cohort": 4, "truncation": 3}, r"privacy\.truncation = 3: must lie"),
        ({"sampler": "poisson", "cohort": 4, "truncation": 11}, r"privacy\.truncation = 11: must lie"),
        (
            {"sampler": "fixed", "cohort": 4, "truncation": 4},
            r'privacy\.truncation = 4: only sampler "poisson"',
        ),
        ({"noise_multiplier": 0.0, "target_epsilon": 2.0}, r"privacy\.target_epsilon = 2\.0: no noise"),
    ],
)
def test_a_mismatch_is_refused_with_the_dotted_field(settings, message):
    with pytest.raises(PrivacyError, match=message) as refusal:
        _plan(10, **settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_norm": 0.0},
        {"clip_norm": float("inf")},
        {"noise_multiplier": -0.1},
        {"delta": 0.0},
        {"delta": 1.0},
        {"cohort": 0},
        {"cohort": True},
        {"target_epsilon": 0.0},
        {"sampler": "shuffle"},
        {"noise_on": "mean"},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused_by_the_configuration(settings):
    (field,) = settings
    with pytest.raises(ValidationError, match=field):
        PrivacyConfig(**({"clip_norm": 1.0} | settings))


@pytest.mark.parametrize(("rounds", "expected"), [(1, 4.38), (10, 17.9), (100, 91.8)])
def test_the_plan_of_three_hospitals_states_the_known_epsilons(rounds, expected):
    statement = _plan(3).statement(rounds)
    assert statement.epsilon == pytest.approx(expected, rel=3e-3)
    assert statement.epsilon == _plan(3).epsilon(rounds)
    assert (statement.unit, statement.relation) == ("hospital", "add_or_remove_one")


def test_a_statement_is_flat_json_and_names_what_it_accounts():
    statement = _plan(40, sampler="poisson", cohort=4, truncation=12, clip_norm=0.5, delta=1e-3).statement(6)
    record = statement.to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["clip_norm"] == 0.5
    assert record["truncation"] == 12
    assert record["rounds"] == 6
    assert record["beside_epsilon"] > record["epsilon"]


@pytest.mark.parametrize("sampler", ["poisson", "fixed", "all"])
def test_the_curve_rises_ends_at_epsilon_and_costs_little_for_three_hospitals(sampler):
    plan = _plan(3, sampler=sampler, cohort=3 if sampler == "all" else 2, delta=2e-5)
    start = time.process_time()
    curve = [figure for figure in plan.epsilon_curve(30) if figure is not None]
    assert time.process_time() - start < 4.0  # about 1 s here; a fine grid would cost more than 10
    assert len(curve) == 30
    assert all(before < after for before, after in itertools.pairwise(curve))
    assert curve[-1] == plan.epsilon(30)


def test_training_can_stop_exactly_at_its_budget():
    plan = _plan(30, sampler="poisson", cohort=6, noise_multiplier=2.0, target_epsilon=3.0)
    last = plan.max_rounds(3.0)
    within, beyond = plan.statement(last).epsilon, plan.statement(last + 1).epsilon
    assert within is not None
    assert beyond is not None
    assert within <= 3.0 < beyond


def test_without_noise_there_is_no_epsilon_but_training_runs():
    plan = _plan(3, noise_multiplier=0.0)
    assert plan.epsilon(1) is None
    assert plan.epsilon_curve(2) == (None, None)
    assert plan.statement(5).epsilon is None
    assert plan.max_rounds(100.0) == 0
    assert bool(plan.sample(key=jax.random.key(0)).mask.all())


def test_plans_hash_and_serve_as_static_arguments():
    plan = _plan(8, sampler="fixed", cohort=3)
    assert plan == _plan(8, sampler="fixed", cohort=3)
    traces = []

    def sample(plan, key):
        traces.append(plan)
        return plan.sample(key=key)

    compiled = jax.jit(sample, static_argnums=0)
    compiled(plan, jax.random.key(0))
    compiled(_plan(8, sampler="fixed", cohort=3), jax.random.key(1))
    assert len(traces) == 1
