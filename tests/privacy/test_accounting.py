"""Epsilon against dp-accounting's own accountant, an independent PRV accountant and published values."""

import json
import logging

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from capsfl.privacy import PrivacyError, epsilon_report, epsilon_under_both_relations
from capsfl.privacy.accounting import beside_epsilon, epsilon, resolve_truncation
from capsfl.privacy.events import SampledGaussian

# (H, m, z, T): every row of the vectors.
ROWS = [
    (100, 10, 1.0, 100),
    (100, 30, 1.0, 24),
    (1000, 100, 1.0, 24),
    (10000, 300, 1.0, 24),
    (50, 5, 2.0, 200),
    (20, 20, 5.0, 50),
    (1000, 10, 0.8, 1000),
    (100, 50, 4.0, 100),
    (200, 20, 8.0, 500),
    (10000, 50, 0.6, 2000),
]


@pytest.fixture(scope="module")
def vectors(shared_vectors):
    rows = json.loads((shared_vectors / "epsilon.json").read_text())["rows"]
    return {(row["H"], row["m"], row["z"], row["T"]): row for row in rows}


def test_every_row_of_the_vectors_is_tested(vectors):
    assert set(vectors) == set(ROWS)


@pytest.mark.parametrize(("hospitals", "cohort", "multiplier", "rounds"), ROWS)
def test_poisson_matches_the_known_pld_and_rdp_values(vectors, hospitals, cohort, multiplier, rounds):
    row = vectors[hospitals, cohort, multiplier, rounds]
    mechanism = SampledGaussian("poisson", hospitals, cohort, multiplier)
    figure = epsilon(mechanism, rounds=rounds, delta=row["delta"])
    assert figure == pytest.approx(row["poisson_pld_add_remove"]["eps"], rel=1e-3)
    if "poisson_prv_add_remove" in row:
        assert row["poisson_prv_add_remove"]["lower"] < figure < row["poisson_prv_add_remove"]["upper"]
    beside = beside_epsilon(mechanism, rounds=rounds, delta=row["delta"])
    assert beside == pytest.approx(row["poisson_rdp_add_remove"]["eps"], rel=1e-6)


@pytest.mark.parametrize(("hospitals", "cohort", "multiplier", "rounds"), ROWS)
def test_fixed_matches_the_known_pld_and_rdp_values(vectors, hospitals, cohort, multiplier, rounds):
    row = vectors[hospitals, cohort, multiplier, rounds]
    mechanism = SampledGaussian("fixed", hospitals, cohort, multiplier)
    figure = epsilon(mechanism, rounds=rounds, delta=row["delta"])
    assert figure == pytest.approx(row["wor_pld_truncated_p1_cap_m"]["eps"], rel=1e-3)
    beside = beside_epsilon(mechanism, rounds=rounds, delta=row["delta"])
    assert beside == pytest.approx(row["wor_rdp_replace_one_nm_z_over_2"]["eps"], rel=1e-6)
    assert beside > figure


def test_all_matches_the_known_values_under_both_relations(vectors):
    row = vectors[20, 20, 5.0, 50]
    report = epsilon_report(hospitals=20, cohort=None, noise_multiplier=5.0, rounds=50, delta=1e-3, sampler="all")
    assert report["epsilon"] == pytest.approx(row["poisson_pld_add_remove"]["eps"], rel=1e-6)
    assert report["beside_epsilon"] == pytest.approx(row["poisson_pld_replace_one"]["eps"], rel=1e-6)
    assert (report["relation"], report["beside_relation"]) == ("add_or_remove_one", "replace_one")


@pytest.mark.parametrize(("rounds", "expected"), [(1, 4.38), (10, 17.9), (100, 91.8)])
def test_three_hospitals_have_no_meaningful_epsilon(rounds, expected):
    report = epsilon_report(hospitals=3, cohort=3, noise_multiplier=1.0, rounds=rounds, delta=1e-5, sampler="all")
    assert report["epsilon"] == pytest.approx(expected, rel=3e-3)
    assert "3 hospitals are too few" in report["remark"]
    assert ("above 10" in report["remark"]) == (expected > 10)


@pytest.mark.parametrize(
    "mechanism",
    [
        SampledGaussian("poisson", 12, 4, 1.5, 6),
        SampledGaussian("fixed", 12, 4, 3.0),
        SampledGaussian("all", 12, 12, 2.0),
    ],
    ids=lambda mechanism: mechanism.sampler,
)
def test_the_figure_is_that_of_the_stated_event_and_never_below_a_finer_grid(mechanism):
    relation = getattr(dp_accounting.NeighboringRelation, mechanism.relation.upper())
    accountant = PLDAccountant(relation, value_discretization_interval=1e-4)
    finer = accountant.compose(mechanism.event, 7).get_epsilon(1e-5)
    figure = epsilon(mechanism, rounds=7, delta=1e-5)
    assert figure == pytest.approx(finer, abs=3e-5)
    assert figure >= finer - 1e-5 * (mechanism.sampler == "all")  # the exact figure lies below any grid's


@pytest.mark.parametrize(("truncation", "expected"), [(10, 15.7), (20, 4.96), (30, 4.784)])
def test_truncating_poisson_cohorts_costs_what_it_should(truncation, expected):
    mechanism = SampledGaussian("poisson", 100, 10, 1.0, truncation)
    assert epsilon(mechanism, rounds=100, delta=1e-3) == pytest.approx(expected, rel=3e-3)


