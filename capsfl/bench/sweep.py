"""A sweep of 64 studies as one program, against 64 processes and against 64 calls of one compiled program."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from capsfl.bench.machine import describe
from capsfl.federated.devices import DevicesConfig
from capsfl.federated.federation import Federation
from capsfl.sweeps.config import SweepConfig
from capsfl.sweeps.cores import one_device_per_core
from capsfl.sweeps.points import Point, expand, plan_of, resolve
from capsfl.sweeps.problems import build
from capsfl.sweeps.program import GroupProgram
from capsfl.sweeps.results import read_rows
from capsfl.sweeps.run import finite, pooled, run_sweep
from capsfl.workers import count_cores

AGREEMENT = 1e-5
"""Largest difference of a loss or score between two ways of running a study, in units of the figure above 1."""
FORMS = {
    "processes": "a process per study, one per core at a time, compilation cache warm",
    "calls": "one process, one compiled program, a call per study",
    "sweep": "capsfl sweep",
    "sweep, nothing compiled before": "capsfl sweep with an empty compilation cache",
}


@dataclass(frozen=True)
class SweepBench:
    """64 studies (16 settings x 4 seeds) of one task."""

    quick: bool = False
    """Four short studies, one run of each form: whether it works, not how fast."""
    runs: int = 3
    """Runs of the sweep and of the calls, in turns; of 64 processes one is enough."""


def sweep_config(*, quick: bool, out: str) -> SweepConfig:
    """The sweep: learning rates, clip norms and noise multipliers of a convolutional network on 100 hospitals."""
    seeds = [0, 1] if quick else [0, 1, 2, 3]
    grid = {
        "training.local.learning_rate": [0.1, 0.3],
        "privacy.clip_norm": [0.5] if quick else [0.25, 1.0],
        "privacy.noise_multiplier": [0.5] if quick else [0.0, 0.5, 1.0, 2.0],
    }
    table = {
        "out": out,
        "problem": {
            "kind": "synthetic",
            "hospitals": 100,
            "records": 32,
            "side": 8,
            "classes": 10,
            "noise": 2.0,
            "model": {"kind": "cnn", "channels": [8, 16], "hidden": [32]},
        },
        "training": {
            "rounds": 3 if quick else 30,
            "local": {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 16},
        },
        "privacy": {
            "sampler": "poisson", "cohort": 10, "truncation": 25, "clip_norm": 0.5, "delta": 1e-3,
        },
        "sweep": {"seeds": seeds, "grid": [{"field": name, "values": values} for name, values in grid.items()]},
    }  # fmt: skip
    return SweepConfig.model_validate_json(json.dumps(table))


def measure(options: SweepBench, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs every form in processes of its own, from start to exit.

    Wall and processor seconds are those of whole processes: imports, tracing, compiling or reading the cache,
    training, scoring, for `capsfl sweep` also the accounting, the results on disk and the page. `training` is what
    is left between the imports and the page.

    Returns:
        The result, JSON-ready: the machine, a row per form, ratios, and the largest differences between forms.

    Raises:
        ValueError: fewer than one run, or a process failed; the message has its last line.
    """
    if options.runs < 1:
        raise ValueError(f"runs = {options.runs}: must be at least 1")
    runs = 1 if options.quick else options.runs
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = sweep_config(quick=options.quick, out="")
        studies = [resolve(study, num_hospitals=100) for study in expand(config)]
        points = [study.point for study in studies]
        warm = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        samples: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}

        def start(form: str, text: str, cache: str = "cache") -> dict[str, Any]:
            environment = warm | {"JAX_COMPILATION_CACHE_DIR": str(folder / cache)}
            return _start(form, json.dumps([options.quick, text]), environment)

        for number in range(runs):
            taken = start("sweep", str(folder / f"cold-{number}"), cache=f"cache-{number}")
            samples["sweep, nothing compiled before"].append(taken)
        say("sweep: without a compilation cache")
        for form, text in (("one", points[0].model_dump_json()), ("calls", ""), ("sweep", str(folder / "warm"))):
            start(form, text)
        say("sweep: compilation cache filled")
        for number in range(runs):
            samples["calls"].append(start("calls", ""))
            samples["sweep"].append(start("sweep", str(folder / f"sweep-{number}")))
            say(f"sweep: run {number + 1} of {runs}")
        samples["processes"].append(_many([point.model_dump_json() for point in points], options.quick, warm))
        say(f"sweep: {len(points)} processes")
        results = {
            "processes": samples["processes"][0]["results"],
            "calls": samples["calls"][0]["results"],
            "sweep": [_figures(row) for _, row in sorted(read_rows(folder / "sweep-0").items())],
        }
    rows = [_row(form, taken) for form, taken in samples.items()]
    return {
        "benchmark": "sweep",
        "quick": options.quick,
        "machine": describe(),
        "studies": len(points),
        "configuration": config.table(),
        "rows": rows,
        "ratios": ratios({row["form"]: row for row in rows}),
        "differences": {form: largest_difference(results["sweep"], results[form]) for form in ("processes", "calls")},
        "agreement": AGREEMENT,
    }


