"""Rounds over populations that lie on disk: time and memory against cohort and population."""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from capsfl.bench.machine import describe
from capsfl.bench.measuring import spread
from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import Federation, RoundsConfig
from capsfl.federated.local import LocalConfig
from capsfl.federated.store_writer import write_hospitals_store
from capsfl.federated.stored import open_hospitals_store
from capsfl.learning.tasks import Task, make_task
from capsfl.privacy.plan import PrivacyConfig

RECORDS = 16
SIDE = 7
"""Pixels of a stored image; each is drawn 4 x 4, so that the network sees 28 x 28 and the store stays small."""
WARM = 2
"""Rounds before any is timed: the first one compiles, the second is the first to find the next cohort read ahead."""
STEADY = 1.1
"""A figure that must not depend on the population may vary by this factor."""


@dataclass(frozen=True)
class ScaleBench:
    """Seconds and memory of a round, 1e2 to 1e5 hospitals on disk, 10 to 1000 in a round."""

    quick: bool = False
    """Small populations and cohorts: seconds instead of minutes."""
    chunk: int = 1
    """L, hospitals vmapped at once, the same in every round."""
    rounds: int = 5
    """Rounds timed at every point, after two that are not."""


@dataclass(frozen=True)
class Point:
    """One measurement, in a process of its own."""

    store: str
    population: int
    cohort: int
    chunk: int
    rounds: int


class Network(nnx.Module):
    """Two convolutions and two dense layers: 30,074 weights at 28 x 28 pixels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.third = nnx.Linear(7 * 7 * 32, 16, rngs=rngs)
        self.last = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `(batch, 28, 28, 1)` to logits `(batch, 10)`."""
        found = nnx.max_pool(nnx.relu(self.first(images)), (2, 2), strides=(2, 2))
        found = nnx.max_pool(nnx.relu(self.second(found)), (2, 2), strides=(2, 2))
        return self.last(nnx.relu(self.third(found.reshape(found.shape[0], -1))))


def make_scale_task() -> Task:
    """The task every point trains: ten classes, cross-entropy."""

    def loss(model: Network, batch: Mapping[str, jax.Array]) -> jax.Array:
        large = jnp.repeat(jnp.repeat(batch["image"], 4, axis=1), 4, axis=2)
        logits = model(large[..., None].astype(jnp.float32) / 255)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    return make_task("scale", Network(nnx.Rngs(0)), loss)


