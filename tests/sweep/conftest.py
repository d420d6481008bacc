"""One sweep small enough to be trained in a moment, in two parts, shared by the tests of its results."""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from capsfl.sweeps import program, run
from capsfl.sweeps.config import SweepConfig

TINY: Mapping[str, Any] = {
    "problem": {
        "kind": "synthetic",
        "hospitals": 6,
        "records": 8,
        "side": 4,
        "classes": 2,
        "scored": 50,
        "model": {"hidden": [4]},
    },
    "training": {"rounds": 4, "local": {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 4}},
    "privacy": {"sampler": "poisson", "cohort": 2, "clip_norm": 0.5, "noise_multiplier": 1.0, "delta": 1e-2},
    "evaluate_every": 3,
    "execution": {"width": 2},
}
"""Four rounds scored after the third and the last; two studies side by side."""


def make_config(**changes: Any) -> SweepConfig:
    """A configuration: `TINY` with dotted changes, `__` standing for a dot."""
    table = json.loads(json.dumps(TINY))
    for name, value in changes.items():
        *sections, field = name.split("__")
        place = table
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return SweepConfig.model_validate_json(json.dumps(table))


@pytest.fixture(scope="session")
def configure() -> Callable[..., SweepConfig]:
    """`make_config`."""
    return make_config


AXES: Mapping[str, Any] = {
    "sweep__seeds": [0, 5],
    "sweep__grid": [
        {"field": "problem.model.hidden", "values": [[4], [3]]},
        {"field": "training.local.learning_rate", "values": [0.1, 0.3]},
        {"field": "privacy.noise_multiplier", "values": [0.0, 0.7]},
    ],
}
"""Sixteen studies in two groups."""


@dataclass(frozen=True)
class Finished:
    """A finished sweep: its configuration, its folder, and how often each of its programs was traced."""

    config: SweepConfig
    folder: Path
    traces: list[int]
    said: str


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A sweep run by two processes' shares, one after the other; read it, never change it."""
    out = tmp_path_factory.mktemp("sweep") / "tiny"
    config = make_config(out=str(out), **AXES)
    console = Console(file=io.StringIO(), width=200)
    programs: list[program.GroupProgram] = []

    class Watched(program.GroupProgram):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            programs.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "GroupProgram", Watched)
        for part in ("1/2", "0/2"):
            execution = config.execution.model_copy(update={"part": part})
            run.run_sweep(config.model_copy(update={"execution": execution}), console=console)
    output = console.file
    assert isinstance(output, io.StringIO)
    return Finished(config, out, [each.traces for each in programs], output.getvalue())
