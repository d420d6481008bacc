"""Fully connected capsules that never form a vote, forward or backward.

The logit of input i for output j is ``û_ij · V_j = u_i · (W_ijᵀ V_j)`` with V the sum of the outputs so far.
So an iteration is one pass over blocks of inputs: ``P = Wᵀ V``, ``b = P · u``, ``c = softmax(b)``, ``s += W
(c u)``, as FlashAttention does for attention, and its state is (M, K, batch) whatever N is. The backward pass
repeats the passes from the stored s and V of each iteration, and all of them add to one gradient of the inputs
and one of the weights, in place. The batch lies on the minor axis: all small axes (M, D) are then summed as
whole vectors, and the products of a block are matrix products over (block · D, K, batch).
"""

import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import common_variation
from capsfl_kernels.dynamic import iterations
from capsfl_kernels.sums import sum_mapped
from capsfl_kernels.votes.tile import Routing


class Blocks(NamedTuple):
    """Inputs (blocks, block, D, batch) and weights (blocks, M, block · D, K), padded with zeros; or gradients."""

    inputs: jax.Array
    weights: jax.Array


class Streaming(NamedTuple):
    """The passes as loops over blocks: the routing, inputs in one block, precision of the products."""

    routing: Routing
    block_size: int
    precision: lax.PrecisionLike

    def arrange(self, inputs: jax.Array, weights: jax.Array) -> Blocks:
        """Cuts into blocks; capsules of zero fill the last one, they couple but add nothing."""
        batch, number, depth = inputs.shape
        _, capsules, dim, _ = weights.shape
        count = -(-number // self.block_size)
        padding = (0, count * self.block_size - number)
        inputs = jnp.pad(inputs, ((0, 0), padding, (0, 0)))
        weights = jnp.pad(weights, (padding, (0, 0), (0, 0), (0, 0)))
        return Blocks(
            inputs.transpose(1, 2, 0).reshape(count, self.block_size, depth, batch),
            weights.reshape(count, self.block_size, capsules, dim, depth)
            .transpose(0, 2, 1, 4, 3)
            .reshape(count, capsules, self.block_size * depth, dim),
        )

    def sum_votes(self, arranged: Blocks, direction: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
        """The coupled sum of votes, (batch, M, K), under the logits of V, (batch, M, K), or all alike."""
        count, capsules, _, dim = arranged.weights.shape
        v = None if direction is None else _batch_last(direction)

        def step(index: jax.Array, total: jax.Array) -> jax.Array:
            u, w = _take(arranged, index, dtype)
            coupling = self._couple(None if v is None else self._project(w, v, u), u, w)
            return total + self._product("mxk,mxb->mkb", w, _weigh(coupling, u, w), dtype)

        zero = jnp.zeros((capsules, dim, arranged.inputs.shape[3]), dtype)
        total = lax.fori_loop(0, count, step, common_variation(arranged.inputs, zero)[1])
        return total.transpose(2, 0, 1)

    def differentiate(
        self, arranged: Blocks, direction: jax.Array | None, grad_sum: jax.Array, grads: Blocks | None
    ) -> tuple[jax.Array | None, Blocks]:
        """The gradient of V, (batch, M, K), and `grads` with those of the blocks added."""
        dtype = grad_sum.dtype
        g = _batch_last(grad_sum)
        v = None if direction is None else _batch_last(direction)
        constant = direction is None or self.routing.gradient == "last"
        if grads is None:
            grads = Blocks(*(jnp.zeros_like(array, dtype=dtype) for array in arranged))

        def step(index: jax.Array, state: tuple[jax.Array, Blocks]) -> tuple[jax.Array, Blocks]:
            grad_v, total = state
            u, w = _take(arranged, index, dtype)
            projected = None if v is None else self._project(w, v, u)
            grad_projected = self._project(w, g, u)
            coupling = self._couple(projected, u, w)
            factors = [coupling, grad_projected]
            grad_w = self._outer(_weigh(coupling, u, w), g)
            if v is not None and projected is not None and not constant:
                grad_logits = _softmax_vjp(coupling, _agree(grad_projected, u))
                factors += [grad_logits, projected]
                weighted = _weigh(grad_logits, u, w)
                grad_w += self._outer(weighted, v)
                grad_v += self._product("mxk,mxb->mkb", w, weighted, dtype)
            grad_u = sum_mapped(_weigh_both, (0,) * len(factors), *factors)
            return grad_v, Blocks(total.inputs.at[index].add(grad_u), total.weights.at[index].add(grad_w))

        grad_v, total = lax.fori_loop(0, arranged.inputs.shape[0], step, (jnp.zeros_like(g), grads))
        return None if constant else grad_v.transpose(2, 0, 1), total

    def restore(self, grads: Blocks, inputs: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gradients of the blocks in the shapes of inputs and weights."""
        batch, number, depth = inputs.shape
        _, capsules, dim, _ = weights.shape
        parts = grads.weights.reshape(-1, capsules, self.block_size, depth, dim).transpose(0, 2, 1, 4, 3)
        return (
            grads.inputs.reshape(-1, depth, batch)[:number].transpose(2, 0, 1),
            parts.reshape(-1, capsules, dim, depth)[:number],
        )

    def _couple(self, projected: jax.Array | None, u: jax.Array, w: jax.Array) -> jax.Array:
        """Couplings (M, block, batch) from Wᵀ V; all 1 without it, which XLA then never multiplies by."""
        if projected is None:
            return jnp.ones((w.shape[0], u.shape[0], u.shape[2]), u.dtype)
        return _softmax(_agree(projected, u), self.routing.leaky)

    def _project(self, w: jax.Array, state: jax.Array, u: jax.Array) -> jax.Array:
        """Wᵀ V for one block: (M, block, D, batch)."""
        flat = self._product("mxk,mkb->mxb", w, state.astype(w.dtype), state.dtype)
        return flat.reshape(state.shape[0], *u.shape)

    def _outer(self, weighted: jax.Array, state: jax.Array) -> jax.Array:
        """Gradient of W in ``Σ_j state_j · W_j (c_j u)`` from the ``c_j u``: (M, block · D, K)."""
        return self._product("mxb,mkb->mxk", weighted, state.astype(weighted.dtype), state.dtype)

    def _product(self, axes: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return jnp.einsum(axes, a, b, precision=self.precision, preferred_element_type=dtype)


def route(inputs: jax.Array, weights: jax.Array, bias: jax.Array, streaming: Streaming) -> jax.Array:
    """Routes inputs (batch, N, D) through weights (N, M, K, D) to (batch, M, K) in the dtype of the bias."""
    return iterations.route_accumulating(inputs, weights, bias, streaming.routing, streaming)


def _batch_last(state: jax.Array) -> jax.Array:
    return state.transpose(1, 2, 0)


def _take(blocks: Blocks, index: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """One block: inputs (block, D, batch) in the accumulation dtype, weights (M, block · D, K) in their own."""
    return blocks.inputs[index].astype(dtype), blocks.weights[index]


def _softmax(logits: jax.Array, leaky: bool) -> jax.Array:
    """Over the capsules on axis 0; a leaky one adds a capsule of logit zero that receives nothing."""
    peak = jnp.max(logits, axis=0, keepdims=True)
    peak = jnp.maximum(peak, 0) if leaky else peak
    raised = jnp.exp(logits - peak)
    total = jnp.sum(raised, axis=0, keepdims=True)
    total = total + jnp.exp(-peak) if leaky else total
    return raised * (1 / total)


def _softmax_vjp(coupling: jax.Array, grad: jax.Array) -> jax.Array:
    """Gradient of the logits of `_softmax`; it is the same one with and without the leak."""
    weighted = coupling * grad
    return weighted - coupling * jnp.sum(weighted, axis=0, keepdims=True)


def _weigh(coupling: jax.Array, u: jax.Array, w: jax.Array) -> jax.Array:
    """Coupling (M, block, batch) times inputs (block, D, batch), as (M, block · D, batch) in the weights' dtype."""
    weighted = coupling[:, :, None] * u[None]
    return weighted.reshape(w.shape[0], w.shape[1], -1).astype(w.dtype)


def _agree(projected: jax.Array, u: jax.Array) -> jax.Array:
    """P · u summed over D: (M, block, batch) from (M, block, D, batch) and (block, D, batch)."""
    return sum_mapped(lambda p, component: p * component[None], (2, 1), projected, u)


def _weigh_both(*factors: jax.Array) -> jax.Array:
    """For one capsule, what reaches u: weights (block, batch) times vectors (block, D, batch), pair by pair."""
    weighted = [weight[:, None] * vector for weight, vector in zip(factors[::2], factors[1::2], strict=True)]
    return functools.reduce(operator.add, weighted)
