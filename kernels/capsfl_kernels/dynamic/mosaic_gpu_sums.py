"""The kernel of one iteration's sums on a Hopper GPU."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.dynamic.bfloat16 import PRODUCTS
from capsfl_kernels.dynamic.warpgroup import (
    COLUMNS,
    LOWEST,
    ROWS,
    Plan,
    Ring,
    accumulate,
    multiply_transposed,
    piece,
    plane,
    project,
    read_component,
    rows,
    store_parts,
    tiled,
)


def sum_scratch(plan: Plan, dtype: jnp.dtype) -> dict[str, Any]:
    """Shared memory of `sum_kernel` by parameter name."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return {
        "u_smem": tiled((plan.reach, plan.depth * ROWS, COLUMNS), dtype),
        "w_smem": tiled((plan.sum_slots, plan.parts * plan.dim, plan.columns)),
        "v_smem": tiled((plan.sum_slots, plan.parts * ROWS, plan.dim)),
        "coupled_smem": tiled((plan.parts, ROWS, plan.width)),
        "peak_smem": tiled((plan.reach, ROWS, COLUMNS), jnp.float32),
        "total_smem": tiled((plan.reach, ROWS, COLUMNS), jnp.float32),
        "u_barrier": plgpu.Barrier(num_arrivals=plan.reach),
        "barriers": plgpu.Barrier(num_arrivals=2, num_barriers=plan.sum_slots),
    }


def sum_kernel(
    plan: Plan,
    emulated: bool,
    u_ref: Any,
    w_ref: Any,
    v_ref: Any,
    s_ref: Any,
    *,
    u_smem: Any,
    w_smem: Any,
    v_smem: Any,
    coupled_smem: Any,
    peak_smem: Any,
    total_smem: Any,
    u_barrier: Any,
    barriers: Any,
) -> None:
    """Sums of the coupled votes of `reach` blocks of inputs for one tile of the batch.

    Registers of a thread at D = 8 and K = 16: 64 for the inputs of a single block, 32 or 64 for the projection, 8 each
    for the logits and the sums; ptxas 12.9 arrives at 150 for bfloat16 and 164 for float32 and spills none, so two
    thread blocks share a processor wherever their shared memory does.

    Args:
        plan: Sizes.
        emulated: Whether JAX's emulator runs this.
        u_ref: Inputs (tiles, blocks, D · 64, 16).
        w_ref: Weights (blocks, M, parts · K, D · 16), bfloat16.
        v_ref: Directions V (tiles, M, parts · 64, K), bfloat16.
        s_ref: Sums (blocks / reach, tiles, M, 64, K), float32.
        u_smem: Inputs of the tile.
        w_smem: Ring of weights.
        v_smem: Ring of directions.
        coupled_smem: Inputs times couplings.
        peak_smem: Largest logit so far; then the logarithm of the softmax's denominator.
        total_smem: Softmax's denominator so far, relative to the peak.
        u_barrier: Arrival of the inputs.
        barriers: Arrival of the ring's slots.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tile, reach = lax.axis_index("tile"), lax.axis_index("reach")
    steps = plan.capsules * plan.reach
    products = PRODUCTS[plan.parts]

    def copies(step: Any, slot: Any) -> tuple:
        within = lax.rem(step, jnp.int32(steps))
        m, block = lax.div(within, jnp.int32(plan.reach)), lax.rem(within, jnp.int32(plan.reach))
        return (
            (w_ref.at[reach * plan.reach + block, m], w_smem.at[slot]),
            (v_ref.at[tile, m], v_smem.at[slot]),
        )

    ring = Ring(copies, barriers, plan.sum_slots, steps if plan.sum_slots == steps else 2 * steps)
    for block in range(plan.reach):
        plgpu.copy_gmem_to_smem(u_ref.at[tile, reach * plan.reach + block], u_smem.at[block], u_barrier)
    ring.prime()
    for block in range(plan.reach):
        peak_smem[block] = plane(0 if plan.leaky else LOWEST)
        total_smem[block] = plane(1 if plan.leaky else 0)
    plgpu.barrier_wait(u_barrier)
    # One block's inputs stay in registers; more are read again every time.
    held = [read_component(u_smem, 0, d) for d in range(plan.depth)] if plan.reach == 1 and plan.depth <= 8 else None

    def component(block: Any, d: int) -> jax.Array:
        return read_component(u_smem, block, d) if held is None else held[d]

    def agree(slot: Any, block: Any) -> jax.Array:
        """Logits (64, 16) of one capsule and block."""
        logits = plane(0)
        for start in range(0, plan.columns, plan.width):
            projected = project(plan, slot, start, plan.width, w_smem, v_smem)
            for offset in range(0, plan.width, COLUMNS):
                logits += piece(projected, offset) * component(block, (start + offset) // COLUMNS)
        return logits

    def measure(step: Any, carry: None) -> None:
        slot, block = ring.wait(step), lax.rem(step, jnp.int32(plan.reach))
        logits = agree(slot, block)
        old = peak_smem[block]
        peak = jnp.maximum(old, logits)
        total_smem[block] = total_smem[block] * jnp.exp(old - peak) + jnp.exp(logits - peak)
        peak_smem[block] = peak
        ring.advance(step)
        return carry

    lax.fori_loop(0, steps, measure, None)
    for block in range(plan.reach):
        peak_smem[block] = peak_smem[block] + jnp.log(total_smem[block])

    def gather(m: Any, carry: None) -> None:
        def add_blocks(sums: Any) -> jax.Array:
            def add(block: Any, carry: None) -> None:
                step = steps + m * plan.reach + block
                slot = ring.wait(step)
                coupling = jnp.exp(agree(slot, block) - peak_smem[block])
                for start in range(0, plan.columns, plan.width):
                    for offset in range(0, plan.width, COLUMNS):
                        weighted = coupling * component(block, (start + offset) // COLUMNS)
                        store_parts(coupled_smem, offset, weighted)
                    plgpu.commit_smem()
                    for i, j in products:
                        weights = w_smem.at[slot, rows(j, plan.dim), rows(start // plan.width, plan.width)]
                        multiply_transposed(sums, coupled_smem.at[i], weights, emulated)
                    plgpu.wgmma_wait(0)
                    if start + plan.width < plan.columns:
                        plgpu.commit_smem()
                ring.advance(step)
                return carry

            lax.fori_loop(0, plan.reach, add, None)
            return sums[...]

        s_ref[reach, tile, m] = accumulate(add_blocks, (ROWS, plan.dim))
        return carry

    lax.fori_loop(0, plan.capsules, gather, None)
