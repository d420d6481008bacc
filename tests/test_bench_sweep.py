"""The sweep benchmark: its ratios, its differences, its tables, its refusals."""

import json

import pytest

from capsfl.bench import page, sweep
from capsfl.sweeps.points import expand

ROWS = {
    "processes": {"form": "processes", "runs": 1, "wall_s": 200.0, "process_cpu_s": 380.0},
    "calls": {"form": "calls", "wall_s": 22.0, "process_cpu_s": 25.0, "training_s": 18.0, "training_cpu_s": 20.0},
    "sweep": {"form": "sweep", "wall_s": 20.0, "process_cpu_s": 25.0, "training_s": 12.0, "training_cpu_s": 20.0},
    "sweep, nothing compiled before": {"form": "sweep, nothing compiled before", "wall_s": 40.0, "process_cpu_s": 50.0},
}


def test_ratios_say_how_many_times_the_sweep_others_take():
    found = sweep.ratios(ROWS)
    assert found["processes"] == {"wall_s": 10.0, "process_cpu_s": 15.2}
    assert found["calls"]["training_s"] == 1.5
    assert found["processes, sweep compiling"] == {"wall_s": 5.0, "process_cpu_s": 7.6}


def test_the_largest_difference_is_of_any_figure_of_any_study():
    one = [{"loss": 1.0, "accuracy": 0.5}, {"loss": 2.0, "accuracy": 0.25}]
    other = [{"loss": 1.0, "accuracy": 0.5}, {"loss": 4.0, "accuracy": 0.0}]
    assert sweep.largest_difference(one, one) == 0
    assert sweep.largest_difference(one, other) == 0.5
    with pytest.raises(ValueError, match="different studies"):
        sweep.largest_difference(one, other[:1])
    with pytest.raises(ValueError, match="different studies"):
        sweep.largest_difference(one, [{"loss": 1.0}, {"loss": 2.0}])


def test_the_sweep_is_sixteen_settings_with_four_seeds():
    studies = expand(sweep.sweep_config(quick=False, out=""))
    assert len(studies) == 64
    assert len({study.setting for study in studies}) == 16
    assert json.loads(json.dumps(sweep.sweep_config(quick=True, out="").table()))


def test_its_tables_hold_every_form():
    result = {
        "benchmark": "sweep", "studies": 64, "rows": list(ROWS.values()), "ratios": sweep.ratios(ROWS),
        "differences": {"processes": 6e-7, "calls": 0.0},
    }  # fmt: skip
    first, second = page.tables(result)
    assert [words[0] for words in first.rows] == list(ROWS)
    assert ("processes", "10.00x", "15.20x", "-", "-", "6.0e-07") in second.rows


def test_no_run_at_all_is_refused():
    with pytest.raises(ValueError, match="runs = 0: must be at least 1"):
        sweep.measure(sweep.SweepBench(runs=0), say=print)
