"""Overlap, distance and volume of masks against brute force, and what they say of empty ones."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, directed_hausdorff

from capsfl.learning.masks import dice, hd95_mm, volume_error_ml

MASKS = st.lists(st.booleans(), min_size=27, max_size=27).map(lambda bits: np.array(bits).reshape(3, 3, 3))


@settings(max_examples=40, deadline=None)
@given(first=MASKS, second=MASKS)
def test_dice_and_hausdorff_are_symmetric_and_perfect_only_for_equal_masks(first, second):
    spacing = (5.0, 1.0, 0.7)
    assert dice(first, second) == dice(second, first)
    assert hd95_mm(first, second, spacing) == hd95_mm(second, first, spacing)
    assert (dice(first, second) == 1) == np.array_equal(first, second)
    assert hd95_mm(first, first, spacing) == 0


def test_dice_counts_the_overlap_twice():
    assert dice(np.array([1, 1, 0, 0]), np.array([0, 1, 1, 1])) == pytest.approx(2 / 5)


def test_empty_masks_follow_the_rule():
    empty, full = np.zeros((4, 3), bool), np.ones((4, 3), bool)
    assert (dice(empty, empty), dice(empty, full)) == (1, 0)
    assert hd95_mm(empty, empty, (2.0, 1.0)) == 0
    assert hd95_mm(full, empty, (2.0, 1.0)) == hd95_mm(empty, full, (2.0, 1.0))
    assert hd95_mm(empty, full, (2.0, 1.0)) == pytest.approx(np.hypot(8, 3))


def test_hausdorff_distance_is_that_of_brute_force_over_surface_points():
    generator = np.random.default_rng(0)
    spacing = np.array([5.0, 1.0, 0.7])
    for _ in range(5):
        masks = [generator.uniform(size=(5, 6, 7)) < share for share in (0.3, 0.8)]
        points = []
        for mask in masks:
            padded = np.pad(mask, 1)
            inside = mask.copy()
            for axis, step in itertools.product(range(3), (-1, 1)):
                inside &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
            points.append(np.argwhere(mask & ~inside) * spacing)
        distances = cdist(*points)
        expected = max(np.percentile(distances.min(axis), 95) for axis in (0, 1))
        found = hd95_mm(masks[0], masks[1], spacing.tolist())
        assert found == pytest.approx(expected)
        assert found <= max(directed_hausdorff(*points)[0], directed_hausdorff(*points[::-1])[0]) + 1e-9


def test_shifted_block_is_as_far_as_the_shift_in_mm():
    truth = np.zeros((10, 10), bool)
    truth[2:5, 2:5] = True
    assert hd95_mm(np.roll(truth, 3, axis=1), truth, (1.0, 2.5)) == pytest.approx(7.5)


def test_volume_error_is_in_millilitres():
    prediction, truth = np.ones((10, 10, 10)), np.zeros((10, 10, 10))
    assert volume_error_ml(prediction, truth, (5.0, 1.0, 1.0)) == pytest.approx(5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dice(np.zeros(2), np.zeros(3)), "differ in shape"),
        (
            lambda: hd95_mm(np.zeros((2, 2)), np.zeros((2, 2)), (1.0,)),
            "expected 2 positive distances",
        ),
    ],
)
def test_impossible_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
