"""Every capsule operator, forward and with its gradient, each implementation beside the others."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from capsfl.bench.machine import available_memory_bytes, describe
from capsfl.bench.measuring import (
    Sample,
    alternate,
    cold_compilation,
    compile_timed,
    higher_roofs,
    measure_roofs,
    queue_length,
    ratio,
    run_timed,
)
from capsfl.bench.operators import OPERATORS, STORED, Operator
from capsfl.bench.peer_process import PeerError
from capsfl.bench.torch_peer import VARIANTS, TorchPeer

PASSES = {False: "forward", True: "forward + backward"}

# Torch takes minutes for larger votes than these, and many times their memory.
PEER_VOTES_BYTES = 1 << 29

# Results further apart than this, relative to their norm, are not the same work.
AGREEMENT = 1e-4


@dataclass(frozen=True)
class RoutingBench:
    """Time, memory and roof of every capsule operator."""

    quick: bool = False
    """Small shapes and few runs: seconds instead of minutes."""
    peer_python: Path | None = None
    """Interpreter with torch and numpy; by default CAPSFL_PEER_PYTHON, or this one where torch is there."""
    threads: int = os.cpu_count() or 1
    """Threads that torch may use."""
    operators: tuple[str, ...] = ()
    """Names of the operators to measure; all where none is named."""
    cases: tuple[str, ...] = ()
    """Names of the cases of these operators to measure; all where none is named."""


def measure(options: RoutingBench, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures all operators in one sitting.

    Args:
        options: What to measure.
        say: Receives a line as each case is done.

    Returns:
        The result, JSON-ready: the machine, its roofs, a row per case, pass and implementation, ratios against
        stored votes, and what was skipped and why.
    """
    if options.threads < 1:
        raise ValueError(f"threads = {options.threads}: must be at least 1")
    unknown = set(options.operators) - OPERATORS.keys()
    if unknown:
        raise ValueError(f"operators = {sorted(unknown)[0]!r}: unknown; choose from {', '.join(OPERATORS)}")
    chosen = {name: OPERATORS[name] for name in options.operators or OPERATORS}
    known = {name: operator.quick if options.quick else operator.cases for name, operator in chosen.items()}
    if strange := set(options.cases).difference(*known.values()):
        offered = ", ".join(case for cases in known.values() for case in cases)
        raise ValueError(f"cases = {sorted(strange)[0]!r}: unknown; choose from {offered}")
    skipped: list[dict[str, str]] = []
    rows: list[dict[str, Any]] = []
    machine = describe()
    # Float32 products for all: the logits pass through an exponential, and TensorFloat-32 is not the same work.
    with jax.default_matmul_precision("highest"), cold_compilation(), _peer(options, skipped) as peer:
        roofs = measure_roofs(quick=options.quick)
        if peer is not None:
            machine["versions"]["torch"] = peer.version
        for name, operator in chosen.items():
            for case_name in known[name]:
                if options.cases and case_name not in options.cases:
                    continue
                for gradient in PASSES:
                    sitting = _Sitting(name, operator, case_name, gradient, peer, options.quick)
                    rows += sitting.measure(skipped)
                    say(f"{name}, {case_name}, {PASSES[gradient]}")
        roofs = higher_roofs(roofs, measure_roofs(quick=options.quick))
    for row in rows:
        _add_fractions(row, roofs)
    return {
        "benchmark": "routing",
        "quick": options.quick,
        "machine": machine,
        "threads_of_torch": options.threads if peer is not None else None,
        "roofs": roofs,
        "rows": rows,
        "against_stored_votes": against_stored_votes(rows),
        "skipped": skipped,
    }


def against_stored_votes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every other implementation's process CPU, wall time and temporary bytes over those of stored votes."""
    stored = {_sitting_of(row): row for row in rows if row["implementation"] == STORED}
    ratios = []
    for row in rows:
        base = stored.get(_sitting_of(row))
        if base is None or row is base:
            continue
        ratios.append(
            {
                **{key: row[key] for key in ("operator", "case", "pass", "implementation")},
                "process_cpu": ratio(row["process_cpu_s"], base["process_cpu_s"]),
                "wall": ratio(row["wall_s"], base["wall_s"]),
                "temporary": row["temporary_bytes"] / base["temporary_bytes"]
                if row["temporary_bytes"] is not None and base["temporary_bytes"]
                else None,
            }
        )
    return ratios


