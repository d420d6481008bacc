"""EM routing of given votes in tiles of positions and blocks of inputs; nothing but the votes is kept for long.

A block of votes is turned to have its positions on the minor axis, and back for its gradient. The last tile
and the last block overlap those before them where the numbers do not divide, since padding would copy all votes.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import common_variation
from capsfl_kernels.em import passes
from capsfl_kernels.em.reference import Routing


class Tiling(NamedTuple):
    """Static choices: the routing, positions in one tile, inputs in one block."""

    routing: Routing
    positions: int
    inputs: int


class _Votes(NamedTuple):
    """Votes (positions, I, J, K) and activations (positions, I); of one block (block, J, K, tile), (block, tile)."""

    votes: jax.Array
    activations: jax.Array


@dataclasses.dataclass(frozen=True)
class _Tile:
    """The votes of the positions from `first` on, in blocks of inputs."""

    given: _Votes
    first: jax.Array
    tiling: Tiling

    def count(self) -> int:
        return -(-self.given.votes.shape[1] // self.tiling.inputs)

    def take(self, index: jax.Array) -> _Votes:
        block = self._slice(self.given, index)
        activations = jnp.where(self._fresh(index), block.activations.T, 0)
        return _Votes(block.votes.transpose(1, 2, 3, 0).astype(activations.dtype), activations)

    def vote(self, block: _Votes) -> tuple[jax.Array, jax.Array]:
        return block.votes, block.activations

    def add(self, grads: _Votes, index: jax.Array, grad_block: _Votes) -> _Votes:
        block = self._slice(grads, index)
        # A vote seen before has no activation here, and so no gradient.
        votes = block.votes + grad_block.votes.transpose(3, 0, 1, 2)
        activations = block.activations + jnp.where(self._fresh(index), grad_block.activations, 0).T
        start = self._start(index)
        return _Votes(
            lax.dynamic_update_slice(grads.votes, votes, (self.first, start, 0, 0)),
            lax.dynamic_update_slice(grads.activations, activations, (self.first, start)),
        )

    def _start(self, index: jax.Array) -> jax.Array:
        return jnp.minimum(index * self.tiling.inputs, self.given.votes.shape[1] - self.tiling.inputs)

    def _fresh(self, index: jax.Array) -> jax.Array:
        """Which inputs of a block no block before it held, (block, 1)."""
        return (self._start(index) + jnp.arange(self.tiling.inputs) >= index * self.tiling.inputs)[:, None]

    def _slice(self, arrays: _Votes, index: jax.Array) -> _Votes:
        start, size = self._start(index), (self.tiling.positions, self.tiling.inputs)
        return _Votes(
            lax.dynamic_slice(arrays.votes, (self.first, start, 0, 0), (*size, *arrays.votes.shape[2:])),
            lax.dynamic_slice(arrays.activations, (self.first, start), size),
        )


def route(
    votes: jax.Array, activations: jax.Array, beta_a: jax.Array, beta_u: jax.Array, tiling: Tiling
) -> tuple[jax.Array, jax.Array]:
    """Routes votes (B, I, J, K) and activations (B, I) to poses (B, J, K) and log activations (B, J).

    The votes may be shorter than the other arguments, whose dtype is that of the sums and of the results.
    """
    return _route(*common_variation(votes, activations, beta_a, beta_u), tiling)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _route(votes, activations, beta_a, beta_u, tiling: Tiling) -> tuple[jax.Array, jax.Array]:
    return _forward(votes, activations, beta_a, beta_u, tiling)[0]


def _forward(votes, activations, beta_a, beta_u, tiling: Tiling) -> tuple:
    number, _, outputs, dim = votes.shape
    given = _Votes(votes, activations)

    def step(results: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[tuple, passes.Trace]:
        first = _first(index, number, tiling)
        nothing = jnp.zeros_like(activations, shape=(outputs, dim, tiling.positions))
        routed, trace = passes.forward(_Tile(given, first, tiling), nothing, beta_a, beta_u, tiling.routing)
        poses = lax.dynamic_update_slice(results[0], routed[0].transpose(2, 0, 1), (first, 0, 0))
        return (poses, lax.dynamic_update_slice(results[1], routed[1].T, (first, 0))), trace

    start = (
        jnp.zeros_like(activations, shape=(number, outputs, dim)),
        jnp.zeros_like(activations, shape=(number, outputs)),
    )
    results, traces = lax.scan(step, start, jnp.arange(-(-number // tiling.positions)))
    return results, (votes, activations, beta_a, beta_u, traces)


def _backward(tiling: Tiling, residuals: tuple, grad_outputs: tuple[jax.Array, jax.Array]) -> tuple:
    votes, activations, beta_a, beta_u, traces = residuals
    number, _, outputs, dim = votes.shape
    given = _Votes(votes, activations)

    def step(carry: tuple, tile: tuple[jax.Array, passes.Trace]) -> tuple[tuple, None]:
        grads, grad_beta_a, grad_beta_u = carry
        index, trace = tile
        first = _first(index, number, tiling)
        fresh = first + jnp.arange(tiling.positions) >= index * tiling.positions
        grad_poses = lax.dynamic_slice(grad_outputs[0], (first, 0, 0), (tiling.positions, outputs, dim))
        grad_logs = lax.dynamic_slice(grad_outputs[1], (first, 0), (tiling.positions, outputs))
        wanted = (
            jnp.where(fresh[None, None], grad_poses.transpose(1, 2, 0), 0),
            jnp.where(fresh[None], grad_logs.T, 0),
        )
        source = _Tile(given, first, tiling)
        grads, more_a, more_u = passes.backward(source, grads, trace, beta_a, beta_u, tiling.routing, wanted)
        return (grads, grad_beta_a + more_a, grad_beta_u + more_u), None

    nothing = _Votes(jnp.zeros_like(votes, dtype=activations.dtype), jnp.zeros_like(activations))
    start = (nothing, jnp.zeros_like(beta_a), jnp.zeros_like(beta_u))
    tiles = jnp.arange(-(-number // tiling.positions)), traces
    grads, grad_beta_a, grad_beta_u = lax.scan(step, start, tiles)[0]
    return grads.votes.astype(votes.dtype), grads.activations, grad_beta_a, grad_beta_u


_route.defvjp(_forward, _backward)


def _first(index: jax.Array, number: int, tiling: Tiling) -> jax.Array:
    return jnp.minimum(index * tiling.positions, number - tiling.positions)
