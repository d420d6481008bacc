"""The launch examples are what a shell, a YAML reader and our own command line take."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from capsfl.arguments import SECTIONS, parse
from capsfl.config import StudyConfig, load_config
from capsfl.sweeps.config import SweepConfig, load_sweep
from capsfl.sweeps.run import share_of

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = ROOT / "configs" / "launch"


def understand(words: list[str]) -> SweepConfig | StudyConfig:
    """The configuration that a command would run."""
    program, command, path, *rest = words
    assert program == "capsfl"
    form: Any = {"sweep": SweepConfig, "train": StudyConfig}[command]
    default: Any = {"sweep": load_sweep, "train": load_config}[command](ROOT / path)
    return parse(form, rest, prog="capsfl", default=default, config=SECTIONS)


def launch(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    """Runs slurm.sh with an srun that prints what it would start."""
    stub = tmp_path / "srun"
    stub.write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    script = str(LAUNCH / "slurm.sh")
    return subprocess.run(["bash", script, *words], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("command", "config"), [("sweep", "configs/sweep_privacy.toml"), ("train", "configs/demo.toml")]
)
def test_slurm_starts_commands_that_we_understand(tmp_path, command, config):
    done = launch(tmp_path, command, config, "--out", "runs/elsewhere")
    assert done.returncode == 0, done.stderr
    found = understand(done.stdout.splitlines())
    assert found.out == "runs/elsewhere"
    if isinstance(found, SweepConfig):
        assert share_of(found.execution.part, {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}) == (1, 4)
    else:
        assert found.devices.parallel == "shard_map"


def test_slurm_refuses_what_it_cannot_start(tmp_path):
    done = launch(tmp_path, "predict", "configs/demo.toml")
    assert done.returncode == 2
    assert "expected sweep or train" in done.stderr


def test_kubernetes_starts_commands_that_we_understand():
    yaml = pytest.importorskip("yaml")
    documents = list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))
    jobs = {doc["metadata"]["name"]: doc["spec"] for doc in documents if doc["kind"] == "Job"}
    assert jobs.keys() == {"capsfl-sweep", "capsfl-train"}
    for name, job in jobs.items():
        assert job["completionMode"] == "Indexed"
        (container,) = job["template"]["spec"]["containers"]
        environment = {row["name"]: row["value"] for row in container["env"]}
        found = understand(container["command"])
        mounts = {row["mountPath"] for row in container["volumeMounts"]}
        assert found.out.startswith(tuple(mounts))
        if isinstance(found, SweepConfig):
            index = {"JOB_COMPLETION_INDEX": "7", **environment}
            assert share_of(found.execution.part, index) == (7, job["completions"])
        else:
            assert int(environment["JAX_NUM_PROCESSES"]) == job["completions"]
            (service,) = [doc for doc in documents if doc["kind"] == "Service"]
            host, _, port = environment["JAX_COORDINATOR_ADDRESS"].partition(":")
            assert host == f"{name}-0.{service['metadata']['name']}"
            assert port.isdigit()
