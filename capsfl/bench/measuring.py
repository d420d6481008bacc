"""How long a function takes and how much memory it needs; how fast the device at hand can be at best."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

QUEUE_S = 0.02
"""Seconds that the runs of one sample take together on an accelerator."""


class Sample(NamedTuple):
    """One run: wall-clock seconds, and seconds of this process's threads together."""

    wall_s: float
    cpu_s: float


class Compiled(NamedTuple):
    """A compiled function, and what compiling it told (JSON-ready)."""

    call: Callable[..., Any]
    facts: dict[str, Any]


@contextmanager
def cold_compilation() -> Iterator[None]:
    """Without the persistent cache of compilations, whose times would be those of reading a file."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax asks once per process whether there is a cache
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def compile_timed(function: Callable[..., Any], *arguments: Any) -> Compiled:
    """Traces, lowers and compiles a function for arguments of these shapes."""
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arguments)
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    memory = compiled.memory_analysis()
    facts = {
        "lower_s": middle - start,
        "compile_s": end - middle,
        "temporary_bytes": None if memory is None else memory.temp_size_in_bytes,
        "argument_bytes": None if memory is None else memory.argument_size_in_bytes,
        "output_bytes": None if memory is None else memory.output_size_in_bytes,
    }
    return Compiled(compiled, facts)


def run_timed(run: Callable[[], Any], repeats: int = 1) -> Sample:
    """One run, to the end of its computation, begun when the one before has given its memory back.

    Args:
        run: What to run.
        repeats: Runs that are queued one behind the other and waited for together; the sample is their mean.
    """
    _settle()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        results = run()
    jax.block_until_ready(results)
    return Sample((time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats)


def queue_length(run_s: float) -> int:
    """Runs to queue for one sample: one on a CPU, enough to fill 20 ms on an accelerator.

    There a run is launched while the one before still computes. Waiting for each would time the way to the device and
    back, longer than a small kernel takes.

    Args:
        run_s: Wall-clock seconds of one run that is waited for.
    """
    return 1 if jax.default_backend() == "cpu" else min(max(round(QUEUE_S / run_s), 1), 200)


def _settle() -> None:
    """Waits until no thread of this process works, for a second at most.

    XLA:CPU hands a result over before it frees what the run took; 276 MiB of stored votes cost whoever ran next
    20 ms of processor time (measured).
    """
    for _ in range(100):
        before = time.process_time()
        time.sleep(0.01)
        if time.process_time() - before < 0.001:
            return


def alternate(
    runs: Mapping[str, Callable[[], Sample]], *, budget_s: float, least: int = 3, most: int = 11
) -> dict[str, dict[str, Any]]:
    """Runs functions in turns, so that a busy moment of the machine meets them all.

    Args:
        runs: Every function to compare by name; each runs once and says how long it took.
        budget_s: No further round begins when the rounds so far have taken this long.
        least: Rounds that are run whatever they take.
        most: Rounds that are enough.

    Returns:
        By name: ``runs``, and of ``wall_s`` and ``process_cpu_s`` the minimum, quartiles and median.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    start = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - start > budget_s:
            break
        for name, run in runs.items():
            samples[name].append(run())
    return {
        name: {
            "runs": len(taken),
            "wall_s": spread([sample.wall_s for sample in taken]),
            "process_cpu_s": spread([sample.cpu_s for sample in taken]),
        }
        for name, taken in samples.items()
    }


def spread(values: list[float]) -> dict[str, float]:
    """Minimum, quartiles and median."""
    if len(values) == 1:
        return dict.fromkeys(("min", "lower_quartile", "median", "upper_quartile"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"min": min(values), "lower_quartile": low, "median": middle, "upper_quartile": high}


def ratio(one: dict[str, float] | None, other: dict[str, float] | None) -> float | None:
    """One median over another; None where either was not measured."""
    return one["median"] / other["median"] if one is not None and other is not None else None


def measure_roofs(*, quick: bool) -> dict[str, Any]:
    """The rates that bound every operator here: of copying memory and of multiplying matrices.

    Arrays exceed the caches. The copy is ``x + 1`` in place, one read and one write of every byte (a copy to
    new memory would time the operating system's pages on a CPU); the product is of square float32 matrices
    at the default precision, which the operators use too. The best of several runs counts.

    Returns:
        ``copy_bytes_per_s``, ``gemm_flops_per_s``, and the sizes they were measured with.
    """
    cpu = jax.default_backend() == "cpu"
    length = (1 << (24 if quick else 26)) if cpu else 1 << 29  # float32s: 64, 256 MiB; 2 GiB
    side = (2048 if quick else 3072) if cpu else 8192
    repeats = 3 if quick else 7

    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    array = jax.block_until_ready(step(jnp.zeros(length, jnp.float32)))
    copies = []
    for _ in range(repeats):
        start = time.perf_counter()
        array = jax.block_until_ready(step(array))
        copies.append(time.perf_counter() - start)
    del array

    matrix = jnp.ones((side, side), jnp.float32)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(matrix, matrix))
    products = [run_timed(lambda: product(matrix, matrix)).wall_s for _ in range(repeats)]
    return {
        "copy_bytes_per_s": 8 * length / min(copies),
        "gemm_flops_per_s": 2 * side**3 / min(products),
        "copy_array_bytes": 4 * length,
        "gemm_side": side,
    }


def higher_roofs(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The higher of two measurements, taken before and after: a roof is the best the device does."""
    rates = ("copy_bytes_per_s", "gemm_flops_per_s")
    return {**one, **{rate: max(one[rate], other[rate]) for rate in rates}}
