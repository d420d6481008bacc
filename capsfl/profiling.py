"""A trace of a few rounds (`jax.profiler`): what the devices did, and which part of a round asked for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

TRACED_ROUNDS = 3
"""Rounds in a trace: enough to see what repeats, and small enough to open."""


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
