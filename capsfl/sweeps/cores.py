"""CPU cores as devices: JAX's CPU is one device by default, on which small studies keep one core busy."""

import contextlib
import os
from pathlib import Path

import jax

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Control group, version 2: the cores that a container may use."""


def one_device_per_core() -> None:
    """Makes every core a CPU device; call it before anything runs. What XLA_FLAGS says wins."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    # Where devices are there already, they are as many as somebody else wanted.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count_cores())


def count_cores() -> int:
    """Cores this process may run on: as SLURM or taskset bind it, as a container limits it."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        return max(1, min(bound, int(quota) // int(period)))
    except (OSError, ValueError):
        return bound
