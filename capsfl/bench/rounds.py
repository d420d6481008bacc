"""One federated round of 100 hospitals: our engine for every chunk L, and other frameworks beside it."""

import functools
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from capsfl.bench import round_peers
from capsfl.bench.machine import describe
from capsfl.bench.measuring import Sample, alternate, cold_compilation, ratio, run_timed
from capsfl.bench.peer_process import PeerError
from capsfl.bench.round_problems import Problem, count_flops, make_problem
from capsfl.bench.round_process import CHECK_LOSS, PEERS, TOLERANCE, RoundPeer
from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import Federation, RoundsConfig
from capsfl.privacy.plan import PrivacyConfig

PLANNED_ROUNDS = 200
"""Rounds of the run for which L is chosen; a longer run may spend more on the choice."""


@dataclass(frozen=True)
class RoundsBench:
    """One federated round of 100 hospitals: our engine for every chunk L, other frameworks beside it."""

    model: Literal["cnn", "segcaps", "capsnet"] = "cnn"
    """`cnn` is the 30,074-weight network of the comparison; the others show the choice of L alone."""
    quick: bool = False
    """Few rounds, no peers: a minute instead of many."""
    rounds: int = 7
    """Rounds timed at least of every contestant, in turns."""
    threads: int = os.cpu_count() or 1
    """Threads that a peer may use."""


def measure(options: RoundsBench, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Checks that everybody does the same work, then times rounds in turns.

    Returns:
        The result, JSON-ready: machine, a row for every L and every peer, ratios, and what was skipped and why.

    Raises:
        ValueError: fewer than one round or thread, or our own check loss is another one.
    """
    for name in ("rounds", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} = {getattr(options, name)}: must be at least 1")
    problem = make_problem(options.model)
    check = _check(problem) if options.model == "cnn" else None
    before = measure_product(quick=options.quick)
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Sample]] = {}
    skipped: list[dict[str, str]] = []
    with ExitStack() as stack:
        stack.enter_context(cold_compilation())
        for name, chunk in _chunks(len(problem.hospitals), quick=options.quick).items():
            rows[name], runs[name] = _prepare(problem, chunk)
            say(f"rounds, {name}")
        if options.model == "cnn" and not options.quick:
            for name, needed in PEERS.items():
                try:
                    peer = stack.enter_context(RoundPeer(name, options.threads))
                    peer.run()
                except PeerError as error:
                    skipped.append({"implementation": name, "reason": f"{error}; it needs: {needed}"})
                    continue
                rows[name] = {"version": peer.version, "check_loss": peer.check_loss}
                runs[name] = peer.run
                say(f"rounds, {name}")
        least = 2 if options.quick else options.rounds
        times = alternate(runs, budget_s=5 if options.quick else 120, least=least, most=2 * least)
    best = _higher(before, measure_product(quick=options.quick))
    for told in times.values():
        if math.isnan(told["process_cpu_s"]["median"]):
            told["process_cpu_s"] = None
    found = [{"implementation": name, **rows[name], **times[name]} for name in runs]
    return {
        "benchmark": "rounds" if options.model == "cnn" else f"rounds-{options.model}",
        "quick": options.quick,
        "machine": describe(),
        "hospitals": len(problem.hospitals),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.task.parameters)),
        "check_loss": check,
        "flops": count_flops() if options.model == "cnn" else None,
        "product": best,
        "rows": [_judge(row, found, best, counted=options.model == "cnn") for row in found],
        "skipped": skipped,
    }


def measure_product(*, quick: bool) -> dict[str, float]:
    """The rate of float32 matrix products, per second and per second of the process's threads: the best of several."""
    side = 1024 if quick else 2048
    matrix = jnp.ones((side, side), jnp.float32)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(matrix, matrix))
    samples = [run_timed(functools.partial(product, matrix, matrix)) for _ in range(3 if quick else 9)]
    flops = 2 * side**3
    return {
        "flops_per_s": flops / min(sample.wall_s for sample in samples),
        "flops_per_cpu_s": flops / max(min(sample.cpu_s for sample in samples), 1e-9),
    }


def _chunks(hospitals: int, *, quick: bool) -> dict[str, int | None]:
    sizes = (1, 10) if quick else (*(size for size in (1, 10, 100) if size < hospitals), hospitals)
    return {f"L = {size}": size for size in sizes} | ({} if quick else {"L automatic": None})


def _federation(problem: Problem, *, chunk: int | None, noise_multiplier: float) -> Federation:
    privacy = PrivacyConfig(sampler="all", clip_norm=round_peers.CLIP_NORM, noise_multiplier=noise_multiplier)
    return Federation(
        problem.task,
        problem.hospitals,
        config=RoundsConfig(rounds=PLANNED_ROUNDS, local=problem.local),
        privacy=privacy,
        devices=DevicesConfig(chunk=chunk),
    )


def _check(problem: Problem) -> float:
    """Loss over all records after three rounds without noise.

    Raises:
        ValueError: it is not that of the other frameworks.
    """
    federation = _federation(problem, chunk=1, noise_multiplier=0.0)
    state = federation.init()
    for _ in range(round_peers.CHECKED_ROUNDS):
        state, _ = federation.step(state)
    records = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), problem.hospitals.records)
    loss = float(jax.jit(problem.task.loss)(state.parameters, records))
    if not abs(loss - CHECK_LOSS) < TOLERANCE:
        raise ValueError(f"check loss {loss:.8f}: not the same work as in other frameworks, whose is {CHECK_LOSS}")
    return loss


def _prepare(problem: Problem, chunk: int | None) -> tuple[dict[str, Any], Callable[[], Sample]]:
    """A federation after its first round, which compiles and, where L is open, chooses it."""
    federation = _federation(problem, chunk=chunk, noise_multiplier=round_peers.NOISE_MULTIPLIER)
    state = federation.init()
    first = run_timed(lambda: federation.step(state)[0])
    row: dict[str, Any] = {"first_round_s": first.wall_s, "chunk": chunk}
    if chunk is None and federation.choice is not None:
        row |= {"chunk": federation.choice.chunk, "reason": federation.choice.reason}
    following, _ = federation.step(state)
    return row, lambda: run_timed(lambda: federation.step(following)[0])


def _judge(
    row: dict[str, Any], rows: list[dict[str, Any]], product: dict[str, float], *, counted: bool
) -> dict[str, Any]:
    """Adds the part of the machine's product rate that a row reaches, and its time over that of L automatic."""
    ours = next((other for other in rows if other["implementation"] == "L automatic"), rows[0])
    known = all(sample["process_cpu_s"] is not None for sample in (row, ours))
    row = row | {
        "cpu_ratio": ratio(row["process_cpu_s"], ours["process_cpu_s"]) if known else None,
        "wall_ratio": ratio(row["wall_s"], ours["wall_s"]),
    }
    if counted:
        row["of_product"] = count_flops() / row["wall_s"]["median"] / product["flops_per_s"]
        cpu = row["process_cpu_s"]
        row["of_product_cpu"] = count_flops() / cpu["median"] / product["flops_per_cpu_s"] if cpu else None
    return row


def _higher(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: max(one[name], other[name]) for name in one}
