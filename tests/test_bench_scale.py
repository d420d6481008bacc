"""The scale benchmark: its network, its points in processes of their own, its refusals."""

import json

import jax
import pytest

from capsfl.bench import scale
from capsfl.bench.machine import write_result


def test_the_network_has_the_weights_of_the_shared_problem():
    assert sum(leaf.size for leaf in jax.tree.leaves(scale.make_scale_task().parameters)) == 30_074


def test_flatness_compares_points_that_differ_in_one_thing():
    def row(population: int, cohort: int, temporary: int, peak: int) -> dict:
        figures = {"temporary_bytes": temporary, "peak_rss_bytes": peak, "rss_growth_bytes": peak}
        return {"population": population, "cohort": cohort, **figures}

    found = scale.flatness([row(10, 2, 100, 50), row(20, 2, 100, 60), row(20, 4, 105, 90)])
    assert found["cohort"]["population"] == 20
    assert found["cohort"]["temporary_bytes"] == pytest.approx(1.05)
    assert found["cohort"]["flat"]
    assert found["population"]["cohort"] == 2
    assert found["population"]["peak_rss_bytes"] == pytest.approx(1.2)
    assert not found["population"]["flat"]


@pytest.mark.parametrize("name", ["chunk", "rounds"])
def test_what_cannot_be_measured_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} = 0: must be at least 1"):
        scale.measure(scale.ScaleBench(quick=True, **{name: 0}), say=print)


def test_a_point_that_fails_says_which_and_why(tmp_path):
    with pytest.raises(ValueError, match=r"5 hospitals, 2 in a round: .*no store of hospitals"):
        scale._measure_apart(scale.Point(str(tmp_path), 5, 2, 1, 1))


@pytest.mark.journey
def test_a_quick_run_measures_every_point_and_is_json(tmp_path):
    said: list[str] = []
    result = scale.measure(scale.ScaleBench(quick=True, rounds=2), say=said.append)
    assert json.loads(write_result(tmp_path, result).read_text()) == json.loads(json.dumps(result))
    assert [(row["population"], row["cohort"]) for row in result["rows"]] == [(20, 4), (40, 2), (40, 4)]
    assert len(said) == 3
    for row in result["rows"]:
        assert row["wall_s"]["median"] > 0
        assert row["process_cpu_s"]["median"] > 0
        records = row["cohort"] * scale.RECORDS * (scale.SIDE**2 + 4)
        assert row["argument_bytes"] >= 4 * row["parameters"] + records
        assert row["peak_rss_bytes"] > row["rss_growth_bytes"] > 0
