"""Slices of three planes and back, and the fusion of what they say."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from capsfl.models.planes import (
    PLANES,
    default_threshold,
    fit_fusion,
    fuse,
    fused_mask,
    slice_at,
    slices_of,
    volume_from,
)

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, plane=st.sampled_from(PLANES), channels=st.sampled_from([1, 5]))
def test_slices_give_back_their_volume(shape, plane, channels):
    volume = np.arange(np.prod(shape)).reshape(shape)
    slices = slices_of(volume, plane, channels)
    assert slices.shape[-1] == channels
    np.testing.assert_array_equal(volume_from(slices, plane), volume)
    np.testing.assert_array_equal(volume_from(slices[..., channels // 2], plane), volume)


def test_rows_and_columns_are_those_of_the_plane():
    z, y, x = np.meshgrid(np.arange(2), np.arange(3), np.arange(4), indexing="ij")
    volume = 100 * z + 10 * y + x
    assert slices_of(volume, "xy")[1, 2, 3, 0] == 123
    assert slices_of(volume, "yz")[3, 1, 2, 0] == 123
    assert slices_of(volume, "xz")[2, 1, 3, 0] == 123


def test_neighbours_stand_around_their_slice_and_repeat_at_the_border():
    volume = np.broadcast_to(np.arange(6)[:, None, None], (6, 2, 2))
    slices = slices_of(volume, "xy", 5)
    np.testing.assert_array_equal(slices[3, 0, 0], [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(slices[0, 1, 1], [0, 0, 0, 1, 2])
    np.testing.assert_array_equal(slices[5, 0, 1], [3, 4, 5, 5, 5])


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, plane=st.sampled_from(PLANES), channels=st.sampled_from([1, 5]))
def test_one_slice_is_that_of_all(shape, plane, channels):
    volume = np.arange(np.prod(shape)).reshape(shape)
    for index, expected in enumerate(slices_of(volume, plane, channels)):
        np.testing.assert_array_equal(slice_at(volume, plane, index, channels), expected)


@pytest.mark.parametrize("plane", PLANES)
def test_slices_taken_in_a_loop_are_those_cut_at_once(plane):
    volume = np.random.default_rng(1).uniform(size=(3, 4, 5)).astype(np.float32)
    cut = slices_of(volume, plane, 5)
    looped = jax.jit(lambda v: jax.lax.map(lambda i: slice_at(v, plane, i, 5), jnp.arange(len(cut))))(volume)
    np.testing.assert_array_equal(looped, cut)


@pytest.mark.parametrize("plane", PLANES)
def test_slicing_and_fusing_work_inside_a_jitted_function(plane):
    volume = np.random.default_rng(0).uniform(size=(3, 4, 5)).astype(np.float32)
    there_and_back = jax.jit(lambda v: volume_from(slices_of(v, plane, 5), plane))
    np.testing.assert_array_equal(there_and_back(volume), volume)
    three = np.stack([volume, volume**2, volume**3])
    for rule, weights in [("mean", None), ("max", None), ("learned", np.array([1.0, 2.0, 3.0, -1.0]))]:
        fused = jax.jit(lambda p, rule=rule, weights=weights: fuse(p, rule=rule, weights=weights))(three)
        np.testing.assert_allclose(fused, fuse(three, rule=rule, weights=weights), rtol=1e-6)


def test_rules_fuse_as_they_are_called():
    three = np.array([0.2, 0.5, 0.95]).reshape(3, 1, 1, 1)
    assert fuse(three).item() == pytest.approx(0.55)
    assert fuse(three, weights=np.array([1.0, 0.0, 3.0])).item() == pytest.approx((0.2 + 3 * 0.95) / 4)
    assert fuse(three, rule="max").item() == 0.95
    assert fuse(three, rule="min").item() == 0.2
    learned = fuse(three, rule="learned", weights=np.array([1.0, 2.0, 3.0, -4.0])).item()
    assert learned == pytest.approx(1 / (1 + np.exp(-(0.2 + 1.0 + 2.85 - 4.0))))


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_two_sure_planes_of_three_are_not_more_than_two(array):
    two = array(np.array([1, 1, 0], np.float32).reshape(3, 1, 1, 1))
    assert not fused_mask(two).item()
    assert fused_mask(two, threshold=0.5).item()
    assert fused_mask(array(np.array([1, 1, 0.001], np.float32).reshape(3, 1, 1, 1))).item()


def test_thresholds_ask_for_agreement_as_the_rule_means_it():
    assert default_threshold("mean", 3) == pytest.approx(2 / 3)
    assert [default_threshold("mean", planes) for planes in (1, 2)] == [0.5, 0.5]
    assert [default_threshold(rule, 3) for rule in ("max", "min", "learned")] == [0.5] * 3
    two = np.array([0.9, 0.05]).reshape(2, 1, 1, 1)
    assert not fused_mask(two).item()
    assert fused_mask(two + 0.1).item()
    weighted = np.array([0.9, 0.1, 0.1]).reshape(3, 1, 1, 1)
    assert fused_mask(weighted, weights=np.array([4.0, 1.0, 1.0]), threshold=0.6).item()


def test_the_learned_rule_does_not_overflow():
    far = np.array([-1.0, 1.0], np.float32).reshape(1, 2, 1, 1)
    fused = fuse(far, rule="learned", weights=np.array([1e4, 0.0]))
    np.testing.assert_array_equal(fused.ravel(), [0, 1])


def test_other_rules_mark_from_one_half():
    three = np.array([0.2, 0.4, 0.6]).reshape(3, 1, 1, 1)
    assert fused_mask(three, rule="max").item()
    assert not fused_mask(three, rule="min").item()
    assert fused_mask(three, rule="min", threshold=0.1).item()


def test_learned_rule_is_the_logistic_regression():
    generator = np.random.default_rng(0)
    probabilities = generator.uniform(size=(3, 400))
    chance = 1 / (1 + np.exp(-(3 * probabilities[0] + probabilities[1] - 2)))
    truth = generator.uniform(size=400) < chance

    def loss(weights):
        scores = weights[:3] @ probabilities + weights[3]
        return np.sum(np.logaddexp(0, scores) - truth * scores) + 0.0005 * weights @ weights

    expected = minimize(loss, np.zeros(4), method="BFGS").x
    np.testing.assert_allclose(fit_fusion(probabilities, truth), expected, rtol=1e-3, atol=1e-3)


def test_learned_rule_stays_finite_where_the_planes_separate_the_classes():
    truth = np.arange(20) >= 10
    probabilities = np.broadcast_to(truth.astype(np.float64), (3, 20))
    weights = fit_fusion(probabilities, truth)
    assert np.isfinite(weights).all()
    found = fused_mask(probabilities[..., None, None], rule="learned", weights=weights)
    np.testing.assert_array_equal(found[:, 0, 0], truth)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: slices_of(np.zeros((2, 2)), "xy"), r"volume \(2, 2\): expected three axes"),
        (lambda: slices_of(np.zeros((2, 2, 2)), cast(Any, "zx")), "plane 'zx': expected one of xy, yz, xz"),
        (lambda: slices_of(np.zeros((2, 2, 2)), "xy", 3), "channels 3: expected 1 or 5"),
        (lambda: volume_from(np.zeros((2, 2)), "xy"), r"slices \(2, 2\): expected"),
        (lambda: fuse(np.zeros((3, 1, 1, 1)), rule=cast(Any, "median")), "rule 'median': expected one of"),
        (lambda: fuse(np.zeros((3, 1, 1, 1)), rule="max", weights=np.ones(3)), "no meaning for rule 'max'"),
        (lambda: fuse(np.zeros((3, 1, 1, 1)), weights=np.array([1.0, -1.0, 1.0])), "none negative"),
        (lambda: fuse(np.zeros((3, 1, 1, 1)), rule="learned"), "fit them with fit_fusion"),
        (lambda: fit_fusion(np.zeros((3, 4)), np.zeros(4)), "one class only"),
        (lambda: fit_fusion(np.zeros((3, 4)), np.zeros(5)), r"truth \(5,\) does not fit"),
    ],
)
def test_impossible_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
