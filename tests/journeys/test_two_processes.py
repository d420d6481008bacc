"""Two processes are one run: they give what one gives, end together in one line, and resume."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from capsfl.checkpoint import read_parameters
from capsfl.ledger.chain import Ledger
from capsfl.profiling import is_traced

pytestmark = pytest.mark.journey

HERE = Path(__file__).parent
PATIENCE_S = 600
"""For what takes seconds on a quiet machine."""
STUDY = """
out = "{out}"
seed = 3

[data]
source = "{source}"
field = [16, 32, 32]

[segmentation]
rounds = 3
crop = 16
crops_per_plane = 2
planes = ["xy"]
model = {{ name = "unet", width = 2, depth = 2 }}
local = {{ optimizer = "sgd", learning_rate = 0.01, batch_size = 4 }}

[privacy]
clip_norm = 1.0
noise_multiplier = 0.5

[devices]
parallel = "shard_map"
chunk = 1
"""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(commands: Sequence[Sequence[object]], environments: Sequence[Mapping[str, str]]) -> Iterator[list]:
    """Processes side by side; whatever happens, none of them is left."""
    processes = [
        subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for command, environment in zip(commands, environments, strict=True)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def devices(environment: Mapping[str, str], number: int) -> dict[str, str]:
    """An environment with so many CPU devices."""
    return {**environment, "XLA_FLAGS": f"--xla_force_host_platform_device_count={number}"}


def one_line(text: str) -> str:
    """A refusal: one line and nothing else."""
    assert len(text.splitlines()) == 1, text
    assert "Traceback" not in text
    return text.strip()


@pytest.mark.parametrize(
    ("manner", "first", "other"),
    [
        ("the other dies", "process 0: no sign of process 1 for 5 s; run the same command in every", None),
        ("the first dies", None, "process 1: the first process has ended or cannot be reached; run the same command"),
        ("the other fails", "process 0: ended with process 1: volumes/A-001.zarr: No space left", "volumes/A-001.zarr"),
        ("the first fails", "volumes/A-001.zarr", "process 1: ended with process 0: volumes/A-001.zarr: No space left"),
        (
            "they differ",
            "process 0: ended with process 1: process 1: the configuration",
            "process 1: the configuration",
        ),
        ("all is well", "", ""),
    ],
)
def test_both_processes_end_soon_and_say_why_in_one_line(
    environment: Mapping[str, str], manner: str, first: str | None, other: str | None
):
    port = free_port()
    commands = [[sys.executable, HERE / "ending.py", port, index, manner] for index in range(2)]
    with started(commands, [environment] * 2) as processes:
        for process in processes:
            assert process.stdout.readline() == "joined\n", process.stderr.read()
        start = time.monotonic()
        errors = [process.communicate(timeout=PATIENCE_S)[1] for process in processes]
        assert time.monotonic() - start < 120, "the work of 300 s was waited for"
        for process, error, line in zip(processes, errors, (first, other), strict=True):
            if line is None:
                assert process.returncode == -9
            elif line:
                assert one_line(error).startswith(line)
                assert process.returncode == 2
            else:
                assert (process.returncode, error) == (0, "")


@pytest.fixture(scope="module")
def config(study, phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, and beside it two run folders in which the scans are volumes already."""
    place = tmp_path_factory.mktemp("two")
    for name in ("alone", "together"):
        # Nothing was trained in them, so another configuration may take them over.
        (place / name).mkdir()
        (place / name / "study.json").write_bytes((study.run / "study.json").read_bytes())
        (place / name / "volumes").symlink_to(study.run / "volumes", target_is_directory=True)
    path = place / "study.toml"
    path.write_text(STUDY.format(out=place / "alone", source=phantom / "manifest.csv"))
    return path


def weights(run: Path, number: int) -> np.ndarray:
    """All weights after a round, as one vector."""
    found = read_parameters(run / "federated" / "checkpoints" / "segmentation", number)
    assert found is not None
    return np.concatenate([leaf.ravel() for _, leaf in sorted(found.items())])


def test_two_processes_survive_a_death_and_give_what_one_process_gives(
    config: Path, environment: Mapping[str, str], capsfl
):
    together, port = config.parent / "together", free_port()
    patience = ["--devices.heartbeat-timeout-s", "10", "--devices.start-timeout-s", "200"]
    words = ["train", config, "--out", together, *patience]
    by_hand = [
        {**devices(environment, 2), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
         "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        for index in range(2)
    ]  # fmt: skip
    moment = ["os.mkdir", r"segmentation/2\.orbax-checkpoint-tmp$", "1", "0"]
    dying = [sys.executable, HERE / "killed.py", *moment, "--", *words]
    capsfl_script = [Path(sys.executable).with_name("capsfl"), *words]
    with started([dying, capsfl_script], by_hand) as processes:
        (_, first), (_, other) = [process.communicate(timeout=PATIENCE_S) for process in processes]
        assert processes[0].returncode == -9, f"the moment never came: {first}"
        assert one_line(other).startswith("process 1: ")
        assert "run the same command in every process again to resume" in other
        assert processes[1].returncode == 2
    assert weights(together, 1).size > 1_000
    assert not (together / "federated/checkpoints/segmentation/2").exists()

    slurm = [
        {**devices(environment, 2), "JAX_COORDINATOR_PORT": str(free_port()), "SLURM_JOB_ID": "7",
         "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "SLURM_PROCID": str(index),
         "SLURM_LOCALID": str(index)}
        for index in range(2)
    ]  # fmt: skip
    slurm[1]["JAX_COORDINATOR_PORT"] = slurm[0]["JAX_COORDINATOR_PORT"]
    with started([[*capsfl_script, "--profile"]] * 2, slurm) as processes:
        answers = [process.communicate(timeout=PATIENCE_S) for process in processes]
        for process, (_, error) in zip(processes, answers, strict=True):
            assert (process.returncode, error) == (0, "")
    assert "page: " in answers[0][0]
    assert answers[1][0] == "", "only the first process speaks"
    assert f"profile: {together / 'federated' / 'profile'}" in answers[0][0]
    assert is_traced(together / "federated")

    done = subprocess.run(
        [capsfl_script[0], "train", config],
        capture_output=True, text=True, timeout=PATIENCE_S, env=devices(environment, 4),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    start = weights(config.parent / "alone", 1)
    for number in (1, 2, 3):
        alone = weights(config.parent / "alone", number)
        assert np.max(np.abs(weights(together, number) - alone)) <= 1e-5
    assert np.max(np.abs(alone - start)) > 1e-2, "nothing was trained"
    with Ledger.open(together / "federated" / "ledger") as ledger:
        assert [record.round for record in ledger.rounds()] == [1, 2, 3]
    assert capsfl("verify", together).code == 0


def test_a_layout_for_one_process_is_refused_by_name(config: Path, environment: Mapping[str, str], tmp_path: Path):
    words = [Path(sys.executable).with_name("capsfl"), "train", config, "--out", tmp_path / "run"]
    lonely = {**environment, "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    with started([words], [lonely]) as (process,):
        _, error = process.communicate(timeout=PATIENCE_S)
    assert one_line(error).startswith("devices.process_id: missing for several processes; give --devices.process-id")
    absent = [*words, "--devices.process-id", "1", "--devices.start-timeout-s", "2"]
    with started([absent], [lonely]) as (process,):
        _, error = process.communicate(timeout=PATIENCE_S)
    assert "process 1 of 2" in one_line(error)
    assert "could not join within 2 s" in error
    assert os.listdir(tmp_path) == []
