"""Rounds of a run, killed by SIGKILL again and again at moments drawn by chance: no time goes into scans or networks.

    python killed_rounds.py FOLDER KILLS_BY_CHANCE EVERY VARIANT

Every life is a fork of this process, which has imported everything and has not yet asked JAX for a device: starting
Python would cost more than the rounds. Two stages of rounds over a line go through the very functions of `capsfl
train`: ledger, curves, checkpoints, keys, records on disk. One run is left alone; its touches of the file system are
the moments that others are killed at, or shortly after. Another is killed at the moments that matter most, all of
them or every so many. After every kill what a run has committed must be in the unbroken one, and at its end all of
it. Prints the number of kills, and of those by chance how many fell into which stage.
"""

import contextlib
import itertools
import json
import os
import re
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax
import jax.numpy as jnp
import killed
import numpy as np
from contents import assert_same, assert_within, contents
from flax import nnx

from capsfl.config import ArmConfig, StudyConfig
from capsfl.curves import MetricsLog
from capsfl.learning.tasks import make_task
from capsfl.profiling import RoundTrace
from capsfl.study import Split
from capsfl.training.founding import open_ledger
from capsfl.training.rounds import run_rounds
from capsfl.training.run import Run, plan_of_run

VARIANTS: dict[str, dict[str, Any]] = {
    "Gaussian noise": {},
    "quantile clipping, server Adam": {
        "privacy": {"clipping": "quantile", "clip_norm": 0.5},
        "server": {"optimizer": "adam", "learning_rate": 0.05},
    },
    "control variates, server Adam": {
        "privacy": {"noise_multiplier": 0.0},
        "server": {"optimizer": "adam", "learning_rate": 0.05},
        "scaffold": True,
    },
    "pmap over two devices": {"devices": {"parallel": "pmap"}},
    "hospitals on disk": {"data": {"residence": "disk"}},
    "hospitals that vote": {
        "privacy": {"noise_multiplier": 0.0},
        "aggregation": {"rule": "mae_votes"},
        "consensus": {},
    },
}
ROUNDS = 3
FIXED = (
    ("os.rename", r"ledger/head$", 1),  # a ledger's log is founded, its head is not
    ("os.rename", r"ledger/head$", 2),  # round 1 is in the log, the head has not moved
    ("open", r"metrics\.jsonl$", 1),  # round 1 is in the ledger, not in the curves
    ("os.mkdir", r"segmentation/1\.orbax-checkpoint-tmp$", 1),  # and has no checkpoint
    ("os.rename", r"manifests/segmentation/1\.json$", 2),  # it has one, whose files nobody has signed yet
    ("os.rename", r"segmentation/2\.orbax-checkpoint-tmp/ledger$", 1),  # a checkpoint's arrays are half written
    ("os.rename", r"segmentation/2$", 1),  # a checkpoint is written, but not yet named
    ("os.mkdir", r"checkpoints/classification$", 1),  # between the stages
    ("os.rename", r"classification/3$", 1),  # the very last one
)
"""Moments in the order of one run, each of them the last thing not to happen."""
PAUSE_S = 0.05
"""Two touches this far apart have a compilation, training or a checkpoint's arrays between them."""
STAGES = {
    "checkpoint": r"/checkpoints(/|$)",
    "keys": r"/keys(/|$)",
    "ledger": r"/ledger(/|$)",
    "curves": r"/metrics\.",
    "records": r"/records(/|$)",
    "manifests": r"/manifests(/|$)",
}


@dataclass(frozen=True)
class Holder:
    """What founding a ledger asks of a patient."""

    hospital: str
    truth: bool = True
    label: int = 0

    @property
    def whose(self) -> tuple[str, str]:
        return self.hospital, "patient"


def configuration(variant: str) -> StudyConfig:
    """A study of which only the rounds are run."""
    changes = VARIANTS[variant]
    stage = {
        "rounds": ROUNDS,
        "local": {"optimizer": "adam", "learning_rate": 0.05, "batch_size": 2},
        "server": changes.get("server", {}),
        "scaffold": changes.get("scaffold", False),
        "aggregation": changes.get("aggregation", {}),
    }
    if stage["scaffold"]:
        stage["local"]["optimizer"] = "sgd"
    table = {
        "seed": 4,
        "phantom": {},
        "data": changes.get("data", {}),
        "segmentation": stage,
        "classification": stage,
        "privacy": {"clip_norm": 0.5, "noise_multiplier": 0.3, **changes.get("privacy", {})},
        "devices": changes.get("devices", {}),
        "consensus": changes.get("consensus"),
    }
    return StudyConfig.model_validate_json(json.dumps(table))


