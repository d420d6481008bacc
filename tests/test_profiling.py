"""A trace of rounds: where it is, what it leaves out, and that its readers find our names."""

from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
import jax.profiler
import pytest

from capsfl.profiling import CompileWatch, RoundTrace, is_traced, part


def steps_in(folder: Path) -> set[str]:
    """Names of all events of a trace."""
    (file,) = folder.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    return {event.name for plane in planes for line in plane.lines for event in line.events}


def run(trace: RoundTrace, numbers: range) -> list[int]:
    """Rounds that do a little."""
    done = []
    with trace.rounds("segmentation", numbers) as rounds:
        for number in rounds:
            with part(f"train in round {number}"):
                jnp.ones(3).sum().block_until_ready()
            done.append(number)
    return done


def test_the_second_to_fourth_round_are_traced_under_our_names(tmp_path: Path):
    trace = RoundTrace(tmp_path / "profile")
    assert run(trace, range(1, 7)) == [1, 2, 3, 4, 5, 6]
    assert run(trace, range(1, 4)) == [1, 2, 3], "another stage, not traced"
    assert is_traced(tmp_path)
    names = steps_in(tmp_path)
    assert {name for name in names if name.startswith("train in round")} == {f"train in round {n}" for n in (2, 3, 4)}
    assert "round segmentation" in names


def test_a_single_round_is_traced_with_its_compilation(tmp_path: Path):
    assert run(RoundTrace(tmp_path / "profile"), range(5, 6)) == [5]
    assert "train in round 5" in steps_in(tmp_path)


def test_nothing_is_written_where_nothing_is_asked_for_or_left_to_run(tmp_path: Path):
    assert run(RoundTrace(None), range(1, 4)) == [1, 2, 3]
    assert run(RoundTrace(tmp_path / "profile"), range(4, 4)) == []
    assert not is_traced(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_trace_ends_where_a_round_fails(tmp_path: Path):
    def fail_in_round_two() -> None:
        with RoundTrace(tmp_path / "profile").rounds("segmentation", range(1, 4)) as rounds:
            for number in rounds:
                if number == 2:
                    raise ValueError("the disk is full")

    with pytest.raises(ValueError, match="full"):
        fail_in_round_two()
    assert is_traced(tmp_path)
    with jax.profiler.trace(str(tmp_path / "next")):
        pass


def test_compiling_is_told_apart_from_running_and_counted_once():
    function = jax.jit(lambda x: jax.jit(jnp.cumsum)(x) * 3.25)
    watch = CompileWatch()
    function(jnp.arange(7.0)).block_until_ready()
    assert watch.read()["compile_seconds"] > 0
    again = CompileWatch()
    function(jnp.arange(7.0)).block_until_ready()
    assert again.read()["compile_seconds"] == 0
    # An inner function is traced while the outer one is; its span ends first.
    for start, stop in ((11.0, 12.0), (10.0, 14.0), (20.0, 20.5)):
        jax.monitoring.record_event_time_span("/jax/core/compile/jaxpr_trace_duration", start, stop)
    jax.monitoring.record_event_time_span("/jax/another/event", 30.0, 40.0)
    assert again.read()["compile_seconds"] == pytest.approx(4.5)
