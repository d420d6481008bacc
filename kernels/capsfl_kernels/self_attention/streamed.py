"""Self-attention routing that never forms a vote, forward or backward.

The agreement of vote ``û_nm = W_nm u_n`` with the sum of all votes for output m is ``u_n · (W_nmᵀ V_m)`` with
``V_m = Σ_n û_nm / sqrt(K)``, and V is one matrix product over all inputs. So a second pass over blocks of
inputs does the rest: ``P = Wᵀ V``, ``b = P · u``, ``c = softmax(b) + bias``, ``s += W (c u)``. The backward
pass repeats that pass from V and s, all that is kept. The batch lies on the minor axis: all small axes (M, D)
are then summed as whole vectors.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import common_variation
from capsfl_kernels.squash import squash


class Streaming(NamedTuple):
    """Static choices of a streamed routing: inputs in one block, precision of the products."""

    block_size: int
    precision: lax.PrecisionLike


class _Blocks(NamedTuple):
    """Inputs (blocks, block, D, batch), weights (blocks, M, block · D, K), bias (blocks, M, block), zeros beyond N."""

    inputs: jax.Array
    weights: jax.Array
    bias: jax.Array


def route(inputs: jax.Array, weights: jax.Array, bias: jax.Array, streaming: Streaming) -> jax.Array:
    """Routes inputs (batch, N, D) through weights (N, M, K, D) to (batch, M, K) in the dtype of the bias (N, M)."""
    inputs, weights, bias = common_variation(inputs, weights, bias)
    return _route(inputs, weights, bias, streaming)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _route(inputs: jax.Array, weights: jax.Array, bias: jax.Array, streaming: Streaming) -> jax.Array:
    return _forward(inputs, weights, bias, streaming)[0]


def _forward(inputs: jax.Array, weights: jax.Array, bias: jax.Array, streaming: Streaming) -> tuple:
    blocks = _split(inputs, weights, bias, streaming.block_size)
    scale = weights.shape[2] ** -0.5
    direction = scale * _product("bnd,nmkd->mkb", inputs, weights, bias.dtype, streaming)

    def step(total: jax.Array, block: _Blocks) -> tuple[jax.Array, None]:
        u, w = block.inputs.astype(bias.dtype), block.weights
        projected = _project(w, direction, u.shape, streaming)
        coupling = _softmax(jnp.sum(projected * u[None], axis=2)) + block.bias[:, :, None]
        return total + _product("mxk,mxb->mkb", w, _weigh(coupling, u, w.dtype), bias.dtype, streaming), None

    total = lax.scan(step, jnp.zeros_like(direction), blocks)[0]
    output = squash(total, 1, kind="exponential")
    return output.transpose(2, 0, 1), (inputs, weights, bias, direction, total)


def _backward(streaming: Streaming, residuals: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    inputs, weights, bias, direction, total = residuals
    dtype = bias.dtype
    blocks = _split(inputs, weights, bias, streaming.block_size)
    grad_total = jax.vjp(lambda s: squash(s, 1, kind="exponential"), total)[1](grad.transpose(1, 2, 0))[0]

    def step(grad_direction: jax.Array, block: _Blocks) -> tuple[jax.Array, _Blocks]:
        u, w = block.inputs.astype(dtype), block.weights
        projected = _project(w, direction, u.shape, streaming)
        grad_projected = _project(w, grad_total, u.shape, streaming)
        attention = _softmax(jnp.sum(projected * u[None], axis=2))
        coupling = attention + block.bias[:, :, None]
        grad_coupling = jnp.sum(grad_projected * u[None], axis=2)
        pulled = attention * grad_coupling
        grad_logits = pulled - attention * jnp.sum(pulled, axis=0, keepdims=True)
        grad_u = jnp.sum(coupling[:, :, None] * grad_projected + grad_logits[:, :, None] * projected, axis=0)
        coupled, weighted = _weigh(coupling, u, w.dtype), _weigh(grad_logits, u, w.dtype)
        grad_w = _product("mxb,mkb->mxk", coupled, grad_total.astype(w.dtype), dtype, streaming)
        grad_w += _product("mxb,mkb->mxk", weighted, direction.astype(w.dtype), dtype, streaming)
        grad_direction += _product("mxk,mxb->mkb", w, weighted, dtype, streaming)
        return grad_direction, _Blocks(grad_u, grad_w, jnp.sum(grad_coupling, axis=2))

    grad_direction, grads = lax.scan(step, jnp.zeros_like(direction), blocks)
    # V sums every vote with the same weight: plain matrix products.
    spread = (weights.shape[2] ** -0.5 * grad_direction).astype(weights.dtype)
    grad_inputs = _join_inputs(grads.inputs, inputs.shape)
    grad_inputs += _product("nmkd,mkb->bnd", weights, spread, dtype, streaming)
    grad_weights = _join_weights(grads.weights, weights.shape)
    grad_weights += _product("bnd,mkb->nmkd", inputs, spread, dtype, streaming)
    grad_bias = grads.bias.transpose(0, 2, 1).reshape(-1, bias.shape[1])[: bias.shape[0]]
    return grad_inputs.astype(inputs.dtype), grad_weights.astype(weights.dtype), grad_bias


_route.defvjp(_forward, _backward)


def _softmax(logits: jax.Array) -> jax.Array:
    """Over the output capsules, axis 0."""
    raised = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
    return raised * (1 / jnp.sum(raised, axis=0, keepdims=True))


def _weigh(coupling: jax.Array, inputs: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Coupling (M, block, batch) times inputs (block, D, batch), as (M, block · D, batch)."""
    coupled = (coupling[:, :, None] * inputs[None]).astype(dtype)
    return coupled.reshape(coupling.shape[0], -1, coupling.shape[2])


def _project(weights: jax.Array, direction: jax.Array, shape: tuple, streaming: Streaming) -> jax.Array:
    """Wᵀ V for one block: (M, block, D, batch)."""
    flat = _product("mxk,mkb->mxb", weights, direction.astype(weights.dtype), direction.dtype, streaming)
    return flat.reshape(direction.shape[0], *shape)


def _product(axes: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype, streaming: Streaming) -> jax.Array:
    return jnp.einsum(axes, a, b, precision=streaming.precision, preferred_element_type=dtype)


def _split(inputs: jax.Array, weights: jax.Array, bias: jax.Array, block: int) -> _Blocks:
    batch, number, depth = inputs.shape
    _, capsules, dim, _ = weights.shape
    count = -(-number // block)
    padding = (0, count * block - number)
    inputs = jnp.pad(inputs.transpose(1, 2, 0), (padding, (0, 0), (0, 0)))
    weights = jnp.pad(weights, (padding, (0, 0), (0, 0), (0, 0)))
    bias = jnp.pad(bias, (padding, (0, 0)))
    return _Blocks(
        inputs.reshape(count, block, depth, batch),
        weights.reshape(count, block, capsules, dim, depth)
        .transpose(0, 2, 1, 4, 3)
        .reshape(count, capsules, block * depth, dim),
        bias.reshape(count, block, capsules).transpose(0, 2, 1),
    )


def _join_inputs(blocks: jax.Array, shape: tuple) -> jax.Array:
    batch, number, depth = shape
    return blocks.reshape(-1, depth, batch)[:number].transpose(2, 0, 1)


def _join_weights(blocks: jax.Array, shape: tuple) -> jax.Array:
    number, capsules, dim, depth = shape
    parts = blocks.reshape(blocks.shape[0], capsules, -1, depth, dim).transpose(0, 2, 1, 4, 3)
    return parts.reshape(-1, capsules, dim, depth)[:number]
