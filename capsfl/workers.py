"""Processes on this machine: how many run at once, that none outlives the one that started it, and which are gone."""

import os
import re
import socket
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Control group, version 2: the cores that a container may use."""


def count_cores() -> int:
    """Cores this process may run on: as SLURM or taskset bind it, as a container limits it."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
        return max(1, min(bound, int(quota) // int(period)))
    except (OSError, ValueError):
        return bound


def count_threads() -> int:
    """Threads this process may compute with: as OpenMP's variable says, which a pool sets to 1 for its workers."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return min(int(asked), count_cores()) if asked.isdigit() and int(asked) else count_cores()


def die_with_parent() -> None:
    """Ends a worker with its parent, so that a killed command leaves nobody writing in its folder.

    The initializer of every pool: a worker waits for its next task on a pipe whose other end it holds itself, and
    would do so for ever.
    """
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def is_running(process: int) -> bool:
    """Tells whether a process of this machine is there: what a killed one left half-written may be removed."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def process_tag() -> str:
    """Names this process among those of all machines that share a file system: host and number, no dot in it."""
    return f"{_host()}-{os.getpid()}"


def is_gone(tag: str) -> bool:
    """Tells whether a process of this host is no more; of another host's nothing is known, so it is not."""
    host, _, number = tag.rpartition("-")
    return host == _host() and number.isdigit() and not is_running(int(number))


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname()) or "host"