def live(folder: Path, variant: str) -> None:
    """Runs or resumes the rounds of both stages."""
    config = configuration(variant)
    hospitals = ("A", "B", "C")
    split = Split(tuple(Holder(name) for name in hospitals), (), ())  # pyright: ignore[reportArgumentType]
    run = Run(folder / "federated", config.arm(ArmConfig()), ArmConfig(), hospitals, "0" * 32)
    plan = plan_of_run(run, split)
    generator = np.random.default_rng(0)
    records = {}
    for number, name in enumerate(hospitals):
        x = generator.normal(size=(3 + number, 3)).astype(np.float32)
        records[name] = {"x": x, "y": x @ np.array([[1], [-2], [3]], np.float32)}
    metrics = MetricsLog(run.folder / "metrics.jsonl", member=None)
    spent = 0
    with open_ledger(run, split) as ledger:
        for name, stage in (("segmentation", config.segmentation), ("classification", config.classification)):
            assert stage is not None
            line = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(1))
            task = make_task(
                name, line, lambda model, batch: jnp.mean((model(batch["x"]) - batch["y"]) ** 2),
                absolute_error=lambda model, batch: jnp.abs(model(batch["x"]) - batch["y"])[:, 0],
            )  # fmt: skip
            *_, spent = run_rounds(
                run, task, stage, records, {}, ledger, metrics, RoundTrace(None), plan=plan, rounds_before=spent
            )


def fork(folder: Path, variant: str, *, moment: list[str] | None = None, note: Path | None = None) -> int:
    """Lives once, whole or until the moment; returns the exit status, -9 for a kill."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            try:
                if moment is not None:
                    event, pattern, count, delay_s = moment
                    killed.arm(event, pattern, int(count), float(delay_s))
                rows = killed.note_touches() if note is not None else []
                live(folder, variant)
                if note is not None:
                    note.write_text(json.dumps(rows))
                status = 0
            except BaseException:
                traceback.print_exc()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def compare(do: Any, folder: Path, other: Any) -> None:
    """Compares in a process of its own: this one must not start JAX."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            try:
                do(folder, other)
                status = 0
            except BaseException:
                traceback.print_exc()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, f"{folder} is not as the unbroken run"


def check_within(folder: Path, unbroken: Path) -> None:
    """What a killed run has committed, held against the unbroken one."""
    assert_within(folder, contents(unbroken))


def stage_of(touch: tuple[float, str, str], after: tuple[float, str, str]) -> str:
    """What a moment falls into: a stage by the path, or what takes longer than a touch."""
    if after[0] - touch[0] > PAUSE_S:
        return "training"
    return next((name for name, where in STAGES.items() if re.search(where, touch[2])), "other")


def main(place: Path, kills: int, every: int, variant: str) -> None:
    """Kills runs until there were so many kills."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    generator = np.random.default_rng([5, len(variant)])
    whole, timeline = place / "whole", place / "timeline.json"
    assert fork(whole, variant, note=timeline) == 0
    touches = [row for row in json.loads(timeline.read_text()) if str(whole) in row[2]]
    rows = [(stage_of(row, after), *row, after[0] - row[0]) for row, after in itertools.pairwise(touches)]
    fixed = FIXED[every // 2 :: every]
    for event, pattern, count in fixed:
        assert fork(place / "run-0", variant, moment=[event, pattern, str(count), "0"]) == -9, pattern
        compare(check_within, place / "run-0", whole)
    assert fork(place / "run-0", variant) == 0
    compare(assert_same, place / "run-0", whole)
    counts: Counter[str] = Counter({row[0]: 0 for row in rows})
    number = 0
    while counts.total() < kills:
        number += 1
        folder, status = place / f"run-{number}", -9
        while status == -9 and counts.total() < kills:
            stage = min(counts, key=lambda name: (counts[name], generator.random()))
            index = int(generator.choice([place for place, row in enumerate(rows) if row[0] == stage]))
            _, _, event, path, gap_s = rows[index]
            pattern = re.sub(r"\d{3,}", r"\\d+", re.escape(path.replace(str(whole), ""))) + "$"
            # In a life that goes on from a checkpoint less is left of what the unbroken run has touched.
            count = 1 + int(generator.integers(sum(bool(re.search(pattern, row[3])) for row in rows[: index + 1])))
            at_once = stage != "training" and generator.random() < 0.5
            delay_s = 0.0 if at_once else float(generator.uniform(0, max(gap_s, 0.01)))
            status = fork(folder, variant, moment=[event, pattern, str(count), f"{delay_s:.4f}"])
            assert status in (0, -9), f"run {number}: a life after a kill failed"
            if status == -9:
                counts[stage] += 1
                compare(check_within, folder, whole)
        if status == -9:
            assert fork(folder, variant) == 0
        compare(assert_same, folder, whole)
    print(json.dumps({"kills": len(fixed) + counts.total(), "runs": number, "stages": dict(counts)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
