"""Benchmarks through the command line: what they say is what they measured, and refusals are one line."""

import itertools
import json
import os
import stat
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from capsfl_kernels import block_sizes

from capsfl.bench import BENCHMARKS, machine, operators, page, roofline, routing, tuning, work
from capsfl.bench.measuring import alternate, cold_compilation, compile_timed, queue_length, run_timed
from capsfl.bench.peer_process import PeerError
from capsfl.bench.torch_peer import TorchPeer
from capsfl.cli import main

ROOT = Path(__file__).resolve().parent.parent
DENSE = operators.OPERATORS["dynamic_routing"]
SMALL = DENSE.quick["small"]


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # `main` sets these for its process, which is that of the tests here.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setenv("CAPSFL_BLOCK_SIZES", str(tmp_path / "block_sizes.json"))
    monkeypatch.delenv("CAPSFL_PEER_PYTHON", raising=False)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `capsfl bench`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["bench", *words])
    captured = capsys.readouterr()
    code = exit_.value.code
    return code if isinstance(code, int) else 0, captured.out, captured.err


def test_without_a_name_it_lists_what_there_is(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    for name, text in BENCHMARKS.items():
        assert f"capsfl bench {name}" in out
        assert text in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ruoting",), f"capsfl bench: unknown benchmark 'ruoting'; one of {', '.join(BENCHMARKS)}"),
        (("routing", "--quick"), "out: there is no benchmarks/results here; give --out FOLDER for the results"),
        (("segcaps", "--quick"), "out: there is no benchmarks/results here; give --out FOLDER for the results"),
        (("routing", "--out", "x", "--threads", "0"), "threads = 0: must be at least 1"),
        (
            ("routing", "--out", "x", "--operators", "votes"),
            "operators = 'votes': unknown; choose from dynamic_routing",
        ),
        (
            ("routing", "--out", "x", "--operators", "em_routing", "--cases", "digits"),
            "cases = 'digits': unknown; choose from windows",
        ),
        (("routing", "--out", "x", "--peer-python", "./none"), "peer-python: none: No such file or directory"),
        (("segcaps", "--out", "x", "--devices", "3"), "devices = 3: must be 1, 2 or 4"),
        (("routing", "--qiuck"), "capsfl bench routing: Unrecognized options: --qiuck"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith(message)
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.journey
def test_routing_writes_what_it_prints_and_the_ratios_are_those_of_its_rows(capsys, tmp_path):
    code, out, err = run(
        capsys, "routing", "--quick", "--operators", "dynamic_routing", "--out", str(tmp_path / "out"), "--json"
    )
    assert code == 0, err
    result = json.loads(out)
    assert json.loads((tmp_path / "out" / "routing-cpu.json").read_text()) == result
    assert (tmp_path / "out" / "roofline-routing-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert result["machine"]["gpu"] is None
    assert "no GPU or TPU was available" in result["machine"]["note"]
    assert len(result["rows"]) == 4
    for row in result["rows"]:
        times = row["wall_s"]
        assert 0 < times["min"] <= times["lower_quartile"] <= times["median"] <= times["upper_quartile"]
        assert row["runs"] >= 3
        assert row["compile_s"] > 0.01
        assert row["temporary_bytes"] > 0
        assert row["argument_bytes"] >= 4 * (SMALL.batch + 160) * SMALL.inputs * SMALL.depth
        assert row["difference_from_stored"] < 1e-5
        bound = max(
            row["flops"] / result["roofs"]["gemm_flops_per_s"], row["bytes"] / result["roofs"]["copy_bytes_per_s"]
        )
        assert row["of_roof"] == pytest.approx(bound / times["median"])
    for ratio in result["against_stored_votes"]:
        stored, other = (
            next(r for r in result["rows"] if r["pass"] == ratio["pass"] and r["implementation"] == name)
            for name in ("reference", ratio["implementation"])
        )
        assert ratio["process_cpu"] == pytest.approx(
            other["process_cpu_s"]["median"] / stored["process_cpu_s"]["median"]
        )
        assert ratio["temporary"] == pytest.approx(other["temporary_bytes"] / stored["temporary_bytes"])
    assert len(result["against_stored_votes"]) == 2


@pytest.mark.journey
@pytest.mark.torture
@pytest.mark.skipif("CAPSFL_TORTURE" not in os.environ, reason="half a minute of compiling: make torture")
def test_a_step_of_segcaps_has_the_gradient_of_stored_votes(capsys, tmp_path):
    code, out, err = run(capsys, "segcaps", "--quick", "--devices", "--out", str(tmp_path), "--json")
    assert code == 0, err
    stored, streamed = json.loads(out)["rows"]
    assert (stored["implementation"], streamed["implementation"]) == ("reference", "streamed")
    assert streamed["loss"] == pytest.approx(stored["loss"], rel=1e-5)
    assert 0 < streamed["gradient_difference"] < 1e-4, "zero would mean that both ran the same implementation"
    assert (tmp_path / "segcaps-cpu.json").exists()


@pytest.mark.torture
@pytest.mark.skipif("CAPSFL_TORTURE" not in os.environ, reason="minutes of compiling; CAPSFL_TORTURE=1 runs it")
def test_data_parallel_forms_have_the_loss_and_gradient_of_one_device():
    from capsfl.bench.parallel import compare_forms

    rows = compare_forms((2, 4))
    assert [(row["form"], row["devices"]) for row in rows] == list(itertools.product(("pmap", "shard_map"), (2, 4)))[
        ::2
    ] + list(itertools.product(("pmap", "shard_map"), (2, 4)))[1::2]
    assert all(row["equal"] for row in rows), rows


def test_an_implementation_that_cannot_run_is_skipped_with_its_reason(monkeypatch, tmp_path):
    limited = DENSE._replace(implementations=("reference", "vapour"))
    monkeypatch.setattr(routing, "OPERATORS", {"dynamic_routing": limited})
    monkeypatch.setattr(routing, "measure_roofs", lambda quick: {"copy_bytes_per_s": 1e9, "gemm_flops_per_s": 1e9})
    result = routing.measure(routing.RoutingBench(quick=True), say=lambda _: None)
    assert {row["implementation"] for row in result["rows"]} == {"reference"}
    reasons = [row["reason"] for row in result["skipped"] if row["implementation"] == "vapour"]
    assert len(reasons) == 2
    assert "implementation='vapour' is unknown" in reasons[0]
    assert "vapour" in page.write_page(machine.write_result(tmp_path, result).parent)


def test_memory_that_is_not_there_leaves_the_memory_figure(monkeypatch):
    monkeypatch.setattr(routing, "OPERATORS", {"dynamic_routing": DENSE._replace(implementations=("reference",))})
    monkeypatch.setattr(routing, "measure_roofs", lambda quick: {"copy_bytes_per_s": 1e9, "gemm_flops_per_s": 1e9})
    monkeypatch.setattr(routing, "available_memory_bytes", lambda: 1000)
    result = routing.measure(routing.RoutingBench(quick=True), say=lambda _: None)
    assert [row["wall_s"] for row in result["rows"]] == [None, None]
    assert all(row["temporary_bytes"] > 1000 and row["of_roof"] is None for row in result["rows"])
    assert "its memory alone is reported" in result["skipped"][-1]["reason"]


FAKE = """#!{python}
import json, sys
import numpy as np
print(json.dumps({{"torch": "0.0", "cuda": False}}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "prepare":
        with np.load(request["arrays"]) as given:
            np.savez(request["results"], np.zeros((len(given["u"]), *given["w"].shape[1:3])))
        print(json.dumps({{"first_s": 1.0, "peak_bytes": 1}}), flush=True)
    elif request["do"] == "run":
        sys.exit(1)
    else:
        print("{{}}", flush=True)
"""


def test_a_peer_whose_results_differ_or_that_dies_is_no_peer(tmp_path):
    python = tmp_path / "python"
    python.write_text(FAKE.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    skipped: list[dict[str, str]] = []
    with TorchPeer(python, 1) as peer:
        sitting = routing._Sitting("dynamic_routing", DENSE, "small", False, peer, True)
        rows = sitting.measure(skipped)
        assert {row["implementation"] for row in rows} == {"reference", "streamed"}
        peers = [row for row in skipped if not row["implementation"].startswith("mosaic")]
        assert [row["implementation"] for row in peers] == ["torch eager", "torch.compile"]
        assert "not the same work" in peers[0]["reason"]
        with pytest.raises(PeerError, match="its process has ended"):
            peer.run("torch eager")


def test_an_interpreter_without_torch_is_named(tmp_path):
    with pytest.raises(PeerError, match="/false cannot import torch and numpy"):
        TorchPeer(Path("/bin/false"), 1)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", ["dynamic_routing", "conv_capsules", "em_capsules", "self_attention_routing"])
def test_counted_operations_of_stored_votes_are_those_that_xla_counts(name, gradient):
    operator = operators.OPERATORS[name]
    case = operator.quick["small"]
    function = operator.function(case, "reference", gradient=gradient)
    analysis = jax.jit(function).lower(*operator.arguments(case)).cost_analysis()
    assert analysis is not None
    assert operator.work(case, stored=True, gradient=gradient).flops == pytest.approx(analysis["flops"], rel=0.35)


def test_the_design_limits_of_the_digit_capsules_are_counted():
    shape = (128, 1152, 8, 10, 16, 3, 4)
    stored = work.route_fully_connected(*shape, stored=True, gradient=False)
    streamed = work.route_fully_connected(*shape, stored=False, gradient=False)
    votes = 4 * 128 * 1152 * 160
    assert 6 * votes < stored.bytes < 7 * votes
    assert streamed.bytes == 4 * (3 * (128 * 1152 * 8 + 1152 * 160 * 8) + 128 * 160)
    assert 1.8e9 < streamed.flops < 2.1e9


def test_runs_take_turns_and_stop_at_the_budget():
    order: list[str] = []

    def runner(name):
        return lambda: run_timed(lambda: order.append(name))

    times = alternate({"a": runner("a"), "b": runner("b")}, budget_s=0.0, least=2, most=9)
    assert order == ["a", "b", "a", "b"]
    assert times["a"]["runs"] == 2


def test_only_the_cases_named_are_measured(monkeypatch):
    rates = {"copy_bytes_per_s": 1.0, "gemm_flops_per_s": 1.0}
    monkeypatch.setattr(routing, "measure_roofs", lambda **_: rates)
    measured = []
    monkeypatch.setattr(routing._Sitting, "measure", lambda self, _: measured.append(self.case_name) or [])
    options = routing.RoutingBench(operators=("self_attention_routing",), cases=("efficient",))
    assert routing.measure(options, say=lambda _: None)["rows"] == []
    assert measured == ["efficient", "efficient"]  # forward, and with its gradient


def test_runs_are_queued_on_an_accelerator_and_a_sample_is_their_mean(monkeypatch):
    assert queue_length(1e-4) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [queue_length(seconds) for seconds in (1.0, 0.005, 1e-6)] == [1, 4, 200]
    monkeypatch.undo()
    calls = []
    start = time.perf_counter()
    sample = run_timed(lambda: calls.append(time.sleep(0.01)), 4)
    assert len(calls) == 4
    assert 0.01 <= sample.wall_s <= (time.perf_counter() - start) / 4


def test_compiling_is_timed_without_the_cache_which_is_in_use_again_afterwards(tmp_path):
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    with cold_compilation():
        assert not jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
        facts = compile_timed(lambda x: x @ x, jax.numpy.ones((64, 64))).facts
    assert jax.config.jax_enable_compilation_cache == before  # pyright: ignore[reportAttributeAccessIssue]
    assert facts["argument_bytes"] == facts["output_bytes"] == 4 * 64 * 64


def test_tuning_records_what_routing_then_chooses(capsys, monkeypatch, tmp_path):
    def times(runs, **_):
        for call in runs.values():
            call()
        return {name: {"process_cpu_s": {"median": 0.5 if name == "32" else 1.0}} for name in runs}

    monkeypatch.setattr(tuning, "alternate", times)
    code, out, err = run(capsys, "routing", "--tune", "--quick", "--json")
    assert code == 0, err
    (found,) = json.loads(out)
    assert found["best"] == "32"
    assert str(tmp_path / "block_sizes.json") in err
    shape = (SMALL.batch, SMALL.inputs, SMALL.depth, SMALL.capsules, SMALL.dim)
    assert block_sizes.choose("dynamic_routing", "streamed", shape=shape, dtype="float32", default=7) == 32


def test_tuning_leaves_a_default_that_nothing_beats_clearly(capsys, monkeypatch, tmp_path):
    def times(runs, **_):
        return {name: {"process_cpu_s": {"median": 1.0 if name == "default" else 0.97}} for name in runs}

    monkeypatch.setattr(tuning, "alternate", times)
    code, _, err = run(capsys, "routing", "--tune", "--quick")
    assert (code, err) == (0, "dynamic_routing, small: default\n")
    assert not (tmp_path / "block_sizes.json").exists()


def test_the_committed_page_is_what_the_committed_results_say():
    assert (ROOT / "benchmarks" / "README.md").read_text() == page.write_page(ROOT / "benchmarks" / "results")


def test_a_result_is_named_for_its_accelerator():
    place = {"platform": "gpu", "device": "NVIDIA H100 80GB HBM3"}
    path = machine.result_path(Path("results"), {"benchmark": "routing", "machine": place})
    assert path == Path("results/routing-gpu-nvidia-h100-80gb-hbm3.json")


def test_no_label_of_the_roofline_lies_on_another_or_on_a_point(tmp_path):
    names = ("digits", "moderate", "many inputs", "many outputs")
    rows = [
        {
            "operator": "dynamic_routing",
            "pass": "forward",
            "case": case,
            "implementation": implementation,
            "flops": round(intensity * (1 + 0.02 * index) * 1e9),
            "bytes": 10**9,
            "wall_s": {"median": 1 + 0.1 * index},
        }
        for index, case in enumerate(names)
        for implementation, intensity in (("reference", 1.0), ("streamed", 30.0), ("torch eager", 1.0))
    ]
    result = {"rows": rows, "roofs": {"copy_bytes_per_s": 1e10, "gemm_flops_per_s": 1e11}}
    figure = roofline.draw(result, tmp_path / "roofline.png")
    renderer = figure.canvas.get_renderer()
    (panel,) = figure.axes
    texts = [text for text in panel.texts if text.get_text()]
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert sorted(text.get_text() for text in texts[1:]) == sorted(2 * names)
    for (one, box), (other, second) in itertools.combinations(zip(texts, boxes, strict=True), 2):
        assert not box.overlaps(second), (one.get_text(), other.get_text())
    marks = [
        panel.transData.transform((row["flops"] / row["bytes"], row["flops"] / row["wall_s"]["median"] / 1e9))
        for row in rows
    ]
    assert not any(box.contains(*mark) for box in boxes for mark in marks)
    frame = panel.get_window_extent(renderer)
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes)


def test_no_picture_where_matplotlib_is_missing_but_a_result_all_the_same(capsys, monkeypatch, tmp_path):
    from capsfl.bench import command

    def refuse(*_):
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(roofline, "draw", refuse)
    result = {
        "benchmark": "routing",
        "quick": True,
        "machine": {**machine.describe()},
        "roofs": {"copy_bytes_per_s": 1e9, "gemm_flops_per_s": 1e9},
        "rows": [],
        "against_stored_votes": [],
        "skipped": [],
    }
    command.finish(result, SimpleNamespace(out=tmp_path, json=False))  # pyright: ignore[reportArgumentType]
    assert "pip install matplotlib" in capsys.readouterr().err
    assert (tmp_path / "routing-cpu.json").exists()
