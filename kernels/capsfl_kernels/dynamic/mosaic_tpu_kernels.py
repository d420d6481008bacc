"""What one block of inputs and one tile of the batch do in the TPU kernels of routing.

The batch lies on the 128 lanes. The components of a block of n inputs lie d-major (component d of input i in row
d · n + i), so that the sum over D that makes a logit adds whole vectors and a coupling multiplies whole vectors;
the only reductions across sublanes are inside the matrix unit. Per output capsule m a block runs

    P = W_mᵀ V_m,  b_m = Σ_d P · u        and, once all b_m gave the couplings c,        s_m += W_m (c_m u),

and nothing of size (N, M, batch) leaves VMEM: logits exist for one block of inputs and 128 examples at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.votes.tile import Routing

LANES = 128


class Plan(NamedTuple):
    """How arrays are cut: sizes after padding, and how many of each."""

    capsules: int
    dim: int  # rounded up to whole sublane tiles
    depth: int
    block: int  # input capsules in a block
    blocks: int  # of one split
    splits: int
    tiles: int  # of 128 examples, in one group
    groups: int

    @property
    def rows(self) -> int:
        """Components of one block of inputs."""
        return self.block * self.depth


def sum_kernel(
    routing: Routing,
    precision: lax.Precision,
    plan: Plan,
    u_ref: Any,
    w_ref: Any,
    v_ref: Any,
    s_ref: Any,
    c_ref: Any,
) -> None:
    """Adds the coupled votes of one block and tile to the sums.

    Args:
        routing: Iterations, leak and gradient mode.
        precision: Of the products.
        plan: Sizes.
        u_ref: Inputs (1, 1, D · n, 128).
        w_ref: Weights (1, M, K, D · n).
        v_ref: Directions V (tiles, M, K, 128), float32.
        s_ref: Sums (1, tiles, M, K, 128), float32, kept over the blocks of a split.
        c_ref: Scratch (M, n, 128), float32: logits, then couplings.
    """
    from jax.experimental import pallas as pl

    tile = pl.program_id(3)
    u = _unfold(u_ref[0, 0], plan)

    @pl.when(pl.program_id(2) == 0)
    def _():
        s_ref[0, tile] = jnp.zeros_like(s_ref[0, tile])

    def agree(m: Any, peak: jax.Array) -> jax.Array:
        projected = _unfold(_transposed_product(w_ref[0, m], v_ref[tile, m], precision), plan)
        logits = jnp.sum(projected * u, axis=0)
        c_ref[m] = logits
        return jnp.maximum(peak, logits)

    scale = _couple(c_ref, _over_capsules(plan, agree, _lowest(plan, routing.leaky)), plan, routing.leaky)

    def gather(m: Any, carry: Any) -> Any:
        coupled = _fold((c_ref[m] * scale)[None] * u, plan)
        s_ref[0, tile, m] += _dot(w_ref[0, m], coupled.astype(w_ref.dtype), (1, 0), precision)
        return carry

    _over_capsules(plan, gather, 0)


def gradient_kernel(
    routing: Routing,
    precision: lax.Precision,
    plan: Plan,
    u_ref: Any,
    w_ref: Any,
    v_ref: Any,
    g_ref: Any,
    grad_u_ref: Any,
    grad_w_ref: Any,
    *rest: Any,
) -> None:
    """Gradients of one block and tile; those of weights and directions add up over the grid.

    Args:
        routing: Iterations, leak and gradient mode.
        precision: Of the products.
        plan: Sizes.
        u_ref: Inputs (1, 1, D · n, 128).
        w_ref: Weights (1, M, K, D · n).
        v_ref: Directions V (tiles, M, K, 128), float32.
        g_ref: Gradients of the sums, as the directions.
        grad_u_ref: Gradients of inputs (1, 1, D · n, 128), float32.
        grad_w_ref: Gradients of weights (1, 1, M, K, D · n), float32, kept over the tiles of a group.
        *rest: For the full gradient that of the directions (1, tiles, M, K, 128), kept over the blocks of a split;
            then two scratches (M, n, 128) for couplings and for agreements with the gradients of the sums.
    """
    from jax.experimental import pallas as pl

    *grad_v, c_ref, agreement_ref = rest
    tile = pl.program_id(3)
    dtype = w_ref.dtype
    u = _unfold(u_ref[0, 0], plan)

    @pl.when(tile == 0)
    def _():
        grad_w_ref[...] = jnp.zeros_like(grad_w_ref)

    for grad_v_ref in grad_v:

        @pl.when(pl.program_id(2) == 0)
        def _(grad_v_ref=grad_v_ref):
            grad_v_ref[0, tile] = jnp.zeros_like(grad_v_ref[0, tile])

    def agree(m: Any, peak: jax.Array) -> jax.Array:
        logits = jnp.sum(_unfold(_transposed_product(w_ref[0, m], v_ref[tile, m], precision), plan) * u, axis=0)
        c_ref[m] = logits
        if grad_v:
            projected = _unfold(_transposed_product(w_ref[0, m], g_ref[tile, m], precision), plan)
            agreement_ref[m] = jnp.sum(projected * u, axis=0)
        return jnp.maximum(peak, logits)

    scale = _couple(c_ref, _over_capsules(plan, agree, _lowest(plan, routing.leaky)), plan, routing.leaky)

    def weigh(m: Any, total: jax.Array) -> jax.Array:
        coupling = c_ref[m] * scale
        c_ref[m] = coupling
        return total + coupling * agreement_ref[m] if grad_v else total

    mean = _over_capsules(plan, weigh, jnp.zeros((plan.block, LANES), jnp.float32))

    def spread(m: Any, grad_u: jax.Array) -> jax.Array:
        coupling = c_ref[m][None]
        coupled = _fold(coupling * u, plan).astype(dtype)
        grad_u += coupling * _unfold(_transposed_product(w_ref[0, m], g_ref[tile, m], precision), plan)
        grad_w = _dot(g_ref[tile, m].astype(dtype), coupled, (1, 1), precision)
        for grad_v_ref in grad_v:
            grad_logits = coupling * (agreement_ref[m] - mean)[None]
            weighted = _fold(grad_logits * u, plan).astype(dtype)
            grad_u += grad_logits * _unfold(_transposed_product(w_ref[0, m], v_ref[tile, m], precision), plan)
            grad_w += _dot(v_ref[tile, m].astype(dtype), weighted, (1, 1), precision)
            grad_v_ref[0, tile, m] += _dot(w_ref[0, m], weighted, (1, 0), precision)
        grad_w_ref[0, 0, m] += grad_w
        return grad_u

    grad_u = _over_capsules(plan, spread, jnp.zeros((plan.depth, plan.block, LANES), jnp.float32))
    grad_u_ref[0, 0] = _fold(grad_u, plan)


def _couple(c_ref: Any, peak: jax.Array, plan: Plan, leaky: bool) -> jax.Array:
    """Turns the logits in `c_ref` into couplings up to the factor (block, 128) that it returns."""

    def raise_(m: Any, total: jax.Array) -> jax.Array:
        raised = jnp.exp(c_ref[m] - peak)
        c_ref[m] = raised
        return total + raised

    total = jnp.exp(-peak) if leaky else jnp.zeros_like(peak)
    return 1 / _over_capsules(plan, raise_, total)


def _lowest(plan: Plan, leaky: bool) -> jax.Array:
    """Where the largest logit starts: the leak's is zero."""
    return jnp.full((plan.block, LANES), 0 if leaky else -jnp.inf, jnp.float32)


def _over_capsules(plan: Plan, body: Callable[[Any, Any], Any], init: Any) -> Any:
    # A few capsules unroll into straight code whose products overlap; many would only make it long.
    return lax.fori_loop(0, plan.capsules, body, init, unroll=plan.capsules <= 16)


def _unfold(rows: jax.Array, plan: Plan) -> jax.Array:
    """(D · n, 128) to float32 (D, n, 128); n is whole sublane tiles, so no data moves."""
    return rows.astype(jnp.float32).reshape(plan.depth, plan.block, LANES)


def _fold(planes: jax.Array, plan: Plan) -> jax.Array:
    return planes.reshape(plan.rows, LANES)


def _transposed_product(w: jax.Array, v: jax.Array, precision: lax.Precision) -> jax.Array:
    """Wᵀ V: weights (K, D · n) and state (K, 128) to (D · n, 128)."""
    return _dot(w, v.astype(w.dtype), (0, 0), precision)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], precision: lax.Precision) -> jax.Array:
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)
