"""The benchmark of rounds: the problem, the counted work, the choice of L, and peers that are not what they claim."""

import json
import stat
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from capsfl.bench import page, round_peers, round_problems, round_process, rounds
from capsfl.bench.machine import write_result
from capsfl.bench.measuring import Sample
from capsfl.bench.peer_process import PeerError


@pytest.fixture(scope="module")
def problem() -> round_problems.Problem:
    return round_problems.make_problem("cnn")


def test_the_problem_is_that_of_the_other_frameworks(problem):
    assert sum(leaf.size for leaf in jax.tree.leaves(problem.task.parameters)) == 30_074
    assert problem.hospitals.records["image"].shape == (100, 64, 28, 28, 1)
    assert not problem.local.shuffle


def test_three_rounds_without_noise_end_at_the_loss_of_the_other_frameworks(problem, monkeypatch):
    assert rounds._check(problem) == pytest.approx(round_process.CHECK_LOSS, abs=1e-6)
    monkeypatch.setattr(rounds, "CHECK_LOSS", 2.3)
    monkeypatch.setattr(round_peers, "CHECKED_ROUNDS", 0)
    with pytest.raises(ValueError, match=r"check loss 2\.\d+: not the same work"):
        rounds._check(problem)


def test_counted_operations_are_those_of_the_products(problem):
    # The same network with every convolution as a sum over taps, which XLA counts as it stands.
    def loss(kernels, images):
        found = images
        for kernel in kernels[:2]:
            found = jax.lax.conv_general_dilated(found, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=_NHWC)
            found = found[:, ::2, ::2]
        return (found.reshape(len(found), -1) @ kernels[2] @ kernels[3]).sum()

    arguments = ([jnp.asarray(kernel) for kernel in round_peers.draw_kernels()], jnp.zeros((16, 28, 28, 1)))
    analysis = jax.jit(jax.grad(loss)).lower(*arguments).cost_analysis()
    assert analysis is not None
    # XLA leaves out the taps that fall on padding.
    assert round_problems.count_flops() == 38_541_312_000
    assert round_problems.count_flops() / 400 == pytest.approx(analysis["flops"], rel=0.1)


_NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize("name", ["rounds", "threads"])
def test_what_cannot_be_measured_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} = 0: must be at least 1"):
        rounds.measure(replace(rounds.RoundsBench(quick=True), **{name: 0}), say=print)


def test_the_last_chunk_holds_all_hospitals():
    assert rounds._chunks(8, quick=False) == {"L = 1": 1, "L = 8": 8, "L automatic": None}
    assert list(rounds._chunks(100, quick=False).values()) == [1, 10, 100, None]


PEER = """#!{python}
import json, sys
print(json.dumps({{"version": "0.0", "check_loss": {loss}}}), flush=True)
for line in sys.stdin:
    print(json.dumps({{"wall_s": 2.0, "cpu_s": {cpu}}}), flush=True)
"""


def make_peer(place: Path, *, loss: float, cpu: str = "3.0") -> Path:
    python = place / "python"
    python.write_text(PEER.format(python=sys.executable, loss=loss, cpu=cpu))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python


def test_a_peer_runs_rounds_and_one_of_other_work_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("CAPSFL_PEER_TORCH", str(make_peer(tmp_path, loss=round_process.CHECK_LOSS)))
    with round_process.RoundPeer("torch", 1) as peer:
        assert (peer.version, peer.run()) == ("0.0", Sample(2.0, 3.0))
    monkeypatch.setenv("CAPSFL_PEER_TORCH", str(make_peer(tmp_path, loss=2.4)))
    with pytest.raises(PeerError, match=r"not the same work: its loss after three rounds is 2\.4"):
        round_process.RoundPeer("torch", 1)


def test_a_peer_that_is_not_there_or_dies_is_named(monkeypatch):
    monkeypatch.delenv("CAPSFL_PEER_PFL", raising=False)
    with pytest.raises(PeerError, match="CAPSFL_PEER_PFL names no interpreter"):
        round_process.RoundPeer("pfl", 1)
    monkeypatch.setenv("CAPSFL_PEER_PFL", "/bin/false")
    with pytest.raises(PeerError, match="CAPSFL_PEER_PFL: its process has ended"):
        round_process.RoundPeer("pfl", 1)


def test_a_result_has_ratios_and_parts_of_the_product_and_fills_the_page(monkeypatch, tmp_path, problem):
    def prepare(_, chunk):
        taken = Sample(*((1.0, 2.0) if chunk == 1 else (0.5, 1.0)))
        return {"first_round_s": 9.0, "chunk": chunk or 10}, lambda: taken

    product = {"flops_per_s": 2 * round_problems.count_flops(), "flops_per_cpu_s": round_problems.count_flops()}
    monkeypatch.setattr(rounds, "make_problem", lambda _: problem)
    monkeypatch.setattr(rounds, "_check", lambda _: round_process.CHECK_LOSS)
    monkeypatch.setattr(rounds, "_prepare", prepare)
    monkeypatch.setattr(rounds, "measure_product", lambda quick: product)
    for name in round_process.PEERS:
        monkeypatch.delenv(f"CAPSFL_PEER_{name.upper()}", raising=False)
    unknown = make_peer(tmp_path, loss=round_process.CHECK_LOSS, cpu="None")
    monkeypatch.setenv("CAPSFL_PEER_FLOWER", str(unknown))
    result = rounds.measure(rounds.RoundsBench(rounds=2), say=lambda _: None)
    by_name = {row["implementation"]: row for row in result["rows"]}
    assert list(by_name) == ["L = 1", "L = 10", "L = 100", "L automatic", "flower"]
    assert by_name["L = 1"]["cpu_ratio"] == pytest.approx(2)
    assert by_name["L automatic"]["of_product"] == pytest.approx(1)
    assert by_name["L = 1"]["of_product_cpu"] == pytest.approx(0.5)
    assert (by_name["flower"]["process_cpu_s"], by_name["flower"]["wall_ratio"]) == (None, 4)
    assert [row["implementation"] for row in result["skipped"]] == ["torch", "pfl", "fedjax"]
    assert "CAPSFL_PEER_TORCH names no interpreter; it needs: torch==2.13.0" in result["skipped"][0]["reason"]
    path = write_result(tmp_path / "results", result)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    text = page.write_page(path.parent)
    assert "| flower 0.0 | - | 2000 | - | - | 4.00x |" in text
    assert "38.54 GFLOP" in text
