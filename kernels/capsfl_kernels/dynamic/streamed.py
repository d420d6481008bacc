"""Fully connected capsules that never form a vote, forward or backward.

The logit of input i for output j is ``û_ij · V_j = u_i · (W_ijᵀ V_j)`` with V the sum of the outputs so far.
So an iteration is one pass over blocks of inputs: ``P = Wᵀ V``, ``b = P · u``, ``c = softmax(b)``, ``s += W
(c u)``, as FlashAttention does for attention, and its state is (M, K, batch) whatever N is. The backward pass
repeats the passes from the stored s and V of each iteration. The batch lies on the minor axis: all small axes
(M, D) are then summed as whole vectors, and the two products per block are matrix products over (block · D,
K, batch).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import common_variation
from capsfl_kernels.squash import squash
from capsfl_kernels.votes.streamed import Routing


class Streaming(NamedTuple):
    """Static choices of a streamed routing: the routing, inputs in one block, precision of the products."""

    routing: Routing
    block_size: int
    precision: lax.PrecisionLike


class _Blocks(NamedTuple):
    """Inputs (blocks, block, D, batch) and weights (blocks, M, block · D, K), both padded with zeros."""

    inputs: jax.Array
    weights: jax.Array


def route(inputs: jax.Array, weights: jax.Array, bias: jax.Array, streaming: Streaming) -> jax.Array:
    """Routes inputs (batch, N, D) through weights (N, M, K, D) to (batch, M, K) in the dtype of the bias."""
    inputs, weights, bias = common_variation(inputs, weights, bias)
    return _route(inputs, weights, bias, streaming)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _route(inputs: jax.Array, weights: jax.Array, bias: jax.Array, streaming: Streaming) -> jax.Array:
    return _forward(inputs, weights, bias, streaming)[0]


def _forward(inputs: jax.Array, weights: jax.Array, bias: jax.Array, streaming: Streaming) -> tuple:
    num_iters, leaky, _ = streaming.routing
    offset = bias[:, :, None]
    uniform = 1 / (weights.shape[1] + leaky)
    total = jnp.einsum(
        "bnd,nmkd->mkb",
        inputs,
        weights,
        precision=streaming.precision,
        preferred_element_type=bias.dtype,
    )
    sums = [total * uniform + offset]
    output = squash(sums[0], 1)
    directions: list[jax.Array] = []
    blocks = _split(inputs, weights, streaming.block_size)
    for _ in range(1, num_iters):
        directions.append(directions[-1] + output if directions else output)
        sums.append(_sum_pass(blocks, directions[-1], streaming) + offset)
        output = squash(sums[-1], 1)
    return output.transpose(2, 0, 1), (inputs, weights, bias, sums, directions)


def _backward(streaming: Streaming, residuals: tuple, grad: jax.Array) -> tuple:
    inputs, weights, bias, sums, directions = residuals
    num_iters, leaky, gradient = streaming.routing
    uniform = 1 / (weights.shape[1] + leaky)
    blocks = _split(inputs, weights, streaming.block_size)
    grad_output = grad.transpose(1, 2, 0)
    grad_bias = jnp.zeros_like(bias)
    grad_inputs = jnp.zeros_like(inputs, dtype=bias.dtype)
    grad_weights = jnp.zeros_like(weights, dtype=bias.dtype)
    for iteration in reversed(range(num_iters)):
        grad_sum = jax.vjp(lambda s: squash(s, 1), sums[iteration])[1](grad_output)[0]
        grad_bias = grad_bias + jnp.sum(grad_sum, axis=2)
        if iteration == 0:
            spread = (grad_sum * uniform).astype(weights.dtype)
            grad_inputs += _product("nmkd,mkb->bnd", weights, spread, bias.dtype, streaming)
            grad_weights += _product("bnd,mkb->nmkd", inputs, spread, bias.dtype, streaming)
            break
        grad_direction, pass_inputs, pass_weights = _gradient_pass(
            blocks, directions[iteration - 1], grad_sum, streaming
        )
        grad_inputs += _join_inputs(pass_inputs, inputs.shape)
        grad_weights += _join_weights(pass_weights, weights.shape)
        if gradient == "last":
            break
        # V of an iteration sums every output before it, so its gradient reaches all of them.
        grad_output = grad_direction if iteration == num_iters - 1 else grad_output + grad_direction
    return grad_inputs.astype(inputs.dtype), grad_weights.astype(weights.dtype), grad_bias


_route.defvjp(_forward, _backward)


def _sum_pass(blocks: _Blocks, direction: jax.Array, streaming: Streaming) -> jax.Array:
    """One iteration: the coupled sum of votes, (M, K, batch), under the logits of V, (M, K, batch)."""
    dtype = direction.dtype
    capsules, _, batch = direction.shape

    def step(total: jax.Array, block: _Blocks) -> tuple[jax.Array, None]:
        u, w = block
        projected = _project(w, direction, u.shape, streaming)
        coupling = _couple(jnp.sum(projected * u[None], axis=2), streaming.routing.leaky)
        coupled = (coupling[:, :, None] * u[None]).astype(w.dtype).reshape(capsules, -1, batch)
        return total + _product("mxk,mxb->mkb", w, coupled, dtype, streaming), None

    return lax.scan(step, jnp.zeros_like(direction), blocks)[0]


def _gradient_pass(
    blocks: _Blocks, direction: jax.Array, grad_sum: jax.Array, streaming: Streaming
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of V and of the blocks' inputs and weights from the gradient of the coupled sum."""
    dtype = direction.dtype
    capsules, _, batch = direction.shape

    def step(grad_direction: jax.Array, block: _Blocks) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        u, w = block
        projected = _project(w, direction, u.shape, streaming)
        grad_projected = _project(w, grad_sum, u.shape, streaming)
        coupling = _couple(jnp.sum(projected * u[None], axis=2), streaming.routing.leaky)
        grad_u = jnp.sum(coupling[:, :, None] * grad_projected, axis=0)
        coupled = (coupling[:, :, None] * u[None]).astype(w.dtype).reshape(capsules, -1, batch)
        grad_w = _product("mxb,mkb->mxk", coupled, grad_sum.astype(w.dtype), dtype, streaming)
        if streaming.routing.gradient == "full":
            grad_logits = _softmax_vjp(coupling, jnp.sum(grad_projected * u[None], axis=2))
            grad_u += jnp.sum(grad_logits[:, :, None] * projected, axis=0)
            weighted = (grad_logits[:, :, None] * u[None]).astype(w.dtype).reshape(capsules, -1, batch)
            grad_w += _product("mxb,mkb->mxk", weighted, direction.astype(w.dtype), dtype, streaming)
            grad_direction += _product("mxk,mxb->mkb", w, weighted, dtype, streaming)
        return grad_direction, (grad_u, grad_w)

    grad_direction, (grad_inputs, grad_weights) = lax.scan(step, jnp.zeros_like(direction), blocks)
    return grad_direction, grad_inputs, grad_weights


