"""Robust rules against loops from their papers: masked, in any order, and under as many liars as claimed."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from capsfl.federated import robust
from capsfl.federated.aggregation import AggregationConfig, make_rule
from capsfl.privacy.events import PrivacyError
from capsfl.privacy.plan import PrivacyConfig, PrivacyPlan

SLOTS, SIZE, LIARS = 9, 5, 2


def median_loop(rows):
    """Yin et al. 2018, Definition 1, coordinate by coordinate."""
    if not len(rows):
        return np.zeros(SIZE)
    result = []
    for column in rows.T:
        ordered = sorted(column)
        middle = len(ordered) // 2
        result.append(ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2)
    return np.array(result)


def trimmed_loop(rows, trim=0.25):
    """Yin et al. 2018, Definition 2: without the largest and smallest share of each coordinate."""
    if not len(rows):
        return np.zeros(SIZE)
    cut = int(np.floor(trim * len(rows)))
    return np.array([np.mean(sorted(column)[cut : len(rows) - cut]) for column in rows.T])


def krum_scores(rows):
    """Blanchard et al. 2017: the squared distances to the n - f - 2 closest others, added up."""
    scores = []
    for i, row in enumerate(rows):
        distances = sorted(((row - other) ** 2).sum() for j, other in enumerate(rows) if j != i)
        scores.append(sum(distances[: len(rows) - LIARS - 2]))
    return np.array(scores)


def krum_loop(rows, selected=1):
    if len(rows) < max(2 * LIARS + 3, selected + LIARS + 2):
        return median_loop(rows)
    return rows[np.argsort(krum_scores(rows), kind="stable")[:selected]].mean(0)


def compiled(function: Any, **options: Any) -> Any:
    return jax.jit(partial(function, **options))


RULES = {
    "median": (compiled(robust.coordinate_median), median_loop),
    "trimmed mean": (compiled(robust.trimmed_mean, trim=0.25), trimmed_loop),
    "Krum": (compiled(robust.krum, byzantine=LIARS), krum_loop),
    "multi-Krum": (compiled(robust.krum, byzantine=LIARS, selected=3), partial(krum_loop, selected=3)),
}

seeds = st.integers(0, 2**31 - 1)
masks = st.lists(st.booleans(), min_size=SLOTS, max_size=SLOTS).map(lambda mask: np.array(mask, bool))
scales = st.sampled_from([1e-6, 1.0, 1e6])
rules = pytest.mark.parametrize("name", RULES)


def draw(seed, scale, *, offset=0.0):
    rows = np.random.default_rng(seed).normal(size=(SLOTS, SIZE)) + offset
    return (scale * rows).astype(np.float32)


def apply(rule, rows, mask):
    """Through a tree of two leaves, since a distance is over all of them together."""
    found = rule({"a": jnp.asarray(rows[:, :2]), "b": jnp.asarray(rows[:, 2:]).reshape(SLOTS, 3, 1)}, jnp.asarray(mask))
    return np.concatenate([found["a"], np.ravel(found["b"])]).astype(np.float64)


@rules
@settings(max_examples=40, deadline=None)
@given(seed=seeds, mask=masks, scale=scales)
def test_a_rule_is_its_papers_loop_over_those_who_are_there(name, seed, mask, scale):
    rule, loop = RULES[name]
    rows = draw(seed, scale)
    there = rows[mask].astype(np.float64)
    if name == "multi-Krum" and len(there) >= 2 * LIARS + 3:
        # Where the third and the fourth score nearly tie, rounding may take either.
        ordered = np.sort(krum_scores(there))
        assume(ordered[3] > ordered[2] * (1 + 1e-4))
    found = apply(rule, np.where(mask[:, None], rows, np.float32(np.nan)), mask)
    np.testing.assert_allclose(found, loop(there), rtol=1e-4, atol=1e-5 * scale)


@rules
@settings(max_examples=25, deadline=None)
@given(seed=seeds, mask=masks, order=st.permutations(range(SLOTS)))
def test_the_order_of_the_slots_does_not_matter(name, seed, mask, order):
    rule, _ = RULES[name]
    rows = draw(seed, 1.0)
    np.testing.assert_allclose(apply(rule, rows, mask), apply(rule, rows[order], mask[order]), rtol=1e-5, atol=1e-6)


@rules
@settings(max_examples=40, deadline=None)
@given(
    seed=seeds,
    liars=st.sets(st.integers(0, SLOTS - 1), min_size=LIARS, max_size=LIARS),
    lie=st.sampled_from([-1.0, 1e6, -1e30, 0.0, 3.0]),
    together=st.booleans(),
)
def test_as_many_liars_as_claimed_keep_the_result_near_the_honest(name, seed, liars, lie, together):
    rule, _ = RULES[name]
    rows = draw(seed, 0.1, offset=10.0)
    guilty = np.isin(np.arange(SLOTS), sorted(liars))
    honest = rows[~guilty].astype(np.float64)
    # Colluding liars hand over the same update, which is what a rule by distances is most easily taken in by.
    rows[guilty] *= np.float32(lie)
    if together:
        rows[guilty] = rows[guilty][0]
    found = apply(rule, rows, np.ones(SLOTS, bool))
    if name in ("median", "trimmed mean"):
        assert (found >= honest.min(0) - 1e-5).all()
        assert (found <= honest.max(0) + 1e-5).all()
    else:
        # A selected update is no further from some honest one than the n - f - 2 distances an honest one adds up.
        diameter = max(np.linalg.norm(a - b) for a in honest for b in honest)
        distance = min(np.linalg.norm(found - row) for row in honest)
        assert distance <= np.sqrt(SLOTS - LIARS - 2) * diameter


def test_one_liar_more_than_claimed_can_take_krum_over():
    rows = draw(0, 1.0)
    rows[:5] = 100.0
    found = apply(RULES["Krum"][0], rows, np.ones(SLOTS, bool))
    np.testing.assert_allclose(found, 100.0)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, mask=masks)
def test_the_weighted_mean_is_that_of_numpy(seed, mask):
    rows, weights = draw(seed, 1.0), np.random.default_rng(seed + 1).integers(1, 50, SLOTS).astype(np.float32)
    updates = {"a": jnp.asarray(np.where(mask[:, None], rows, np.float32(np.nan)))}
    found = np.asarray(robust.weighted_mean(updates, jnp.asarray(weights), jnp.asarray(mask))["a"])
    expected = np.average(rows[mask], axis=0, weights=weights[mask]) if mask.any() else np.zeros(SIZE)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("byzantine = 4", {"byzantine": 4}),
        ("byzantine = -1", {"byzantine": -1}),
        ("selected = 6", {"byzantine": LIARS, "selected": 6}),
        ("selected = 0", {"byzantine": LIARS, "selected": 0}),
    ],
)
def test_krum_refuses_a_cohort_that_can_never_be_enough(field, options):
    with pytest.raises(PrivacyError, match=f"^{field}: .*9|^{field}: .*5 updates"):
        robust.krum({"a": jnp.zeros((SLOTS, SIZE))}, jnp.ones(SLOTS, bool), **options)


def test_the_configuration_is_refused_before_anything_is_traced_with_the_same_words():
    plan = PrivacyPlan.build(PrivacyConfig(clip_norm=1.0), num_hospitals=SLOTS)
    with pytest.raises(PrivacyError) as late:
        robust.check_krum(slots=SLOTS, byzantine=2, selected=6)
    with pytest.raises(PrivacyError) as early:
        make_rule(AggregationConfig(rule="multi_krum", byzantine=2, selected=6), plan)
    assert str(early.value) == f"aggregation.{late.value}"


@pytest.mark.parametrize("trim", [-0.1, 0.5, 1.0])
def test_a_trim_that_leaves_nothing_is_refused(trim):
    with pytest.raises(PrivacyError, match=r"^trim = "):
        robust.trimmed_mean({"a": jnp.zeros((3, 2))}, jnp.ones(3, bool), trim=trim)
