"""L, the hospitals vmapped at once: chosen in the first round from measured memory and time.

On a CPU a chunk of one is usually best, for its caches hold one hospital; on an accelerator the whole share of a
device, for it idles otherwise. From there the next size is compiled and timed, upwards on a CPU and downwards on an
accelerator, for as long as

  - it fits: arguments, results and temporaries that XLA plans stay below a fraction of the free memory,
  - it pays: compiling and timing it cost less than a tenth of what all rounds are expected to take,
  - it is not slower than the best so far.

The timed rounds are short: every hospital trains on one batch. Their outcomes are thrown away, so a choice changes
results by reassociation of sums only. Two runs may choose differently; a given L repeats bit for bit.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from capsfl.federated.devices import CohortProgram
from capsfl.federated.memory import free_memory_bytes
from capsfl.federated.round import CohortRecords, RoundMetrics, RoundState, Setting

TRIAL_SHARE = 0.1
"""Of the time that all rounds are expected to take, the part that may go into looking for a better L."""
MARGIN = 0.97
"""One of two must take less than this part of the other's time to be called faster; the rest may be noise."""
REPEATS = 3
"""Short rounds of each of two candidates, in turns; the fastest counts."""


class Trial(NamedTuple):
    """What was measured of one L.

    Attributes:
        chunk: L.
        peak_bytes: arguments, results and temporaries of the round on one device, as XLA plans them.
        compile_s: seconds to trace and compile it.
        short_round_s: seconds of a round in which every hospital trains on one batch; None where not timed.
    """

    chunk: int
    peak_bytes: int
    compile_s: float
    short_round_s: float | None = None


class Choice(NamedTuple):
    """The L of a run and why.

    Attributes:
        chunk: L.
        reason: the rule or the measurement that decided.
        trials: what was compiled to find it, in order.
    """

    chunk: int
    reason: str
    trials: tuple[Trial, ...] = ()


class Candidate(Protocol):
    """A round made ready for one L."""

    @property
    def trial(self) -> Trial:
        """What making it ready told."""
        ...

    def run(self) -> Any:
        """Dispatches the round and returns its outcome."""
        ...

    def run_short(self) -> Any:
        """Dispatches the same with one batch per hospital; its outcome is thrown away."""
        ...


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


@dataclass(frozen=True)
class CompiledRound:
    """A round compiled for one L, and what it will be called with."""

    trial: Trial
    program: CohortProgram
    cohort: CohortRecords
    batch_size: int
    state: RoundState
    setting: Setting
    key: jax.Array

    @classmethod
    def of(
        cls,
        program: CohortProgram,
        state: RoundState,
        cohort: CohortRecords,
        setting: Setting,
        key: jax.Array,
        *,
        batch_size: int,
    ) -> "CompiledRound":
        """Compiles; `cohort` is placed for the program, `batch_size` counts the records of one local step."""
        start = time.perf_counter()
        peak_bytes = sum(program.compile(state, cohort, setting, key))
        trial = Trial(program.chunk, peak_bytes, time.perf_counter() - start)
        return cls(trial, program, cohort, batch_size, state, setting, key)

    def run(self) -> tuple[RoundState, RoundMetrics]:
        """Dispatches the round."""
        return self.program.dispatch(self.state, self.cohort, self.setting, self.key)

    def run_short(self) -> Any:
        """Dispatches a round of one batch per hospital."""
        short = self.cohort._replace(counts=jnp.minimum(self.cohort.counts, self.batch_size))
        return self.program.dispatch(self.state, short, self.setting, self.key)


def unmeasured_choice(program: CohortProgram, *, given: bool) -> Choice | None:
    """The choice where there is none to make; None where it is worth measuring."""
    if given:
        return Choice(program.chunk, "given")
    if program.share == 1:
        return Choice(1, "a device has one hospital")
    if jax.process_count() > 1:
        # Each process would measure its own times and choose for itself, and all must run the same program.
        return Choice(program.chunk, "several processes: the rule of the platform")
    return None


