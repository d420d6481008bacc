"""Kills at moments drawn over a whole study, from the first file to the page: nothing is lost, nothing half-written.

Two unbroken runs, with a cold and with a warm compilation cache, must agree in every bit and say when which file is
touched. From their timelines moments are drawn, as many in every stage: at a touch, or some time after it, in native
code, in the kernel, in a compilation. A study is killed and resumed until it ends, then the next one. After every kill
what it has committed must be the unbroken run's; at its end it must be all of it.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from contents import assert_same, assert_within, contents

pytestmark = [
    pytest.mark.journey,
    pytest.mark.torture,
    pytest.mark.skipif("CAPSFL_TORTURE" not in os.environ, reason="minutes of processor time: make torture"),
]

SMALL = ("--segmentation.planes", "xy", "--data.field", "32", "32", "32")
ADAM = ("--segmentation.server.optimizer", "adam", "--segmentation.server.learning-rate", "0.01")
SCAFFOLD = ("--privacy.noise-multiplier", "0", "--segmentation.scaffold", "True", "--classification.scaffold", "True")
TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}

CAMPAIGNS: dict[str, tuple[int, tuple[str, ...], dict[str, str]]] = {
    "Gaussian noise, local Adam": (50, (), {}),
    "quantile clipping, server Adam": (10, ("--privacy.clipping", "quantile", *ADAM), {}),
    "control variates, server Adam": (10, (*SCAFFOLD, *ADAM), {}),
    "pmap over two devices": (10, ("--devices.parallel", "pmap"), TWO_DEVICES),
}
"""Kills, options, environment."""

STAGES = {
    "study record": r"^out/(study\.json|\.study\.json|\.lock$)",
    "volumes": r"^out/volumes(/|$)",
    "keys": r"/keys(/|$)",
    "checkpoint": r"/checkpoints(/|$)",
    "ledger": r"/ledger(/|$)",
    "curves": r"/metrics\.",
    "results": r"results\.json|ledger\.json|overlays",
    "page": r"report\.html",
}
"""Stages of a study by the paths that they touch."""
PAUSE_S = 0.05
"""Two touches this far apart have something at work between them: a compilation, training, scoring."""


class Touch(NamedTuple):
    """A touch of the file system in an unbroken run."""

    stage: str
    event: str
    pattern: str
    after_s: float
    """Time until the next touch."""


@dataclass
class Campaign:
    """Studies to be killed, and the unbroken ones that they are held against."""

    place: Path
    options: tuple[str | Path, ...]
    environment: Mapping[str, str]
    generator: np.random.Generator
    killed: Counter[str] = field(default_factory=Counter)

    def run(self, how: list[str], out: Path, cache: Path) -> int:
        """Runs the study in `out`, whole or until it is killed; whatever it started must end with it."""
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed.py")), *how, "--", "train", *map(str, self.options),
             "--out", str(out)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**self.environment, "JAX_COMPILATION_CACHE_DIR": str(cache)},
        )  # fmt: skip
        _, err = process.communicate(timeout=1200)
        assert process.returncode in (0, -9), f"{how}: {err}"
        assert err == "", how
        deadline = time.monotonic() + 60
        while alive(process.pid):
            assert time.monotonic() < deadline, f"{how}: processes outlive the one that was killed"
            time.sleep(0.1)
        return process.returncode

    def record(self, name: str, cache: Path) -> list[Touch]:
        """Runs a study unbroken."""
        out, file = self.place / name, self.place / f"{name}.json"
        assert self.run(["record", str(file)], out, cache) == 0
        rows = json.loads(file.read_text())
        times = [row[0] for row in rows]
        return [
            Touch(stage, event, pattern_of(place), until - start)
            for (start, event, path), until in zip(rows, [*times[1:], times[-1]], strict=True)
            if (place := path.replace(str(out), "out")) and (stage := stage_of(place))
        ]

    def draw(self, timeline: list[Touch], start: int, stage: str) -> tuple[int, list[str]] | None:
        """Draws a moment of a stage behind `start`: its place in the timeline, and how to kill there."""
        if stage in ("training", "compilation"):
            weights = [touch.after_s if touch.after_s > PAUSE_S else 0 for touch in timeline[start:]]
        else:
            weights = [float(touch.stage == stage) for touch in timeline[start:]]
        if not any(weights):
            return None
        index = start + int(self.generator.choice(len(weights), p=np.asarray(weights) / np.sum(weights)))
        touch = timeline[index]
        alike = [other.pattern == touch.pattern and other.event == touch.event for other in timeline[start : index + 1]]
        delay_s = 0.0
        if stage in ("training", "compilation") or self.generator.random() < 0.5:
            delay_s = float(self.generator.uniform(0, max(touch.after_s, 0.02)))
        return index, [touch.event, touch.pattern, str(sum(alike)), f"{delay_s:.4f}"]


def alive(group: int) -> bool:
    """Whether a process group has members."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def stage_of(place: str) -> str | None:
    """The stage of a path; None outside the study."""
    if not place.startswith("out"):
        return None
    return next((stage for stage, pattern in STAGES.items() if re.search(pattern, place)), "study record")


def pattern_of(place: str) -> str:
    """A pattern for a path in any run: names of drafts carry a process's number, or letters drawn by chance."""
    pattern = re.sub(r"\d{3,}", r"\\d+", re.escape(place.removeprefix("out")))
    return re.sub(r"(?<=/\\.report\\-)\w+", r"\\w+", pattern) + "$"


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_study_killed_at_any_moment_ends_bit_identical_to_one_that_was_not(
    name: str, configuration: Any, environment: Mapping[str, str], tmp_path: Path
):
    kills, options, variables = CAMPAIGNS[name]
    config = configuration(tmp_path / "study")
    campaign = Campaign(
        tmp_path, (config, *SMALL, *options), {**environment, **variables}, np.random.default_rng([17, len(name)])
    )
    warm = tmp_path / "cache"
    compiling = campaign.record("cold", warm)
    timeline = campaign.record("warm", warm)
    assert_same(tmp_path / "warm", tmp_path / "cold")
    unbroken = contents(tmp_path / "cold")

    study = 0
    while campaign.killed.total() < kills:
        study += 1
        out, start, life = tmp_path / f"study-{study}", 0, 0
        while campaign.killed.total() < kills:
            life += 1
            stages = sorted([*STAGES, "training", "compilation"], key=lambda stage: campaign.killed[stage])
            for stage in stages:
                cold = stage == "compilation"
                moment = campaign.draw(compiling if cold else timeline, start, stage)
                if moment is not None and not (cold and life > 1):
                    break
            else:
                break  # every moment of this study lies behind it
            index, how = moment
            status = campaign.run(how, out, tmp_path / f"cache-{study}" if cold else warm)
            print(f"study {study}, life {life}: {stage}: {' '.join(how)}: {status}", flush=True)
            if status == 0:
                break
            campaign.killed[stage] += 1
            start = 0 if cold else index + 1
            assert_within(out, unbroken)
        assert campaign.run(["record", os.devnull], out, warm) == 0
        assert_same(out, tmp_path / "cold")
    print(f"{name}: {campaign.killed.total()} kills in {study} studies: {dict(campaign.killed)}")
    assert set(campaign.killed) == {*STAGES, "training", "compilation"}, "a stage without a kill"
