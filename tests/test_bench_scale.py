"""The scale benchmark: its network, its points in processes of their own, its refusals."""

import json
import sys
import threading

import jax
import pytest

from capsfl.bench import scale
from capsfl.bench.page import write_page
from capsfl.cli import main


def test_the_network_has_the_weights_of_the_shared_problem():
    assert sum(leaf.size for leaf in jax.tree.leaves(scale.make_scale_task().parameters)) == 30_074


def test_flatness_compares_points_that_differ_in_one_thing():
    def row(population: int, cohort: int, temporary: int, peak: int) -> dict:
        figures = {"temporary_bytes": temporary, "peak_bytes": peak}
        return {"population": population, "cohort": cohort, **figures}

    found = scale.flatness([row(10, 2, 100, 50), row(20, 2, 100, 60), row(20, 4, 105, 54), row(20, 8, 105, 54)])
    assert (found["cohort"]["population"], found["cohort"]["points"]) == (20, [2, 4, 8])
    assert found["cohort"]["temporary_bytes"] == pytest.approx(1.05)
    assert not found["cohort"]["flat"], "60 is more than 1.1 times 54"
    assert (found["population"]["cohort"], found["population"]["points"]) == (2, [10, 20])
    assert found["population"]["peak_bytes"] == pytest.approx(1.2)
    assert not found["population"]["flat"]
    steady = scale.flatness([row(10, 2, 100, 50), row(20, 2, 100, 54)])
    assert steady["population"]["flat"]
    assert not scale.flatness([row(10, 2, 100, 50), row(20, 2, 120, 50)])["population"]["flat"]


@pytest.mark.parametrize("name", ["chunk", "rounds"])
def test_what_cannot_be_measured_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} = 0: must be at least 1"):
        scale.measure(scale.ScaleBench(quick=True, **{name: 0}), say=print)


def test_a_point_that_fails_says_which_and_why(tmp_path):
    with pytest.raises(ValueError, match=r"5 hospitals, 2 in a round: .*no store of hospitals"):
        scale._measure_apart(scale.Point(str(tmp_path), 5, 2, 1, 1))


@pytest.mark.journey
def test_a_quick_run_measures_every_point_and_goes_onto_the_page(tmp_path, capsys, monkeypatch):
    # `main` sets these for its process, which is ours here.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "scale", "--quick", "--rounds", "2", "--out", str(tmp_path / "results"), "--json"])
    captured = capsys.readouterr()
    assert exit_.value.code in (0, None), captured.err
    result = json.loads(captured.out)
    assert json.loads((tmp_path / "results" / "scale-cpu.json").read_text()) == result
    assert [(row["population"], row["cohort"]) for row in result["rows"]] == [(20, 4), (40, 2), (40, 4)]
    assert len(captured.err.splitlines()) == 3
    for row in result["rows"]:
        assert row["wall_s"]["median"] > 0
        assert row["process_cpu_s"]["median"] > 0
        records = row["cohort"] * scale.RECORDS * (scale.SIDE**2 + 4)
        assert row["argument_bytes"] >= 4 * row["parameters"] + records
        assert row["peak_bytes"] is None or row["peak_bytes"] > row["temporary_bytes"] > 0
    assert result["flatness"]["cohort"]["temporary_bytes"] <= 1.1, "temporaries grow with L, not with the cohort"
    page = write_page(tmp_path / "results")
    assert "## Rounds over hospitals on disk" in page
    for row in result["rows"]:
        assert f"| {row['population']} | {row['cohort']} | " in page