def choose_chunk(
    prepare: Callable[[int], AnyCandidate],
    devices: Sequence[Any],
    *,
    num_slots: int,
    memory_fraction: float,
    rounds: int,
    batches: float,
) -> tuple[AnyCandidate, Any, Choice]:
    """Runs a round and finds the best L on the way.

    Args:
        prepare: makes the round ready for an L.
        devices: over which the cohort is split.
        num_slots: hospitals in the cohort.
        memory_fraction: of the free memory, what a round may fill.
        rounds: rounds of the run.
        batches: how many times as long as a short round the real one is.

    Returns:
        The best candidate, the outcome of its round, and the choice for the record.
    """
    upwards = devices[0].platform == "cpu"
    free = free_memory_bytes(devices[0])
    # CPU devices share the machine's memory.
    limit = float("inf") if free is None else memory_fraction * free / (len(devices) if upwards else 1)
    sizes = candidate_chunks(-(-num_slots // len(devices)))[:: 1 if upwards else -1]
    first, tried = first_that_fits(sizes, prepare, limit)
    start = time.perf_counter()
    outcome = jax.block_until_ready(first.run())
    round_s = time.perf_counter() - start
    best, reason, climbed = climb(
        first,
        sizes[sizes.index(first.trial.chunk) + 1 :],
        prepare,
        limit_bytes=limit,
        budget_s=TRIAL_SHARE * rounds * round_s,
        short_s=round_s / batches,
    )
    if best is not first:
        outcome = best.run()
    return best, outcome, Choice(best.trial.chunk, reason, (*tried[:-1], *climbed))


def candidate_chunks(share: int) -> tuple[int, ...]:
    """Sizes worth trying for a device's share of the slots: about doubling, with as few empty slots as can be.

    A power of two p makes ceil(share / p) chunks; L is the smallest that makes as many. 100 slots give
    1, 2, 4, 8, 15, 25, 50, 100.
    """
    powers = [2**exponent for exponent in range(share.bit_length())]
    return tuple(sorted({-(-share // -(-share // power)) for power in [*powers, share]}))


def first_that_fits(
    sizes: Sequence[int], prepare: Callable[[int], AnyCandidate], limit_bytes: float
) -> tuple[AnyCandidate, list[Trial]]:
    """Makes candidates ready, in order, until one fits; the last one is taken as it is.

    Returns:
        The candidate, and what was compiled.
    """
    tried: list[Trial] = []
    remaining = list(sizes)
    while True:
        size = remaining.pop(0)
        candidate = prepare(size)
        tried.append(candidate.trial)
        if candidate.trial.peak_bytes <= limit_bytes or not remaining or remaining[0] > size:
            return candidate, tried
        if len(tried) > 1:
            # Memory is a fixed part and one that grows with L: two sizes tell which others are too large.
            one, other = tried[-2:]
            slope = (one.peak_bytes - other.peak_bytes) / (one.chunk - other.chunk)
            while len(remaining) > 1 and other.peak_bytes - slope * (size - remaining[0]) > limit_bytes:
                remaining.pop(0)


def climb(
    first: AnyCandidate,
    sizes: Sequence[int],
    prepare: Callable[[int], AnyCandidate],
    *,
    limit_bytes: float,
    budget_s: float,
    short_s: float,
) -> tuple[AnyCandidate, str, list[Trial]]:
    """Goes from size to size as long as the next one pays, fits and is not slower than the best.

    Args:
        first: a candidate that is ready.
        sizes: the others, in the order of trying.
        prepare: makes one ready.
        limit_bytes: what a round may fill.
        budget_s: what compiling and timing may take together.
        short_s: seconds that a short round of `first` is thought to take.

    Returns:
        The best candidate, the reason, and what was compiled, `first` included.
    """
    best, trials = first, {first.trial.chunk: first.trial}
    reason = "the only size"
    for size in sizes:
        cost = max(trial.compile_s for trial in trials.values()) + 2 * REPEATS * short_s
        if cost > budget_s:
            reason = (
                f"{reason}; another size would cost more than it can save"
                if best is not first
                else (
                    "the rule of the platform: in so few and short rounds another size would cost more than it can save"
                )
            )
            break
        start = time.perf_counter()
        candidate = prepare(size)
        trials[size] = candidate.trial
        if candidate.trial.peak_bytes > limit_bytes:
            reason = f"measured: {size} at once do not fit the memory"
            break
        old, new = race(best, candidate)
        trials[best.trial.chunk] = trials[best.trial.chunk]._replace(short_round_s=old)
        trials[size] = trials[size]._replace(short_round_s=new)
        budget_s -= time.perf_counter() - start
        if MARGIN * new > old:
            reason = f"measured: {size} at once are slower"
            break
        # About as fast is no reason to change, but none to stop either: gains may come in small steps.
        if new < MARGIN * old:
            best, short_s = candidate, new
        reason = "measured: the fastest"
    return best, reason, list(trials.values())


def race(one: Candidate, other: Candidate) -> tuple[float, float]:
    """Seconds of a short round of each, in turns, so that a busy moment of the machine meets both."""
    best = [float("inf"), float("inf")]
    for _ in range(REPEATS):
        for place, candidate in enumerate((one, other)):
            start = time.perf_counter()
            jax.block_until_ready(candidate.run_short())
            best[place] = min(best[place], time.perf_counter() - start)
    return best[0], best[1]
