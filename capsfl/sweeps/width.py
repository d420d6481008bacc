"""How many studies are vmapped at once: by measured time on a CPU, by memory on an accelerator.

A CPU runs small studies one after another about as well as side by side, so that the best width depends on the
network: the next one is compiled and timed for as long as that costs little of the time all rounds will take, and
helps. An accelerator idles on one small study: as many as its memory holds is the rule.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from capsfl.federated.memory import free_memory_bytes
from capsfl.sweeps.config import ExecutionConfig
from capsfl.sweeps.points import Point
from capsfl.sweeps.program import GroupProgram, Make

PORTION = 64
"""The most studies of one CPU core that are resident at once; more only makes what a kill loses larger."""
MOST_VMAPPED = 1024
"""The most studies that an accelerator takes at once, where memory would allow more."""
FACTOR = 4
"""Between one width and the next that is tried: each costs a compilation."""
TRIAL_SHARE = 0.1
"""Of the time that all rounds are expected to take, the part that may go into looking for a better width."""
MARGIN = 0.95
"""A width must take less than this part of the time of the one before; less is not told from noise."""
REPEATS = 3
"""Timed runs of each of two widths, in turns; the fastest counts."""


@dataclass
class Trial:
    """What was compiled, and seconds that one round of the same studies took; 0 where it was not timed."""

    width: int
    peak_bytes: int
    compile_s: float
    round_s: float = 0.0


def make_program(
    make: Make, points: Sequence[Point], *, config: ExecutionConfig, devices: Sequence[Any]
) -> tuple[GroupProgram, dict[str, Any]]:
    """Compiles the program of a group in the width that suits it.

    Args:
        make: `(width, passes) -> GroupProgram`.
        points: the group's studies still to be run.
        config: gives the width where it is fixed, and the share of the memory that may be used.
        devices: what the studies are spread over.

    Returns:
        The program, and for the record its width, why, and what was compiled.
    """
    on_cpu = devices[0].platform == "cpu"
    share = min(PORTION if on_cpu else MOST_VMAPPED, -(-len(points) // len(devices)))
    tried: list[Trial] = []

    def prepare(width: int, resident: int) -> GroupProgram:
        program = make(width, -(-resident // width))
        facts = program.compile()
        tried.append(Trial(width, int(facts["peak_bytes"]), round(facts["compile_s"], 3)))
        return program

    if config.width is not None:
        width = min(config.width, share)
        program, reason = prepare(width, share if on_cpu else width), "given"
    elif on_cpu:
        free = free_memory_bytes(devices[0])
        # CPU devices share the machine's memory.
        limit = float("inf") if free is None else config.memory_fraction * free / len(devices)
        program, reason = _climb(prepare, points, share, tried, limit=limit, devices=len(devices))
    else:
        free = free_memory_bytes(devices[0])
        limit = float("inf") if free is None else config.memory_fraction * free
        program, reason = _descend(prepare, share, tried, limit=limit)
    return program, {"width": program.width, "reason": reason, "compiled": [asdict(trial) for trial in tried]}


def _descend(prepare: Any, share: int, tried: list[Trial], *, limit: float) -> tuple[GroupProgram, str]:
    """The largest width that fits the memory, from the whole share down by halves."""
    width = share
    while True:
        program = prepare(width, width)
        if tried[-1].peak_bytes <= limit or width == 1:
            return program, "all that are left" if width == share else "as many as the memory holds"
        # What a study needs is about the same at every width, so that halves which cannot fit are left out.
        width = max(1, min(width // 2, int(width * limit / tried[-1].peak_bytes)))


def _climb(
    prepare: Any, points: Sequence[Point], share: int, tried: list[Trial], *, limit: float, devices: int
) -> tuple[GroupProgram, str]:
    """From width to width for as long as the next one fits, pays and is faster."""
    while True:
        best, trial = prepare(1, share), tried[-1]
        if trial.peak_bytes <= limit or share == 1:
            break
        # Weights and states of all that are resident: fewer, and smaller portions.
        share = max(1, min(share // 2, int(share * limit / trial.peak_bytes)))
    sample = points[: share * devices]
    _time(best, sample)
    trial.round_s = _time(best, sample)
    # What one round of the sample takes, as often as the whole group needs it.
    budget = TRIAL_SHARE * trial.round_s * points[0].training.rounds * len(points) / len(sample)
    width = 1
    while width < share:
        width = min(width * FACTOR, share)
        budget -= tried[-1].compile_s + 2 * REPEATS * trial.round_s
        if budget < 0:
            return best, "few short rounds: another width would cost more than it can save"
        candidate, found = prepare(width, share), tried[-1]
        if found.peak_bytes > limit:
            return best, "measured: the next width does not fit the memory"
        _time(candidate, sample)
        found.round_s = float("inf")
        for _ in range(REPEATS):  # in turns, so that a busy moment of the machine meets both
            trial.round_s = min(trial.round_s, _time(best, sample))
            found.round_s = min(found.round_s, _time(candidate, sample))
        if found.round_s > MARGIN * trial.round_s:
            return best, "measured: the next width is not faster"
        best, trial = candidate, found
    return best, "measured: all of a device's share" if width > 1 else "a single study"


def _time(program: GroupProgram, points: Sequence[Point]) -> float:
    """Seconds of one round of every study, and its scores."""
    studies, progress = program.place(points)
    jax.block_until_ready(progress)
    start = time.perf_counter()
    progress, _ = program.advance(studies, progress, count=len(points), first=0, last=1)
    jax.block_until_ready(progress)
    return time.perf_counter() - start
