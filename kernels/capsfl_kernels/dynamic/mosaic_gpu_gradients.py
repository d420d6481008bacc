"""The kernel of one iteration's gradients on a Hopper GPU."""

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
    load_global,
    multiply_transposed,
    piece,
    plane,
    project,
    read_component,
    rows,
    store_parts,
    tiled,
    with_transposed,
)

# Columns of one product: the rows of the gradient of W come in the 64 that a tensor core product has.
_WIDTH = 64


def gradient_scratch(plan: Plan, dtype: jnp.dtype) -> dict[str, Any]:
    """Shared memory of `gradient_kernel` by parameter name."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return {
        "u_smem": tiled((1, plan.depth * ROWS, COLUMNS), dtype),
        "w_smem": tiled((plan.gradient_slots, plan.parts * plan.dim, plan.columns)),
        "v_smem": tiled((plan.gradient_slots, plan.parts * ROWS, plan.dim)),
        "g_smem": tiled((plan.gradient_slots, plan.parts * ROWS, plan.dim)),
        "coupled_smem": tiled((plan.parts, ROWS, _WIDTH)),
        "weighted_smem": tiled((plan.parts if plan.full else 0, ROWS, _WIDTH)),
        "peak_smem": tiled((ROWS, COLUMNS), jnp.float32),
        "total_smem": tiled((ROWS, COLUMNS), jnp.float32),
        "mean_smem": tiled((ROWS, COLUMNS), jnp.float32),
        "u_barrier": plgpu.Barrier(),
        "barriers": plgpu.Barrier(num_arrivals=3, num_barriers=plan.gradient_slots),
    }


def gradient_kernel(
    plan: Plan,
    emulated: bool,
    u_ref: Any,
    w_ref: Any,
    v_ref: Any,
    g_ref: Any,
    grad_u_ref: Any,
    grad_w_ref: Any,
    *grad_v_ref: Any,
    u_smem: Any,
    w_smem: Any,
    v_smem: Any,
    g_smem: Any,
    coupled_smem: Any,
    weighted_smem: Any,
    peak_smem: Any,
    total_smem: Any,
    mean_smem: Any,
    u_barrier: Any,
    barriers: Any,
) -> None:
    """Gradients of one block of inputs from a group of tiles of the batch, one tile after the other.

    The first run over the capsules finds the softmax and the mean ``Σ_m c_m g_m`` of the agreements ``g_m = û_m ·
    G_m``, the second forms ``c`` and ``g^b = c (g − mean)`` and from them every gradient. It projects again for the
    gradient of u, since projections of all columns would not fit a thread's registers beside that gradient.

    Registers of a thread at D = 8 and K = 16: 64 for the gradient of u, 32 for a projection of 64 columns, 8 each for
    the logits, the agreements, c, g^b and the gradients of W and V. ptxas 12.9 fills all 255 and its stack
    frame for spills is 64 to 104 bytes for bfloat16 and 688 for float32; more components than 8 add to that.

    Args:
        plan: Sizes.
        emulated: Whether JAX's emulator runs this.
        u_ref: Inputs (tiles, blocks, D · 64, 16).
        w_ref: Weights (blocks, M, parts · K, D · 16), bfloat16.
        v_ref: Directions V (tiles, M, parts · 64, K), bfloat16.
        g_ref: Gradients G of the sums, as the directions.
        grad_u_ref: Gradients of inputs (tiles, blocks, D, 64, 16), float32.
        grad_w_ref: Gradients of weights (groups, blocks, M, D · 16, K), float32.
        *grad_v_ref: Gradients of directions (blocks, tiles, M, 64, K), float32; none unless `plan.full`.
        u_smem: Inputs of the tile.
        w_smem: Ring of weights.
        v_smem: Ring of directions.
        g_smem: Ring of gradients of the sums.
        coupled_smem: Inputs times c.
        weighted_smem: Inputs times g^b.
        peak_smem: Largest logit so far; then the logarithm of the softmax's denominator.
        total_smem: Softmax's denominator so far, relative to the peak.
        mean_smem: Sum of agreements so far, relative to the peak; then their mean.
        u_barrier: Arrival of the inputs.
        barriers: Arrival of the ring's slots.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    block, group = lax.axis_index("block"), lax.axis_index("group")
    steps = plan.capsules

    def copies(step: Any, slot: Any) -> tuple:
        m = lax.rem(step, jnp.int32(steps))
        tile = group * plan.group + lax.div(step, jnp.int32(2 * steps))
        return (
            (w_ref.at[block, m], w_smem.at[slot]),
            (v_ref.at[tile, m], v_smem.at[slot]),
            (g_ref.at[tile, m], g_smem.at[slot]),
        )

    resident = plan.gradient_slots == steps and plan.group == 1
    ring = Ring(copies, barriers, plan.gradient_slots, steps if resident else 2 * steps * plan.group)
    directions = (v_smem, g_smem) if plan.full else (v_smem,)

    def agree(slot: Any) -> list[jax.Array]:
        """Logits (64, 16) of one capsule, and for the full gradient its agreements with G."""
        sums = [plane(0) for _ in directions]
        for start in range(0, plan.columns, _WIDTH):
            for index, direction in enumerate(directions):
                projected = project(plan, slot, start, _WIDTH, w_smem, direction)
                for offset in range(0, _WIDTH, COLUMNS):
                    u = read_component(u_smem, 0, (start + offset) // COLUMNS)
                    sums[index] += piece(projected, offset) * u
        return sums

    def measure(step: Any) -> None:
        logits, *agreement = agree(ring.wait(step))
        old = peak_smem[...]
        peak = jnp.maximum(old, logits)
        rescale, raised = jnp.exp(old - peak), jnp.exp(logits - peak)
        total_smem[...] = total_smem[...] * rescale + raised
        for value in agreement:
            mean_smem[...] = mean_smem[...] * rescale + raised * value
        peak_smem[...] = peak
        ring.advance(step)

    def add_weights(m: Any, start: int, grad: jax.Array, first: Any) -> None:
        ref = grad_w_ref.at[group, block, m, rows(start // _WIDTH, _WIDTH), :]
        if plan.group == 1:
            ref[...] = grad
            return

        @pl.when(first)
        def _():
            ref[...] = grad

        @pl.when(jnp.logical_not(first))
        def _():
            # This very thread wrote what it reads back, so nothing has to be waited for.
            ref[...] = load_global(ref, emulated) + grad

    def spread(tile: Any, m: Any, step: Any, first: Any, grad_u: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slot = ring.wait(step)
        logits, *agreement = agree(slot)
        coupling = jnp.exp(logits - peak_smem[...])
        grad_logits = [coupling * (value - mean_smem[...]) for value in agreement]

        def over_pieces(*grad_v: Any) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
            grads = list(grad_u)
            for start in range(0, plan.columns, _WIDTH):
                weigh(start, grads)
                add_weights(m, start, multiply(start, *grad_v), first)
            return tuple(grads), tuple(accumulator[...] for accumulator in grad_v)

        def weigh(start: int, grads: list[jax.Array]) -> None:
            """Adds what this capsule gives to the gradient of u, and stores c u and g^b u for the products."""
            factors = [(coupling, g_smem, coupled_smem), *((value, v_smem, weighted_smem) for value in grad_logits)]
            for factor, direction, smem in factors:
                projected = project(plan, slot, start, _WIDTH, w_smem, direction)
                for offset in range(0, _WIDTH, COLUMNS):
                    d = (start + offset) // COLUMNS
                    grads[d] = grads[d] + factor * piece(projected, offset)
                    store_parts(smem, offset, factor * read_component(u_smem, 0, d))
            plgpu.commit_smem()

        def multiply(start: int, *grad_v: Any) -> jax.Array:
            """The gradient of W from this tile, (64, K); adds to that of V."""

            def body(grad_w: Any) -> jax.Array:
                for i, j in PRODUCTS[plan.parts]:
                    _add_outer(grad_w, coupled_smem.at[i], g_smem.at[slot, rows(j, ROWS), :], emulated)
                    for accumulator in grad_v:
                        _add_outer(grad_w, weighted_smem.at[i], v_smem.at[slot, rows(j, ROWS), :], emulated)
                        weights = w_smem.at[slot, rows(j, plan.dim), rows(start // _WIDTH, _WIDTH)]
                        multiply_transposed(accumulator, weighted_smem.at[i], weights, emulated)
                return grad_w[...]

            grad_w = accumulate(body, (_WIDTH, plan.dim))
            plgpu.commit_smem()
            return grad_w

        grads, grad_v = accumulate(over_pieces, *[(ROWS, plan.dim)] * len(grad_v_ref))
        for ref, value in zip(grad_v_ref, grad_v, strict=True):
            ref[block, tile, m] = value
        ring.advance(step)
        return grads

    ring.prime()

    def differentiate_tile(index: Any, carry: None) -> None:
        tile = group * plan.group + index
        before = 2 * steps * index
        plgpu.copy_gmem_to_smem(u_ref.at[tile, block], u_smem.at[0], u_barrier)
        peak_smem[...] = plane(0 if plan.leaky else LOWEST)
        total_smem[...] = plane(1 if plan.leaky else 0)
        mean_smem[...] = plane(0)
        plgpu.barrier_wait(u_barrier)
        lax.fori_loop(0, steps, lambda m, _: measure(before + m), None)
        mean_smem[...] = mean_smem[...] / total_smem[...]
        peak_smem[...] = peak_smem[...] + jnp.log(total_smem[...])
        grad_u = lax.fori_loop(
            0,
            steps,
            lambda m, grads: spread(tile, m, before + steps + m, index == 0, grads),
            tuple(plane(0) for _ in range(plan.depth)),
        )
        for d, value in enumerate(grad_u):
            grad_u_ref[tile, block, d] = value
        return carry

    lax.fori_loop(0, plan.group, differentiate_tile, None)


def _add_outer(accumulator: Any, a: Any, b: Any, emulated: bool) -> None:
    """Starts ``accumulator += aᵀ b``: both have the examples in rows."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with_transposed(a, emulated, lambda turned: plgpu.wgmma(accumulator, turned, b))