def test_the_automatic_cap_is_the_smallest_that_costs_under_a_thousandth():
    whole = SampledGaussian("poisson", 100, 10, 1.0)
    capped = resolve_truncation(whole, rounds=100, delta=1e-3)
    tighter = SampledGaussian("poisson", 100, 10, 1.0, capped.num_slots - 1)
    limit = 1.001 * epsilon(whole, rounds=100, delta=1e-3)
    assert epsilon(capped, rounds=100, delta=1e-3) <= limit < epsilon(tighter, rounds=100, delta=1e-3)


def test_the_automatic_cap_keeps_every_hospital_without_noise():
    mechanism = resolve_truncation(SampledGaussian("poisson", 100, 10, 0.0), rounds=100, delta=1e-3)
    assert mechanism.num_slots == 100


@pytest.mark.parametrize("sampler", ["poisson", "fixed", "all"])
@pytest.mark.parametrize("multiplier", [0.0, 1e-9])
def test_without_noise_epsilon_is_null_and_said_to_be_unbounded(sampler, multiplier):
    report = epsilon_report(hospitals=30, cohort=30, noise_multiplier=multiplier, rounds=1, delta=1e-5, sampler=sampler)
    assert report["epsilon"] is None
    assert report["beside_epsilon"] is None
    assert "nothing bounds" in report["remark"]


@pytest.mark.parametrize("sampler", ["poisson", "fixed"])
def test_little_noise_is_accounted_on_a_grid_that_fits_memory(sampler):
    mechanism = SampledGaussian(sampler, 10, 10, 0.01)
    distance = 2 if sampler == "fixed" else 1
    exact = dp_accounting.get_epsilon_gaussian(0.01 / distance, 1e-5)
    assert epsilon(mechanism, rounds=1, delta=1e-5) == pytest.approx(exact, rel=1e-3)


def test_no_rounds_cost_nothing():
    for sampler in ("poisson", "fixed", "all"):
        mechanism = SampledGaussian(sampler, 5, 5, 1.0)
        assert epsilon(mechanism, rounds=0, delta=1e-5) == 0
        assert beside_epsilon(mechanism, rounds=0, delta=1e-5) == 0


def test_the_report_is_flat_json_with_all_that_recomputes_it():
    report = epsilon_report(
        hospitals=40, cohort=4, noise_multiplier=2.0, rounds=5, delta=1e-4, sampler="poisson", truncation=11
    )
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    again = epsilon_report(
        **{
            key: report[key]
            for key in ("hospitals", "cohort", "noise_multiplier", "rounds", "delta", "sampler", "truncation")
        }
    )
    assert again == report
    assert report["unit"] == "hospital"
    assert report["accountant"].startswith("PLD of the truncated")
    assert "untruncated" in report["beside_accountant"]


def test_delta_as_large_as_one_hospital_is_remarked():
    report = epsilon_report(hospitals=100, cohort=100, noise_multiplier=9.0, rounds=1, delta=0.01, sampler="all")
    assert "below 1/100" in report["remark"]


def test_orders_left_out_of_rdp_do_not_clutter_the_log(caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        beside_epsilon(SampledGaussian("poisson", 3, 2, 1.0), rounds=3, delta=1e-5)
        logging.getLogger("absl").warning("another matter")
    assert [record.getMessage() for record in caplog.records] == ["another matter"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hospitals": 0, "cohort": None}, "hospitals = 0: must be at least 1"),
        ({"cohort": 12}, r"cohort = 12: must lie between 1 and the number of hospitals \(10\)"),
        ({"cohort": 0}, "cohort = 0: must lie between 1"),
        ({"sampler": "all"}, 'cohort = 4: sampler "all" takes all 10 hospitals'),
        ({"noise_multiplier": -1.0}, "noise_multiplier = -1.0: must be finite"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier = nan: must be finite"),
        ({"truncation": 3}, r"truncation = 3: must lie between the expected cohort \(4\)"),
        ({"truncation": 11}, "truncation = 11: must lie"),
        ({"sampler": "fixed", "truncation": 5}, 'truncation = 5: only sampler "poisson" is truncated'),
        ({"rounds": -1}, "rounds = -1: must not be negative"),
        ({"delta": 0.0}, "delta = 0.0: must be at least 1e-10"),
        ({"delta": 1.0}, "delta = 1.0: must be at least"),
    ],
)
def test_contradictory_values_are_refused_in_one_line(changes, message):
    values = {
        "hospitals": 10,
        "cohort": 4,
        "noise_multiplier": 1.0,
        "rounds": 1,
        "delta": 1e-5,
        "sampler": "poisson",
    }
    with pytest.raises(PrivacyError, match=message) as refusal:
        epsilon_report(**(values | changes))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("sampler", "first", "second"),
    [
        ("poisson", "add_or_remove_one", "replace_one"),
        ("fixed", "replace_one", "add_or_remove_one"),
        ("all", "add_or_remove_one", "replace_one"),
    ],
)
def test_both_relations_stand_side_by_side_with_the_headline_first(sampler, first, second):
    report = epsilon_report(
        hospitals=30,
        cohort=30 if sampler == "all" else 5,
        noise_multiplier=2.0,
        rounds=10,
        delta=1e-3,
        sampler=sampler,
    )
    both = epsilon_under_both_relations(report)
    assert list(both) == [f"epsilon_{first}", f"epsilon_{second}", "other_relation"]
    assert both[f"epsilon_{first}"] == report["epsilon"]
    assert both["epsilon_add_or_remove_one"] <= both["epsilon_replace_one"] * (1 + 1e-9)
    if sampler == "all":
        assert both["epsilon_replace_one"] == report["beside_epsilon"]
