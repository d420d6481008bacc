"""Routing of given votes in tiles of positions; the backward pass keeps nothing but the votes themselves."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import common_variation
from capsfl_kernels.votes import tile
from capsfl_kernels.votes.tile import Routing


def route(votes: jax.Array, bias: jax.Array, routing: Routing, block_size: int) -> jax.Array:
    """Routes votes (positions, I, M, K) with bias (M, K) to (positions, M, K)."""
    positions = votes.shape[0]
    blocks = -(-positions // block_size)
    padded = jnp.pad(votes, ((0, blocks * block_size - positions), (0, 0), (0, 0), (0, 0)))
    tiles = padded.reshape(blocks, block_size, *votes.shape[1:])
    tiles, bias = common_variation(tiles, bias)
    routed: jax.Array = _route_tiles(tiles, bias, routing)
    return routed.reshape(-1, *votes.shape[2:])[:positions]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _route_tiles(tiles: jax.Array, bias: jax.Array, routing: Routing) -> jax.Array:
    return lax.map(lambda votes: tile.route(votes[:, :, None], bias, routing)[:, 0], tiles)


def _forward(tiles: jax.Array, bias: jax.Array, routing: Routing) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _route_tiles(tiles, bias, routing), (tiles, bias)


def _backward(routing: Routing, residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    tiles, bias = residuals

    def step(total: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        votes, grad_routed = block
        grad_votes, grad_bias = tile.differentiate(votes[:, :, None], bias, grad_routed[:, None], routing)
        return total + grad_bias, grad_votes[:, :, 0]

    grad_bias, grad_tiles = lax.scan(step, jnp.zeros_like(bias), (tiles, grad))
    return grad_tiles, grad_bias


_route_tiles.defvjp(_forward, _backward)
