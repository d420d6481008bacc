"""One training step of the whole SegCaps R3 with its reconstruction head, stored votes against streamed."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capsfl.bench.machine import available_memory_bytes, describe
from capsfl.bench.measuring import alternate, cold_compilation, compile_timed, ratio, run_timed
from capsfl.bench.parallel import compare_forms
from capsfl.learning.losses import segmentation_loss
from capsfl.models.segcaps import SegCaps, SegCapsConfig

IMPLEMENTATIONS = ("reference", "streamed")


@dataclass(frozen=True)
class SegCapsBench:
    """One training step of SegCaps R3 at 128, 256 and 512 pixels; data-parallel forms."""

    quick: bool = False
    """A narrow network on small images: seconds instead of minutes."""
    devices: tuple[int, ...] = (1, 2, 4)
    """Numbers of devices, of 1, 2 and 4, to compare the data-parallel forms on; none leaves them out."""


def measure(options: SegCapsBench, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures loss and gradient of one image at every size, then compares the parallel forms.

    Returns:
        The result, JSON-ready: machine, rows by size and implementation, ratios, parallel forms, and what was
        skipped and why.
    """
    for count in options.devices:
        if count not in (1, 2, 4):
            raise ValueError(f"devices = {count}: must be 1, 2 or 4, for four slices share them")
    config = SegCapsConfig(width=0.25) if options.quick else SegCapsConfig.r3()
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    with cold_compilation():
        for size in (16,) if options.quick else (128, 256, 512):
            rows += _measure_size(config, size, skipped)
            say(f"segcaps, {size} x {size}")
    parallel = compare_forms(options.devices)
    say("segcaps, data-parallel forms")
    return {
        "benchmark": "segcaps",
        "quick": options.quick,
        "machine": describe(),
        "config": config.model_dump(),
        "rows": rows,
        "against_stored_votes": _against_stored_votes(rows),
        "parallel": parallel,
        "skipped": skipped,
    }


def _measure_size(config: SegCapsConfig, size: int, skipped: list[dict[str, str]]) -> list[dict[str, Any]]:
    images, truth = example(size)

    facts: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    expected = None
    for implementation in IMPLEMENTATIONS:
        graph, parameters = nnx.split(SegCaps(config, implementation=implementation, rngs=nnx.Rngs(0)))
        step = jax.value_and_grad(functools.partial(_loss, graph))
        compiled = compile_timed(step, parameters, images, truth)
        facts[implementation] = compiled.facts
        needed = compiled.facts["temporary_bytes"] or 0
        if jax.default_backend() == "cpu" and needed > 0.8 * available_memory_bytes():
            reason = f"needs {needed / 2**30:.1f} GiB, which is not free here; its memory alone is reported"
            skipped.append({"size": str(size), "implementation": implementation, "reason": reason})
            continue
        value, gradient = jax.block_until_ready(compiled.call(parameters, images, truth))
        expected = gradient if expected is None else expected
        facts[implementation]["loss"] = float(value)
        facts[implementation]["gradient_difference"] = largest_difference(gradient, expected)
        runs[implementation] = functools.partial(run_timed, functools.partial(compiled.call, parameters, images, truth))
    # A step at 512 x 512 takes the better part of a minute with stored votes: two rounds must do.
    times = alternate(runs, budget_s=20, least=2, most=7)
    untimed = {"runs": 0, "wall_s": None, "process_cpu_s": None}
    return [{"size": size, "implementation": name, **times.get(name, untimed), **told} for name, told in facts.items()]


def _loss(graph: Any, parameters: Any, images: jax.Array, truth: jax.Array) -> jax.Array:
    return segmentation_loss(nnx.merge(graph, parameters)(images, truth), images, truth)


def example(size: int) -> tuple[jax.Array, jax.Array]:
    """One noisy image (1, size, size, 1) with a brighter disc in it, and the disc (1, size, size)."""
    rows, columns = np.mgrid[:size, :size] - size / 2
    disc = (rows**2 + columns**2 < (size / 4) ** 2).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, 0.1, (size, size)).astype(np.float32)
    image = np.clip(0.5 * disc - 0.25 + noise, -0.5, 0.5)
    return jnp.asarray(image[None, :, :, None]), jnp.asarray(disc[None])


def largest_difference(gradient: Any, expected: Any) -> float:
    """Over all arrays of a gradient, the largest difference from the expected relative to its norm."""
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True)
    return max(float(np.linalg.norm(np.asarray(a - b)) / (np.linalg.norm(np.asarray(b)) or 1)) for a, b in pairs)


def _against_stored_votes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    stored = {row["size"]: row for row in rows if row["implementation"] == IMPLEMENTATIONS[0]}
    ratios = []
    for row in rows:
        base = stored[row["size"]]
        if row is base:
            continue
        ratios.append(
            {
                "size": row["size"],
                "implementation": row["implementation"],
                "process_cpu": ratio(row["process_cpu_s"], base["process_cpu_s"]),
                "wall": ratio(row["wall_s"], base["wall_s"]),
                "temporary": row["temporary_bytes"] / base["temporary_bytes"] if base["temporary_bytes"] else None,
            }
        )
    return ratios
