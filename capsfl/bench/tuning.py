"""Finds the fastest block size of streamed fully connected routing and records it in the user's table."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from capsfl_kernels import block_sizes

from capsfl.bench.measuring import alternate, cold_compilation, compile_timed, run_timed
from capsfl.bench.operators import OPERATORS

# The operator and implementation whose block size is looked up in the table.
OPERATOR, IMPLEMENTATION = "dynamic_routing", "streamed"


def tune(*, quick: bool, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Tries a geometric ladder of block sizes on every case, forward and backward, and keeps the best.

    The best has the lowest median process CPU time on a CPU, which a busy machine disturbs less, and the
    lowest median wall time on an accelerator, whose work no process time counts. The table's own choice, or
    the operator's default, takes part without a block size given: an entry is recorded only where another one
    beats it by more than a twentieth.

    Yields:
        Per case: ``case``, ``shape``, ``seconds`` by block size (``"default"`` for none), ``best``.
    """
    operator = OPERATORS[OPERATOR]
    measure = "process_cpu_s" if jax.default_backend() == "cpu" else "wall_s"
    for name, case in (operator.quick if quick else operator.cases).items():
        arrays = operator.arguments(case)
        ladder = [size for size in (1 << power for power in range(2, 13)) if size < 2 * case.inputs]
        if quick:
            ladder = ladder[::3]
        runs: dict[str, Callable[[], Any]] = {}
        with cold_compilation():
            for size in (None, *ladder):
                function = operator.function(case, IMPLEMENTATION, gradient=True, block_size=size)
                compiled = compile_timed(function, *arrays)
                run = functools.partial(compiled.call, *arrays)
                jax.block_until_ready(run())
                runs[str(size or "default")] = functools.partial(run_timed, run)
            times = alternate(runs, budget_s=0.5 if quick else 25.0, most=7)
        seconds = {size: taken[measure]["median"] for size, taken in times.items()}
        best = min(seconds, key=seconds.__getitem__)
        if seconds[best] > 0.95 * seconds["default"]:
            best = "default"
        path = None
        if best != "default":
            shape = (case.batch, case.inputs, case.depth, case.capsules, case.dim)
            path = block_sizes.record(
                OPERATOR, IMPLEMENTATION, shape=shape, dtype=arrays[0].dtype, block_size=int(best)
            )
        say(f"{OPERATOR}, {name}: {best}" + (f", recorded in {path}" if path else ""))
        yield {"case": name, "shape": case._asdict(), "seconds": seconds, "best": best}
