"""The layout over devices and processes changes nothing but the order of sums."""

import json
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.journey


def test_one_device_pmap_and_shard_map_agree_on_four_devices(environment: Mapping[str, str]):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("layouts.py")],
        capture_output=True, text=True, timeout=600,
        env={**environment, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["devices"] == 4
    assert answer["weights"] > 10_000
    for compared in ("difference", "updates"):
        for layout, difference in answer[compared].items():
            assert difference <= 1e-5, (compared, layout)


def test_two_processes_with_two_devices_each_agree_with_one_device(environment: Mapping[str, str]):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("two_processes.py"), str(port), str(index)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first == second
    assert first["alone"] != pytest.approx(first["before"], abs=1e-2), "nothing was trained"
    assert first["together"] == pytest.approx(first["alone"], abs=1e-6)