def measure(options: ScaleBench, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Writes the populations, then measures every point in a fresh process, whose peak memory is its own.

    Returns:
        The result, JSON-ready: the machine, a row per point, and how far memory varies with cohort and population.

    Raises:
        ValueError: fewer than one round or hospital at once, or a point failed; the message has its last line.
    """
    for name in ("chunk", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} = {getattr(options, name)}: must be at least 1")
    rows = []
    stores = {}
    with tempfile.TemporaryDirectory() as folder:
        for population, cohorts in _grid(options.quick).items():
            path = Path(folder) / str(population)
            start = time.perf_counter()
            write_hospitals_store(path, draw_hospitals(population), capacity=RECORDS)
            written = time.perf_counter() - start
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            stores[population] = {"written_s": written, "bytes": size}
            for cohort in cohorts:
                rows.append(_measure_apart(Point(str(path), population, cohort, options.chunk, options.rounds)))
                say(f"scale, {population} hospitals, {cohort} in a round")
    return {
        "benchmark": "scale",
        "quick": options.quick,
        "machine": describe(),
        "chunk": options.chunk,
        "records": {"hospital": RECORDS, "pixels": SIDE},
        "stores": [{"population": population, **facts} for population, facts in stores.items()],
        "rows": rows,
        "flatness": flatness(rows),
    }


def flatness(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest over the smallest of each memory figure: along the cohort, and along the population.

    Along the cohort it is taken at the population, along the population at the cohort, that has most points.
    """
    result = {}
    for along, fixed in (("cohort", "population"), ("population", "cohort")):
        groups: dict[int, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault(row[fixed], []).append(row)
        at, group = max(groups.items(), key=lambda item: len(item[1]))
        figures = {}
        for name in ("temporary_bytes", "peak_bytes"):
            values = [row[name] for row in group if row[name]]
            figures[name] = max(values) / min(values) if values else None
        figures["flat"] = figures["temporary_bytes"] is not None and figures["temporary_bytes"] <= STEADY
        if figures["peak_bytes"] is not None:
            figures["flat"] = figures["flat"] and figures["peak_bytes"] <= STEADY
        result[along] = {fixed: at, "points": [row[along] for row in group], **figures}
    return result


def draw_hospitals(population: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Hospitals of 16 grey images of 7 x 7 and their classes, one at a time."""
    for index in range(population):
        generator = np.random.default_rng(index)
        image = generator.integers(0, 256, (RECORDS, SIDE, SIDE), dtype=np.uint8)
        yield f"hospital {index}", {"image": image, "label": generator.integers(0, 10, RECORDS, dtype=np.int32)}


def measure_point(point: Point) -> dict[str, Any]:
    """Measures rounds in this process.

    Temporary bytes are those XLA plans for the round's program, without its arguments; those, which hold the
    cohort's own records, are told apart. The peak is the whole process's resident memory during the timed rounds:
    interpreter, libraries, names and counts of the population, two cohorts and the round. The compiler's own hundred
    megabytes, which vary by a tenth, are given back before.
    """
    task = make_scale_task()
    start = time.perf_counter()
    hospitals: Any = open_hospitals_store(point.store)
    opened = time.perf_counter() - start
    local = LocalConfig(optimizer="sgd", learning_rate=0.01, batch_size=RECORDS)
    privacy = PrivacyConfig(sampler="fixed", cohort=point.cohort, clip_norm=0.5, noise_multiplier=1.0)
    federation = Federation(
        task,
        hospitals,
        config=RoundsConfig(rounds=WARM + point.rounds, local=local),
        privacy=privacy,
        devices=DevicesConfig(chunk=point.chunk),
    )
    state = federation.init()
    for _ in range(WARM):
        state, _ = federation.step(state)
    watched = _start_peak_anew()
    wall, process = [], []
    for _ in range(point.rounds):
        start, cpu = time.perf_counter(), time.process_time()
        state, report = federation.step(state)
        jax.block_until_ready(state)
        wall.append(time.perf_counter() - start)
        process.append(time.process_time() - cpu)
        assert len(report.cohort) == point.cohort
    return {
        "population": point.population,
        "cohort": point.cohort,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(task.parameters)),
        "rounds": point.rounds,
        "opened_s": opened,
        "wall_s": spread(wall),
        "process_cpu_s": spread(process),
        "peak_bytes": _memory("VmHWM") if watched else None,
        **_planned_memory(),
    }


def _grid(quick: bool) -> dict[int, tuple[int, ...]]:
    if quick:
        return {20: (4,), 40: (2, 4)}
    return {100: (10, 100), 1000: (10, 100), 10_000: (10, 30, 100, 300, 1000), 100_000: (10, 100, 1000)}


def _measure_apart(point: Point) -> dict[str, Any]:
    command = [sys.executable, "-m", "capsfl.bench.scale", json.dumps(asdict(point))]
    # Otherwise each thread that reads or computes may keep what it has freed, and the peak depends on their luck.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ValueError(f"scale: {point.population} hospitals, {point.cohort} in a round: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _planned_memory() -> dict[str, int | None]:
    """What XLA planned for the round: of all programs compiled here, the one with the largest arguments."""
    programs = [program.get_compiled_memory_stats() for program in jax.devices()[0].client.live_executables()]
    if not programs:
        return {"temporary_bytes": None, "argument_bytes": None, "other_temporary_bytes": None}
    programs.sort(key=lambda stats: stats.argument_size_in_bytes)
    others = [stats.temp_size_in_bytes for stats in programs[:-1]]
    return {
        "temporary_bytes": programs[-1].temp_size_in_bytes,
        "argument_bytes": programs[-1].argument_size_in_bytes,
        "other_temporary_bytes": max(others, default=0),
    }


def _start_peak_anew() -> bool:
    """Gives freed memory back and starts the process's peak anew, without the compiler's; False where none can."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError):
        return False
    return True


def _memory(field: str) -> int | None:
    """Bytes of a field of /proc/self/status; getrusage would count the process that started this one."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


if __name__ == "__main__":
    print(json.dumps(measure_point(Point(**json.loads(sys.argv[1])))))
