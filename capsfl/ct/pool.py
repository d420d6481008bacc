"""One function over many scans: in worker processes, with a progress bar, results as they come."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from capsfl.workers import count_cores, die_with_parent

R = TypeVar("R")

BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def each(
    function: Callable[..., R],
    tasks: Sequence[tuple[Any, ...]],
    *,
    title: str,
    processes: int | None,
    progress: bool,
    done: int = 0,
) -> Iterator[tuple[int, R]]:
    """Call a function with every tuple of arguments; yields positions with results, in order of completion.

    Args:
        function: of a module, so that workers find it; what it raises is raised here and ends the rest.
        tasks: arguments.
        title: of the progress bar.
        processes: worker processes; as many as cores when None, and never more than tasks.
        progress: draw the bar on the console.
        done: tasks that were done before, for the bar.
    """
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress, transient=True) as bar:
        task = bar.add_task(title, total=len(tasks) + done, completed=done)
        workers = min(processes or count_cores(), len(tasks))
        if workers <= 1:
            for position, arguments in enumerate(tasks):
                yield position, function(*arguments)
                bar.advance(task)
            return
        # Threads of the main process (jax, TensorStore) do not survive a fork, so workers start afresh.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=die_with_parent) as pool:
            with _one_thread_each():
                futures = {pool.submit(function, *arguments): position for position, arguments in enumerate(tasks)}
            try:
                for future in as_completed(futures):
                    bar.advance(task)
                    yield futures[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Start workers with one BLAS thread each: their products are small and the processors are taken."""
    added = [name for name in BLAS_THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
