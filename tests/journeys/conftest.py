"""A small phantom and one trained study, made once by the real command line and shared by all journeys.

With pytest-xdist every worker has its own session, and `--dist worksteal` knows no groups. What is costly
therefore lies in a folder that the workers share; a file lock lets the first one make it while others wait.
"""

import csv
import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from capsfl.cli import main

CAPSFL = Path(sysconfig.get_path("scripts")) / "capsfl"
PATIENCE_S = 600
"""For one command; machines that run tests are busy."""

SPLIT = {"A-001": "validation", "A-002": "test", "C-002": "test"}
"""Patients that are not trained on; what is left has both labels in A and B, and C's."""

STUDY = """
out = "{out}"
seed = 3

[data]
source = "{source}"
field = [32, 64, 64]

[segmentation]
rounds = 2
crop = 32
crops_per_plane = 2
planes = ["xy", "xz"]
model = {{ width = 0.13, num_iters = 1 }}
local = {{ optimizer = "adam", learning_rate = 0.003, batch_size = 4 }}

[classification]
rounds = 2
slices_per_scan = 4
top_slices = 2
local = {{ optimizer = "adam", learning_rate = 0.002, batch_size = 4 }}

[classification.model]
image_size = 32
conv_channels = 4
conv_kernel = 5
conv_stride = 2
primary_capsules = 2
primary_dim = 4
primary_kernel = 5
digit_dim = 4
reconstruction = false

[privacy]
clip_norm = 1.0
noise_multiplier = 0.5
"""


@dataclass(frozen=True)
class Outcome:
    """What one command gave back."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Study:
    """A study on disk and the configuration it was made by."""

    config: Path
    run: Path


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this test run see."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "journeys"
    place.mkdir(exist_ok=True)
    return place


@pytest.fixture(scope="session")
def once(shared_folder: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes a named folder by a function, once for all workers."""

    def make(name: str, build: Callable[[Path], object]) -> Path:
        place, done = shared_folder / name, shared_folder / f"{name}.done"
        with (shared_folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(place, ignore_errors=True)  # left by a worker that failed
                build(place)
                done.touch()
        return place

    return make


@pytest.fixture(scope="session")
def environment(shared_folder: Path) -> Mapping[str, str]:
    """The environment of commands: CPU, and one compilation cache for every program however small."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(shared_folder / "compilation-cache"),
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "COLUMNS": "120",
    }


@pytest.fixture(scope="session")
def capsfl(environment: Mapping[str, str]) -> Callable[..., Outcome]:
    """Runs the installed `capsfl` in a process of its own."""

    def run(*words: str | Path, expect: int | None = 0, cwd: Path | None = None) -> Outcome:
        done = subprocess.run(
            [str(CAPSFL), *map(str, words)],
            capture_output=True, text=True, timeout=PATIENCE_S, env=environment, cwd=cwd,
        )  # fmt: skip
        assert expect is None or done.returncode == expect, f"{words}: {done.stdout}\n{done.stderr}"
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs a command in this process, since starting Python costs more than a short command does.

    Every command is also run in a process of its own by some journey.
    """
    # `main` sets these for its process, which is ours here.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*words: str | Path, expect: int | None = 0) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(word) for word in words])
        found = capsys.readouterr()
        code = exit_.value.code
        assert isinstance(code, int)
        assert expect is None or code == expect, f"{words}: {found.out}\n{found.err}"
        return Outcome(code, found.out, found.err)

    return run


@pytest.fixture
def refused(here: Callable[..., Outcome]) -> Callable[..., str]:
    """Runs a command that must be refused; returns the one line it prints. test_bad_input also starts a few."""

    def run(*words: str | Path) -> str:
        message = here(*words, expect=2).err
        assert message.endswith("\n")
        assert len(message.splitlines()) == 1, message
        assert "Traceback" not in message
        return message.strip()

    return run


@pytest.fixture(scope="session")
def phantom(once: Callable[..., Path], capsfl: Callable[..., Outcome]) -> Path:
    """Nine patients of three hospitals as DICOM series, with a manifest that fixes the split."""

    def build(place: Path) -> None:
        capsfl(
            "phantom", place, "--patients", "9", "--matrix", "128",
            "--positives-fraction", "0.5", "--slice-thickness-mm", "10",
        )  # fmt: skip
        with (place / "manifest.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        for hospital in "ABC":
            labels = {row["label"] for row in rows if row["hospital"] == f"hospital-{hospital}"}
            assert labels == {"0", "1"}
        with (place / "manifest.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(row | {"split": SPLIT.get(row["patient"], "train")} for row in rows)

    return once("phantom", build)


@pytest.fixture(scope="session")
def configuration(phantom: Path) -> Callable[[Path], Path]:
    """Writes the journeys' configuration for a run folder, beside it."""

    def write(out: Path) -> Path:
        path = out.with_suffix(".toml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STUDY.format(out=out, source=phantom / "manifest.csv"))
        return path

    return write


@pytest.fixture(scope="session")
def study(once: Callable[..., Path], environment: Mapping[str, str], configuration: Callable[[Path], Path]) -> Study:
    """A finished study; read it, never change it. Its keys are known, so that killed studies can be like it."""

    def build(place: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("killed.py")), "record", os.devnull, "--", "train"]
        done = subprocess.run(
            [*command, str(configuration(place))], capture_output=True, text=True, timeout=PATIENCE_S, env=environment
        )
        assert done.returncode == 0, done.stderr

    run = once("study", build)
    return Study(run.with_suffix(".toml"), run)


@pytest.fixture
def study_copy(study: Study, tmp_path: Path) -> Path:
    """A copy of the finished study to be damaged."""
    return Path(shutil.copytree(study.run, tmp_path / "study"))
