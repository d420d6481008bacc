"""Routing of one tile of votes, small enough to be held: value, and gradient by recomputation."""

from typing import NamedTuple

import jax

from capsfl_kernels.arguments import Gradient
from capsfl_kernels.votes import planes, reference


class Routing(NamedTuple):
    """Static choices of a routing."""

    num_iters: int
    leaky: bool
    gradient: Gradient


def route(votes: jax.Array, bias: jax.Array, routing: Routing) -> jax.Array:
    """Routes votes (A, I, B, M, K) with bias (M, K) to (A, B, M, K); A and B are positions."""
    if jax.default_backend() == "cpu":
        output, _ = planes.route(_to_planes(votes), bias.T[:, :, None], routing.num_iters, routing.leaky)
        return _from_planes(output, votes.shape)
    return _route_plainly(votes, bias, routing)


def differentiate(votes: jax.Array, bias: jax.Array, grad: jax.Array, routing: Routing) -> tuple[jax.Array, jax.Array]:
    """Gradients of votes (A, I, B, M, K) and bias (M, K) from that of the output, (A, B, M, K)."""
    if jax.default_backend() != "cpu":
        return jax.vjp(lambda v, b: _route_plainly(v, b, routing), votes, bias)[1](grad)
    turned = _to_planes(votes)
    _, trace = planes.route(turned, bias.T[:, :, None], routing.num_iters, routing.leaky)
    outer, inputs, inner, capsules, dim = votes.shape
    turned_grad = grad.transpose(3, 2, 0, 1).reshape(dim, capsules, outer * inner)
    grad_votes, grad_bias = planes.differentiate(turned, trace, turned_grad, routing.leaky, routing.gradient)
    parts = grad_votes.reshape(dim, capsules, inputs, outer, inner)
    return parts.transpose(3, 2, 4, 1, 0), grad_bias.T


def _route_plainly(votes: jax.Array, bias: jax.Array, routing: Routing) -> jax.Array:
    outer, inputs, inner, capsules, dim = votes.shape
    flat = votes.transpose(0, 2, 1, 3, 4).reshape(-1, inputs, capsules, dim)
    return reference.route(flat, bias, **routing._asdict()).reshape(outer, inner, capsules, dim)


def _to_planes(votes: jax.Array) -> jax.Array:
    """(K, M, I, positions)."""
    _, inputs, _, capsules, dim = votes.shape
    return votes.transpose(4, 3, 1, 0, 2).reshape(dim, capsules, inputs, -1)


def _from_planes(output: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    outer, _, inner, capsules, dim = shape
    return output.reshape(dim, capsules, outer, inner).transpose(2, 3, 1, 0)
