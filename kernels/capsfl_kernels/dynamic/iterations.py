"""The loop over routing iterations and its custom gradient, around two passes that an implementation brings.

Every implementation that never forms a vote computes the same thing: one plain matrix product for t = 1, one
pass over the input capsules for every further iteration, and for the gradient the same passes backwards from
the stored sums ``s_t`` and directions ``V_t``. Only the passes differ between the accelerators.
"""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from capsfl_kernels.arguments import common_variation
from capsfl_kernels.squash import squash
from capsfl_kernels.votes.streamed import Routing


class Passes(Protocol):
    """One sum pass and one gradient pass over arranged inputs and weights; hashable, for it is static.

    Sums, directions and their gradients are (batch, M, K) in the accumulation dtype.
    """

    @property
    def precision(self) -> lax.PrecisionLike:
        """Precision of the plain matrix products around the passes."""
        ...

    def arrange(self, inputs: jax.Array, weights: jax.Array) -> Any:
        """Lays inputs (batch, N, D) and weights (N, M, K, D) out for the passes."""
        ...

    def sum_votes(self, arranged: Any, direction: jax.Array) -> jax.Array:
        """``s_j = Σ_i c_ij û_ij`` under the logits ``û_ij · V_j``."""
        ...

    def differentiate(
        self, arranged: Any, direction: jax.Array, grad_sum: jax.Array
    ) -> tuple[jax.Array | None, tuple[jax.Array, jax.Array]]:
        """Gradients of V and of the arranged inputs and weights; that of V is None for ``gradient="last"``."""
        ...

    def restore(self, grads: tuple[jax.Array, jax.Array], inputs: Any, weights: Any) -> tuple[jax.Array, jax.Array]:
        """Gradients of arranged inputs and weights in the shapes of `inputs` and `weights`."""
        ...


def route(inputs: jax.Array, weights: jax.Array, bias: jax.Array, routing: Routing, passes: Passes) -> jax.Array:
    """Routes inputs (batch, N, D) through weights (N, M, K, D) to (batch, M, K) in the dtype of the bias."""
    inputs, weights, bias = common_variation(inputs, weights, bias)
    return _route(inputs, weights, bias, routing, passes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _route(inputs: jax.Array, weights: jax.Array, bias: jax.Array, routing: Routing, passes: Passes) -> jax.Array:
    return _forward(inputs, weights, bias, routing, passes)[0]


def _forward(inputs: jax.Array, weights: jax.Array, bias: jax.Array, routing: Routing, passes: Passes) -> tuple:
    offset = bias[None]
    uniform = 1 / (weights.shape[1] + routing.leaky)
    sums = [_product("bnd,nmkd->bmk", inputs, weights, bias, passes) * uniform + offset]
    output = squash(sums[0])
    directions: list[jax.Array] = []
    arranged = passes.arrange(inputs, weights) if routing.num_iters > 1 else None
    for _ in range(1, routing.num_iters):
        directions.append(directions[-1] + output if directions else output)
        sums.append(passes.sum_votes(arranged, directions[-1]) + offset)
        output = squash(sums[-1])
    return output, (inputs, weights, bias, sums, directions)


def _backward(routing: Routing, passes: Passes, residuals: tuple, grad: jax.Array) -> tuple:
    inputs, weights, bias, sums, directions = residuals
    uniform = 1 / (weights.shape[1] + routing.leaky)
    # Arranging again costs one copy; keeping the arrangement would double what a training step holds.
    arranged = passes.arrange(inputs, weights) if routing.num_iters > 1 else None
    grad_output = grad
    grad_bias = jnp.zeros_like(bias)
    grads = None
    for iteration in reversed(range(1, routing.num_iters)):
        grad_sum = jax.vjp(squash, sums[iteration])[1](grad_output)[0]
        grad_bias = grad_bias + jnp.sum(grad_sum, axis=0)
        grad_direction, passed = passes.differentiate(arranged, directions[iteration - 1], grad_sum)
        grads = passed if grads is None else (grads[0] + passed[0], grads[1] + passed[1])
        if grad_direction is None:
            break
        # V of an iteration sums every output before it, so its gradient reaches all of them.
        grad_output = grad_direction if iteration == routing.num_iters - 1 else grad_output + grad_direction
    grad_inputs, grad_weights = (None, None) if grads is None else passes.restore(grads, inputs, weights)
    if grads is None or routing.gradient == "full":
        grad_sum = jax.vjp(squash, sums[0])[1](grad_output)[0]
        grad_bias = grad_bias + jnp.sum(grad_sum, axis=0)
        spread = (grad_sum * uniform).astype(weights.dtype)
        first_inputs = _product("nmkd,bmk->bnd", weights, spread, bias, passes)
        first_weights = _product("bnd,bmk->nmkd", inputs, spread, bias, passes)
        grad_inputs = first_inputs if grad_inputs is None else grad_inputs + first_inputs
        grad_weights = first_weights if grad_weights is None else grad_weights + first_weights
    assert grad_inputs is not None
    assert grad_weights is not None
    return grad_inputs.astype(inputs.dtype), grad_weights.astype(weights.dtype), grad_bias


_route.defvjp(_forward, _backward)


def _product(axes: str, a: jax.Array, b: jax.Array, like: jax.Array, passes: Passes) -> jax.Array:
    return jnp.einsum(axes, a, b, precision=passes.precision, preferred_element_type=like.dtype)
