"""How much memory a device has left: of its own on an accelerator, of the machine or its container on a CPU."""

from pathlib import Path
from typing import Any

MEMINFO = Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup")
"""Control group, version 2: the limits that Kubernetes, Docker and SLURM put on a process."""


def free_memory_bytes(device: Any) -> int | None:
    """Bytes that a program on `device` may still use; None where neither device nor system tells."""
    if device.platform == "cpu":
        return _free_host_bytes()
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit")
    return None if limit is None else max(0, limit - stats.get("bytes_in_use", 0))


def _free_host_bytes() -> int | None:
    found = [free for free in (_free_machine_bytes(), _free_container_bytes()) if free is not None]
    return min(found, default=None)


def _free_machine_bytes() -> int | None:
    """Memory that nobody uses or that only caches files."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _free_container_bytes() -> int | None:
    """The container's limit less what is used; files it has read are given up when memory is asked for."""
    try:
        limit = (CONTAINER / "memory.max").read_text(encoding="ascii").strip()
        used = int((CONTAINER / "memory.current").read_text(encoding="ascii"))
        stat = (CONTAINER / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = sum(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
        return None if limit == "max" else max(0, int(limit) - used + cached)
    except (OSError, ValueError, IndexError):
        return None
