"""EM routing of fully connected matrix capsules that forms a block of votes at a time, forward and backward."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import common_variation
from capsfl_kernels.em import passes
from capsfl_kernels.em.reference import Routing


class Streaming(NamedTuple):
    """Static choices of a streamed routing: the routing, inputs in one block, precision of the products."""

    routing: Routing
    block_size: int
    precision: lax.PrecisionLike


class _Blocks(NamedTuple):
    """Poses (blocks, block, P, Q, batch), activations (blocks, block, batch), weights (blocks, block, J, Q, R).

    All are padded with zeros: an input without activation gives nothing to anyone. One block lacks the first axis.
    """

    poses: jax.Array
    activations: jax.Array
    weights: jax.Array


@dataclasses.dataclass(frozen=True)
class _Capsules:
    """The votes M_i W_ij of capsules in blocks; a vote's components lie column by column."""

    blocks: _Blocks
    precision: lax.PrecisionLike

    def count(self) -> int:
        return self.blocks.activations.shape[0]

    def take(self, index: jax.Array) -> _Blocks:
        dtype = self.blocks.activations.dtype
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False).astype(dtype), self.blocks)

    def vote(self, block: _Blocks) -> tuple[jax.Array, jax.Array]:
        votes = jnp.einsum("ipqb,ijqr->ijrpb", block.poses, block.weights, precision=self.precision)
        return votes.reshape(*votes.shape[:2], -1, votes.shape[4]), block.activations

    def zeros(self) -> _Blocks:
        return jax.tree.map(lambda a: jnp.zeros_like(a, dtype=self.blocks.activations.dtype), self.blocks)

    def add(self, grads: _Blocks, index: jax.Array, grad_block: _Blocks) -> _Blocks:
        def into(a: jax.Array, b: jax.Array) -> jax.Array:
            return lax.dynamic_update_index_in_dim(a, b + lax.dynamic_index_in_dim(a, index, keepdims=False), index, 0)

        return jax.tree.map(into, grads, grad_block)


def route(
    poses: jax.Array,
    activations: jax.Array,
    weights: jax.Array,
    beta_a: jax.Array,
    beta_u: jax.Array,
    streaming: Streaming,
) -> tuple[jax.Array, jax.Array]:
    """Routes poses (B, I, P, Q) and activations (B, I) through weights (I, J, Q, R).

    Returns poses (B, J, P, R) and log activations (B, J), both in the dtype of the activations.
    """
    arguments = common_variation(poses, activations, weights, beta_a, beta_u)
    return _route(*arguments, streaming)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _route(poses, activations, weights, beta_a, beta_u, streaming: Streaming) -> tuple[jax.Array, jax.Array]:
    return _forward(poses, activations, weights, beta_a, beta_u, streaming)[0]


def _forward(poses, activations, weights, beta_a, beta_u, streaming: Streaming) -> tuple:
    batch, _, rows, _ = poses.shape
    _, outputs, _, columns = weights.shape
    capsules = _Capsules(_split(poses, activations, weights, streaming.block_size), streaming.precision)
    nothing = jnp.zeros_like(activations, shape=(outputs, columns * rows, batch))
    (mean, log_activation), trace = passes.forward(capsules, nothing, beta_a, beta_u, streaming.routing)
    routed = mean.reshape(outputs, columns, rows, batch).transpose(3, 0, 2, 1)
    return (routed, log_activation.T), (poses, activations, weights, beta_a, beta_u, trace)


def _backward(streaming: Streaming, residuals: tuple, grad_outputs: tuple[jax.Array, jax.Array]) -> tuple:
    poses, activations, weights, beta_a, beta_u, trace = residuals
    batch, number, rows, _ = poses.shape
    _, outputs, _, columns = weights.shape
    capsules = _Capsules(_split(poses, activations, weights, streaming.block_size), streaming.precision)
    grad_mean = grad_outputs[0].transpose(1, 3, 2, 0).reshape(outputs, columns * rows, batch)
    grads, grad_beta_a, grad_beta_u = passes.backward(
        capsules, capsules.zeros(), trace, beta_a, beta_u, streaming.routing, (grad_mean, grad_outputs[1].T)
    )
    grad_poses, grad_activations, grad_weights = (a.reshape(-1, *a.shape[2:])[:number] for a in grads)
    return (
        grad_poses.transpose(3, 0, 1, 2).astype(poses.dtype),
        grad_activations.T,
        grad_weights.astype(weights.dtype),
        grad_beta_a,
        grad_beta_u,
    )


_route.defvjp(_forward, _backward)


def _split(poses: jax.Array, activations: jax.Array, weights: jax.Array, block: int) -> _Blocks:
    count = -(-poses.shape[1] // block)
    padding = (0, count * block - poses.shape[1])

    def cut(a: jax.Array) -> jax.Array:
        padded = jnp.pad(a, (padding, *[(0, 0)] * (a.ndim - 1)))
        return padded.reshape(count, block, *a.shape[1:])

    return _Blocks(cut(poses.transpose(1, 2, 3, 0)), cut(activations.T), cut(weights))