class _Sitting:
    """One case and pass: everything that can run it is prepared, then run in turns."""

    def __init__(
        self, name: str, operator: Operator, case_name: str, gradient: bool, peer: TorchPeer | None, quick: bool
    ) -> None:
        self.name, self.operator, self.case_name, self.gradient = name, operator, case_name, gradient
        self.case = (operator.quick if quick else operator.cases)[case_name]
        self.peer = peer if name == "dynamic_routing" else None
        self.budget_s = 0.2 if quick else 5.0
        self.arrays = operator.arguments(self.case)
        self.expected: list[np.ndarray] | None = None
        self.facts: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, Callable[[], Sample]] = {}

    def measure(self, skipped: list[dict[str, str]]) -> list[dict[str, Any]]:
        for implementation in self.operator.implementations:
            with self._skipping(implementation, skipped):
                self._prepare(implementation)
        for variant in VARIANTS if self.peer is not None else ():
            with self._skipping(variant, skipped):
                self._prepare_peer(self.peer, variant)
        try:
            times = alternate(self.runs, budget_s=self.budget_s) if self.runs else {}
        finally:
            for variant in VARIANTS.keys() & self.runs.keys():
                assert self.peer is not None
                self.peer.forget(variant)
        untimed = {"runs": 0, "wall_s": None, "process_cpu_s": None}
        return [
            {
                "operator": self.name,
                "case": self.case_name,
                "shape": self.case._asdict(),
                "description": self.operator.describe(self.case),
                "pass": PASSES[self.gradient],
                "implementation": name,
                **times.get(name, untimed),
                **facts,
                **self._work(name),
            }
            for name, facts in self.facts.items()
        ]

    def _work(self, implementation: str) -> dict[str, int]:
        # torch's einsum form stores the votes as ours does.
        stored = implementation == STORED or implementation in VARIANTS
        work = self.operator.work(self.case, stored=stored, gradient=self.gradient)
        return {"flops": work.flops, "bytes": work.bytes}

    def _prepare(self, implementation: str) -> None:
        function = self.operator.function(self.case, implementation, gradient=self.gradient)
        compiled = compile_timed(function, *self.arrays)
        needed = compiled.facts["temporary_bytes"] or 0
        self.facts[implementation] = compiled.facts
        if jax.default_backend() == "cpu" and needed > 0.8 * available_memory_bytes():
            raise _TooLarge(f"needs {needed / 2**30:.1f} GiB, which is not free here; its memory alone is reported")
        results = jax.block_until_ready(compiled.call(*self.arrays))
        # The value of the loss goes before the gradients; torch returns the gradients alone.
        found = [np.asarray(leaf) for leaf in jax.tree.leaves(results)][self.gradient :]
        if self.expected is None:
            self.expected = found
        self.facts[implementation]["difference_from_stored"] = self._difference(found)
        repeats = queue_length(run_timed(lambda: compiled.call(*self.arrays)).wall_s)
        self.runs[implementation] = lambda: run_timed(lambda: compiled.call(*self.arrays), repeats)

    def _prepare_peer(self, peer: TorchPeer | None, variant: str) -> None:
        assert peer is not None
        votes = 4 * self.operator.votes(self.case)
        if votes > PEER_VOTES_BYTES:
            raise _TooLarge(f"torch is left out where the votes take {votes / 2**30:.1f} GiB: its run takes minutes")
        # Eager torch keeps the votes, their gradient and products of both at once.
        needed = votes * (6 if self.gradient else 3)
        if peer.device == "cpu" and needed > available_memory_bytes():
            raise _TooLarge(f"may need {needed / 2**30:.0f} GiB, which is not free here")
        facts, found = peer.prepare(variant, self.arrays, num_iters=self.case.num_iters, gradient=self.gradient)
        difference = self._difference(found)
        if difference is None or not difference < AGREEMENT:
            peer.forget(variant)
            apart = (
                "cannot be compared" if difference is None else f"differ from ours by {difference:.1e} of their norm"
            )
            raise PeerError(f"its results {apart}: not the same work")
        self.facts[variant] = {**facts, "difference_from_stored": difference}
        repeats = queue_length(peer.run(variant).wall_s)
        self.runs[variant] = lambda: peer.run(variant, repeats)

    def _difference(self, found: list[np.ndarray]) -> float | None:
        """The largest difference of any result from stored votes', relative to its norm."""
        if self.expected is None:
            return None
        pairs = zip(found, self.expected, strict=True)
        return max(float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1)) for a, b in pairs)

    @contextlib.contextmanager
    def _skipping(self, implementation: str, skipped: list[dict[str, str]]) -> Iterator[None]:
        try:
            yield
        except (ValueError, NotImplementedError, PeerError, _TooLarge, jax.errors.JaxRuntimeError) as error:
            lines = str(error).splitlines()
            skipped.append(
                {
                    "operator": self.name,
                    "case": self.case_name,
                    "pass": PASSES[self.gradient],
                    "implementation": implementation,
                    "reason": lines[0] if lines else type(error).__name__,
                }
            )


class _TooLarge(Exception):
    """The machine has not the memory at the moment."""


@contextlib.contextmanager
def _peer(options: RoutingBench, skipped: list[dict[str, str]]) -> Iterator[TorchPeer | None]:
    """The torch process, or None with the reason noted."""
    try:
        peer = TorchPeer(options.peer_python, options.threads)
    except PeerError as error:
        if options.peer_python is not None:
            raise ValueError(f"peer-python: {error}") from None
        for variant in VARIANTS:
            skipped.append({"operator": "dynamic_routing", "implementation": variant, "reason": str(error)})
        yield None
        return
    with peer:
        yield peer


def _add_fractions(row: dict[str, Any], roofs: dict[str, Any]) -> None:
    """Parts of the measured copy rate, of the product rate, and of the lower of the two bounds."""
    copy_s, product_s = row["bytes"] / roofs["copy_bytes_per_s"], row["flops"] / roofs["gemm_flops_per_s"]
    wall = row["wall_s"]["median"] if row["wall_s"] is not None else math.nan
    parts = {"of_copy": copy_s / wall, "of_gemm": product_s / wall, "of_roof": max(copy_s, product_s) / wall}
    row.update({name: None if math.isnan(part) else part for name, part in parts.items()})


def _sitting_of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["operator"], row["case"], row["pass"]