def _couple(logits: jax.Array, leaky: bool) -> jax.Array:
    """Softmax over the capsules on axis 0; a leaky one adds a capsule of logit zero that receives nothing."""
    peak = jnp.max(logits, axis=0, keepdims=True)
    peak = jnp.maximum(peak, 0) if leaky else peak
    raised = jnp.exp(logits - peak)
    total = jnp.sum(raised, axis=0, keepdims=True)
    total = total + jnp.exp(-peak) if leaky else total
    return raised * (1 / total)


def _softmax_vjp(coupling: jax.Array, grad: jax.Array) -> jax.Array:
    """Gradient of the logits of `_couple`; it is the same one with and without the leak."""
    weighted = coupling * grad
    return weighted - coupling * jnp.sum(weighted, axis=0, keepdims=True)


def _project(weights: jax.Array, direction: jax.Array, shape: tuple, streaming: Streaming) -> jax.Array:
    """Wᵀ V for one block: (M, block, D, batch)."""
    flat = _product("mxk,mkb->mxb", weights, direction.astype(weights.dtype), direction.dtype, streaming)
    return flat.reshape(direction.shape[0], *shape)


def _product(axes: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype, streaming: Streaming) -> jax.Array:
    return jnp.einsum(axes, a, b, precision=streaming.precision, preferred_element_type=dtype)


def _split(inputs: jax.Array, weights: jax.Array, block: int) -> _Blocks:
    """Cuts the inputs into blocks; capsules of zero fill the last one, they couple but add nothing."""
    batch, number, depth = inputs.shape
    _, capsules, dim, _ = weights.shape
    count = -(-number // block)
    padding = count * block - number
    inputs = jnp.pad(inputs, ((0, 0), (0, padding), (0, 0)))
    weights = jnp.pad(weights, ((0, padding), (0, 0), (0, 0), (0, 0)))
    return _Blocks(
        inputs.transpose(1, 2, 0).reshape(count, block, depth, batch),
        weights.reshape(count, block, capsules, dim, depth)
        .transpose(0, 2, 1, 4, 3)
        .reshape(count, capsules, block * depth, dim),
    )


def _join_inputs(blocks: jax.Array, shape: tuple) -> jax.Array:
    batch, number, depth = shape
    return blocks.reshape(-1, depth, batch)[:number].transpose(2, 0, 1)


def _join_weights(blocks: jax.Array, shape: tuple) -> jax.Array:
    number, capsules, dim, depth = shape
    count = blocks.shape[0]
    parts = blocks.reshape(count, capsules, -1, depth, dim).transpose(0, 2, 1, 4, 3)
    return parts.reshape(-1, capsules, dim, depth)[:number]
