"""Where time goes: a trace of a few rounds (`jax.profiler`), and the part of it that is compilation."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.monitoring

TRACED_ROUNDS = 3
"""Rounds in a trace: enough to see what repeats, and small enough to open."""


class CompileWatch:
    """Measures from its construction on how long this thread has traced, lowered and compiled programs.

    JAX reports each of them as a span of time; one function traced inside another is counted once.
    """

    def __init__(self) -> None:
        _compiled.spans = []

    def read(self) -> dict[str, float]:
        """Returns `compile_seconds`, of wall time."""
        total, end = 0.0, float("-inf")
        for start, stop in sorted(_compiled.spans):
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return {"compile_seconds": round(total, 4)}


_compiled = threading.local()


def _note_span(event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
    if event.startswith("/jax/core/compile/") and hasattr(_compiled, "spans"):
        _compiled.spans.append((start_time, end_time))


jax.monitoring.register_event_time_span_listener(_note_span)


class RoundTrace:
    """Traces rounds of one stage, leaving out the first of a start, which compiles, where others follow.

    In the trace every round is a step `round <task>` with its number, and its parts stand under the names given to
    `part`. One stage of a run is traced: the first that has rounds left to run.

    Args:
        folder: where the trace goes; None to trace nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._left = TRACED_ROUNDS
        self._running = False

    @contextmanager
    def rounds(self, task: str, numbers: range) -> Iterator[Iterator[int]]:
        """Gives the numbers of the rounds to run, one at a time, and ends the trace with them.

        Args:
            task: name of the stage.
            numbers: rounds that are left, from 1.
        """
        try:
            yield self._steps(task, numbers)
        finally:
            self._stop()

    def _steps(self, task: str, numbers: range) -> Iterator[int]:
        for number in numbers:
            if self._folder is not None and self._left and (number > numbers.start or len(numbers) == 1):
                self._start(self._folder)
            with jax.profiler.StepTraceAnnotation(f"round {task}", step_num=number):
                yield number
            if self._running:
                self._left -= 1
                if not self._left:
                    self._stop()

    def _start(self, folder: Path) -> None:
        if not self._running:
            jax.profiler.start_trace(folder)
            self._running = True

    def _stop(self) -> None:
        if self._running:
            self._running, self._left = False, 0
            jax.profiler.stop_trace()


def part(name: str) -> jax.profiler.TraceAnnotation:
    """Names a part of a round in the trace; a context manager."""
    return jax.profiler.TraceAnnotation(name)


def trace_folder(run: Path) -> Path:
    """Where a run's trace goes; of several processes each has its own."""
    folder = run / "profile"
    return folder / f"process-{jax.process_index()}" if jax.process_count() > 1 else folder


def is_traced(run: Path) -> bool:
    """Tells whether a run's folder holds a trace."""
    return any((run / "profile").rglob("*.xplane.pb"))
