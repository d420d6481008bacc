"""Stacking, pooling and choosing hospitals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfl.federated.hospitals import pool_hospitals, select_hospitals, stack_hospitals


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_stacking_keeps_every_record_and_pads_with_zeros(counts):
    rows = {f"h{i}": {"x": np.full((n, 2), i + 1.0)} for i, n in enumerate(counts)}
    hospitals = stack_hospitals(rows)
    assert hospitals.counts.tolist() == counts
    assert hospitals.records["x"].shape == (len(counts), max(counts), 2)
    for i, n in enumerate(counts):
        assert (hospitals.records["x"][i, :n] == i + 1).all()
        assert (hospitals.records["x"][i, n:] == 0).all()
    pooled = pool_hospitals(hospitals)
    assert pooled.counts.tolist() == [sum(counts)]
    assert np.array_equal(pooled.records["x"][0], np.concatenate([r["x"] for r in rows.values()]))


def test_selected_hospitals_keep_their_records_and_the_common_capacity():
    hospitals = stack_hospitals({n: {"x": np.ones((c, 1))} for n, c in (("a", 5), ("b", 2), ("c", 3))})
    chosen = select_hospitals(hospitals, ["c", "b"])
    assert chosen.names == ("c", "b")
    assert chosen.records["x"].shape == (2, 5, 1)
    assert chosen.records["x"].sum(axis=(1, 2)).tolist() == [3, 2]
    assert chosen.counts.tolist() == [3, 2]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({}, "no hospital"),
        ({"a": {"x": np.ones((0, 2))}}, r"records\['a'\]: no records"),
        ({"a": {"x": np.ones((2, 2)), "y": np.ones(3)}}, "disagree on the number of records"),
        ({"a": {"x": np.ones((2, 2))}, "b": {"x": np.ones((2, 3))}}, r"records\['b'\]: record shapes"),
    ],
)
def test_records_that_do_not_fit_are_refused_by_name(records, message):
    with pytest.raises(ValueError, match=message):
        stack_hospitals(records)


def test_a_cohort_has_the_records_of_who_takes_part_and_zeros_for_the_others():
    hospitals = stack_hospitals({n: {"x": np.full((2, 1), i + 1.0)} for i, n in enumerate("abc")})
    found = hospitals.take(np.array([2, 0, 2]), np.array([True, False, True]))
    assert found["x"][:, :, 0].tolist() == [[3, 3], [0, 0], [3, 3]]
    assert hospitals.records["x"][0].all(), "the hospital itself keeps its records"
    assert hospitals.take(np.array([1]))["x"].tolist() == [[[2], [2]]]