def ratios(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times the seconds of the sweep the other forms take."""
    found = {}
    for form in ("processes", "calls"):
        found[form] = {
            name: rows[form][name] / rows["sweep"][name]
            for name in ("wall_s", "process_cpu_s", "training_s", "training_cpu_s")
            if rows[form].get(name) and rows["sweep"].get(name)
        }
    cold = rows["sweep, nothing compiled before"]
    found["processes, sweep compiling"] = {
        name: rows["processes"][name] / cold[name] for name in ("wall_s", "process_cpu_s")
    }
    return found


def largest_difference(one: list[dict[str, float]], other: list[dict[str, float]]) -> float:
    """The largest difference of any figure of any study, relative to the figure where that is above 1.

    Noise drives the losses of some studies into the millions, where float32 has no decimals left.

    Raises:
        ValueError: a figure is missing on one side, or they are of different studies.
    """
    if len(one) != len(other) or any(mine.keys() != theirs.keys() for mine, theirs in zip(one, other, strict=True)):
        raise ValueError("sweep: the forms have run different studies")
    return max(
        abs(mine[name] - theirs[name]) / max(1.0, abs(theirs[name]))
        for mine, theirs in zip(one, other, strict=True)
        for name in mine
    )


def run_alone(point: Point) -> dict[str, float]:
    """A study as a run of its own: a `Federation` and nothing of a sweep."""
    built = build(point.problem)
    engine = Federation(
        built.make_task(point.seed),
        built.hospitals,
        config=point.training,
        privacy=point.privacy,
        devices=DevicesConfig(chunk=1),
        seed=point.seed,
    )
    state, loss = engine.init(), None
    for _ in range(point.training.rounds):
        state, report = engine.step(state)
        loss = loss if report.loss is None else report.loss
    (scores,) = engine.evaluate(state.parameters, built.held_out, batch_size=256).values()
    return {"loss": finite(np.nan if loss is None else loss) or 0.0, **scores}


def run_calls(config: SweepConfig) -> dict[str, Any]:
    """All studies by one program of width 1 on one device, a call after the other."""
    wall, cpu = time.perf_counter(), time.process_time()
    built = build(config.problem)
    number = len(built.hospitals)
    studies = [resolve(study, num_hospitals=number) for study in expand(config)]
    plan = max((plan_of(s.point, num_hospitals=number) for s in studies), key=lambda plan: plan.num_slots)
    program = GroupProgram(
        studies[0].point, built, plan, devices=jax.local_devices()[:1], width=1, passes=1, hospitals=1
    )
    rounds = config.training.rounds
    results = []
    for study in studies:
        placed, progress = program.place([study.point])
        progress, (scores,) = program.advance(placed, progress, count=1, first=0, last=rounds)
        (losses,) = program.collect(progress.losses, 1)
        results.append({"loss": float(losses[~np.isnan(losses)][-1]), **pooled(scores)})
    return {"results": results, "training_s": time.perf_counter() - wall, "training_cpu_s": time.process_time() - cpu}


def _figures(row: Mapping[str, Any]) -> dict[str, float]:
    return {"loss": row["loss"], **row["scores"]}


def _row(form: str, taken: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs of one form."""
    names = [n for n in ("wall_s", "process_cpu_s", "training_s", "training_cpu_s") if n in taken[0]]
    row = {"form": form, "runs": len(taken), **{n: statistics.median(sample[n] for sample in taken) for n in names}}
    return row | {name: taken[0][name] for name in ("width", "devices") if name in taken[0]}


def _start(form: str, argument: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs one form in a process; returns what it printed, with its wall and processor seconds."""
    command = [sys.executable, "-m", "capsfl.bench.sweep", form, argument]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **environment})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        if process.returncode:
            last = (err.read().strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            raise ValueError(f"sweep: {form}: {last}")
        found = json.loads(out.read().splitlines()[-1])
    return found | {"wall_s": wall, "process_cpu_s": usage.ru_utime + usage.ru_stime}


def _many(points: list[str], quick: bool, environment: Mapping[str, str]) -> dict[str, Any]:
    """A process per study, as many at once as there are cores."""
    start = time.perf_counter()
    with ThreadPoolExecutor(count_cores()) as pool:
        taken = list(pool.map(lambda point: _start("one", json.dumps([quick, point]), environment), points))
    return {
        "results": [each["results"] for each in taken],
        "wall_s": time.perf_counter() - start,
        "process_cpu_s": sum(each["process_cpu_s"] for each in taken),
    }


def _main(form: str, argument: str) -> dict[str, Any]:
    """One form in this process."""
    quick, text = json.loads(argument)
    if form == "one":
        return {"results": run_alone(Point.model_validate_json(text))}
    if form == "calls":
        return run_calls(sweep_config(quick=quick, out=text))
    from rich.console import Console

    one_device_per_core()
    folder = run_sweep(sweep_config(quick=quick, out=text), console=Console(stderr=True))
    facts = json.loads((folder / "parts" / "0-of-1.json").read_text(encoding="utf-8"))
    (group,) = facts["groups"]
    return {
        "training_s": facts["seconds"],
        "training_cpu_s": facts["cpu_seconds"],
        "width": group["width"],
        "devices": jax.local_device_count(),
    }


if __name__ == "__main__":
    print(json.dumps(_main(*sys.argv[1:])))
