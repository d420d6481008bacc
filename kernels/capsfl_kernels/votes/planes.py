"""Routing of one tile of votes on a CPU, with the positions on the minor axis: value and gradient.

XLA:CPU turns a sum over a minor axis of 16 numbers, or one that it fuses with what feeds it, into scalar code.
Here every small axis (dimension K, capsules M, inputs I) leads and the positions follow, so that all work runs
over long contiguous vectors: the sums over K are loops with an accumulator, and `optimization_barrier` keeps
XLA from computing logits and couplings again in each of their readers. On two cores this is 3 to 8 times the
speed of the plain form.

The backward pass is the one of fully connected routing (`dynamic.streamed`) with the votes in the place of
``W u``; all its terms of the gradient of a vote are written in one last sweep.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import Gradient
from capsfl_kernels.squash import squash

# A longer axis than this is summed by a loop; a shorter one as written-out additions, which compile to one loop.
_UNROLLED = 32


class Trace(NamedTuple):
    """What the backward pass needs of the forward one, a K-th or an I-th of the size of the votes.

    Attributes:
        sums: s of every iteration, (K, M, positions) each.
        directions: V before every iteration but the first, the same shape.
        couplings: c of every iteration but the first, (M, I, positions) each.
    """

    sums: tuple[jax.Array, ...]
    directions: tuple[jax.Array, ...]
    couplings: tuple[jax.Array, ...]


def route(votes: jax.Array, bias: jax.Array, num_iters: int, leaky: bool) -> tuple[jax.Array, Trace]:
    """Routes votes (K, M, I, positions) with bias (K, M, 1) to (K, M, positions)."""
    capsules = votes.shape[1]
    sums = [lax.optimization_barrier(jnp.sum(votes, axis=2) / (capsules + leaky) + bias)]
    directions: list[jax.Array] = []
    couplings: list[jax.Array] = []
    output = squash(sums[0], 0)
    for _ in range(1, num_iters):
        direction = output if not directions else directions[-1] + output
        directions.append(lax.optimization_barrier(direction))
        couplings.append(_couple(_agree(votes, directions[-1]), leaky))
        sums.append(lax.optimization_barrier(_weigh(votes, couplings[-1]) + bias))
        output = squash(sums[-1], 0)
    return output, Trace(tuple(sums), tuple(directions), tuple(couplings))


def differentiate(
    votes: jax.Array, trace: Trace, grad: jax.Array, leaky: bool, gradient: Gradient
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the votes (K, M, I, positions) and of the bias (K, M) from that of the output."""
    sums, directions, couplings = trace
    capsules, dim = votes.shape[1], votes.shape[0]
    grad_bias = jnp.zeros((dim, capsules), votes.dtype)
    grad_output = grad
    uniform: list[jax.Array] = []  # gradient of the first sum, whose coupling is the same for all
    coupled: list[tuple[jax.Array, jax.Array]] = []  # (coupling, gradient of the sum)
    agreed: list[tuple[jax.Array, jax.Array]] = []  # (gradient of the logits, direction)
    for iteration in reversed(range(len(sums))):
        grad_sum = jax.vjp(lambda s: squash(s, 0), sums[iteration])[1](grad_output)[0]
        grad_sum = lax.optimization_barrier(grad_sum)
        grad_bias = grad_bias + jnp.sum(grad_sum, axis=2)
        if iteration == 0:
            uniform.append(grad_sum / (capsules + leaky))
            break
        coupling, direction = couplings[iteration - 1], directions[iteration - 1]
        coupled.append((coupling, grad_sum))
        if gradient == "last":
            break
        grad_logits = _couple_backward(coupling, _agree(votes, grad_sum))
        agreed.append((grad_logits, direction))
        grad_direction = _weigh(votes, grad_logits)
        # V of an iteration sums every output before it, so its gradient reaches all of them.
        grad_output = grad_direction if iteration == len(sums) - 1 else grad_output + grad_direction

    weights = [weight for weight, _ in coupled + agreed]

    def step(_: None, component: tuple[list[jax.Array], list[jax.Array]]) -> tuple[None, jax.Array]:
        spread, along = component
        terms = [array[:, None] for array in spread]
        terms += [weight * array[:, None] for weight, array in zip(weights, along, strict=True)]
        return None, jnp.broadcast_to(functools.reduce(operator.add, terms), votes.shape[1:])

    grad_votes = lax.scan(step, None, (uniform, [array for _, array in coupled + agreed]))[1]
    return grad_votes, grad_bias


def _agree(votes: jax.Array, direction: jax.Array) -> jax.Array:
    """Products of votes and direction summed over K: (M, I, positions)."""

    def step(total: jax.Array, component: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        vote, along = component
        return total + vote * along[:, None], None

    return lax.scan(step, jnp.zeros_like(votes[0]), (votes, direction))[0]


def _weigh(votes: jax.Array, weights: jax.Array) -> jax.Array:
    """Votes under weights (M, I, positions) summed over the inputs: (K, M, positions)."""
    return lax.map(lambda component: jnp.sum(component * weights, axis=1), votes)


def _couple(logits: jax.Array, leaky: bool) -> jax.Array:
    """Softmax over the capsules on axis 0; a leaky one adds a capsule of logit zero that receives nothing."""
    peak = _reduce(jnp.maximum, logits)
    peak = jnp.maximum(peak, 0) if leaky else peak
    raised = lax.optimization_barrier(jnp.exp(logits - peak[None]))
    total = _reduce(operator.add, raised)
    total = total + jnp.exp(-peak) if leaky else total
    return lax.optimization_barrier(raised * lax.optimization_barrier(1 / total)[None])


def _couple_backward(coupling: jax.Array, grad: jax.Array) -> jax.Array:
    """Gradient of the logits of `_couple`; it is the same one with and without the leak."""
    weighted = lax.optimization_barrier(coupling * grad)
    return lax.optimization_barrier(weighted - coupling * _reduce(operator.add, weighted)[None])


def _reduce(combine: Callable[[jax.Array, jax.Array], jax.Array], array: jax.Array) -> jax.Array:
    """Combines the entries of axis 0."""
    if array.shape[0] <= _UNROLLED:
        return functools.reduce(combine, [array[m] for m in range(array.shape[0])])
    return lax.scan(lambda total, entry: (combine(total, entry), None), array[0], array[1:])[0]
