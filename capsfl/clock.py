"""Wall time, processor time and memory of a stretch of work."""

import resource
import time


class Stopwatch:
    """Measures from its construction on: seconds, processor seconds (children included), peak memory."""

    def __init__(self) -> None:
        self._wall = time.perf_counter()
        self._cpu = _cpu_seconds()

    def read(self) -> dict[str, float | int]:
        """Returns `seconds`, `cpu_seconds` and `peak_memory_bytes` of this process so far."""
        return {
            "seconds": round(time.perf_counter() - self._wall, 4),
            "cpu_seconds": round(_cpu_seconds() - self._cpu, 4),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def _cpu_seconds() -> float:
    usage = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in usage)
